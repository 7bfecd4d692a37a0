"""The Triton kernels of `ops/lora_linear/triton.py` without a GPU."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests import ROOT

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from torch_fused_lora.affine import Packed  # noqa: E402
from torch_fused_lora.ops import launcher  # noqa: E402
from torch_fused_lora.ops.dropout import triton as dropout  # noqa: E402
from torch_fused_lora.ops.lora_linear import gluon, ways  # noqa: E402
from torch_fused_lora.ops.lora_linear import triton as kernels  # noqa: E402
from torch_fused_lora.ops.lora_linear_quantized import triton as quantized  # noqa: E402

# The interpreter multiplies no bfloat16: float16, and a plain product. What is allocated begins as NaN.
INTERPRETED = """
import torch
from torch_fused_lora.ops.lora_linear import triton as kernels, ways
ways.TABLE['cpu'] = ways.Limits(block=1 << 21, triton=True, carrying=1024)
torch.use_deterministic_algorithms(True)
tl = kernels.tl
kernels._dot = lambda a, b, total: tl.dot(a.to(tl.float32), b.to(tl.float32), total)
"""


def interpret(script: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED + script], check=True, cwd=ROOT, env=environment)


def test_triton_kernels():
    """What an NVIDIA GPU does with half rows that meet adapters, executed by Triton's interpreter on the CPU
    (test_cuda.py does it on a GPU): ragged blocks, several parts, blocks of rank, few rows, strided operands."""
    interpret("""
from tests.reference import Exact, Layer
from tests.operators.test_lora_linear import laid_out
import torch_fused_lora as tfl
from torch_fused_lora.ops.dropout.operator import draw_seed, gpu_mask
from torch_fused_lora.ops.lora_linear.operator import lora_linear_stacked
for M, K, N, r, dtype, adapter_dtype, layout in (
    (70, 130, 200, 5, torch.float16, torch.float32, "contiguous"),
    (9, 300, 70, 33, torch.float16, torch.float16, "strided"),
    (40, 1100, 600, 4, torch.float16, torch.float32, "contiguous"),
    (1, 7, 3, 1, torch.float16, torch.float32, "transposed"),
    (600, 96, 80, 70, torch.float16, torch.float32, "strided"),
):
    operands = [laid_out(s, t, layout).requires_grad_() for s, t in (
        ((M, K), dtype), ((N, K), dtype), ((N,), dtype), ((r, K), adapter_dtype), ((N, r), adapter_dtype)
    )]
    scaling = torch.tensor(0.5, requires_grad=M == 70)
    layer = Layer(*operands, 0.5)
    y = tfl.lora_linear(*operands, scaling)
    layer.output().check(y.detach())
    grad = torch.randn(M, N).to(dtype)
    names = ["x", "weight", "bias", "lora_A", "lora_B", "scaling"][: 6 if scaling.requires_grad else 5]
    exact = layer.gradients(grad)
    for name, found in zip(names, torch.autograd.grad(y, [*operands, scaling][: len(names)], grad), strict=True):
        if name in exact:
            exact[name].check(found, name)
with torch.no_grad():
    x, W, _, A, B = operands
    y, z = torch.zeros(M, N, dtype=dtype), torch.zeros(M, N, dtype=dtype)
    kernels.add_delta_(y, x, A, B, 0.5)
    kernels.add_delta_(z, x, A, B, torch.tensor(0.5))
    assert torch.equal(y, z) and y.any()
    h = torch.randn(M, r)
    base = lambda grad: torch.zeros(M, K, dtype=dtype)
    added, *grads = kernels.backward(grad, None, base, x, A, B, 0.5, h, True, True)
    written, *again = kernels.backward(grad, None, None, x, A, B, 0.5, h, True, True)
    assert torch.equal(added, written) and all(map(torch.equal, grads, again))
    *none, alone = kernels.backward(grad, None, None, None, A, B, 0.5, h, False, True)
    assert none == [None, None]
    Exact(grad.double().T @ h.double() / 2, grad.double().abs().T @ h.double().abs() / 2, M).check(alone)

# On Hopper up to 64 rows are one pass over the weight, too.
kernels.begins_early = lambda device: True
M, K, N, r = 40, 130, 2052, 5
operands = [laid_out(s, t, "strided").requires_grad_() for s, t in (
    ((M, K), torch.float16), ((N, K), torch.float16), ((N,), torch.float16), ((r, K), torch.float32),
    ((N, r), torch.float32),
)]
layer, y = Layer(*operands, 0.5), tfl.lora_linear(*operands, 0.5)
layer.output().check(y.detach())
grad = torch.randn(M, N).to(torch.float16)
layer.gradients(grad)["lora_B"].check(torch.autograd.grad(y, operands[4], grad)[0], "lora_B")
kernels.begins_early = lambda device: False

# Dropout in registers: of one adapter, of several, some of which drop nothing.
for M, K, N, ranks, dropouts, dtype, adapter_dtype in (
    (70, 136, 200, (5,), (0.3,), torch.float16, torch.float32),
    (600, 96, 80, (3, 2, 4), (0.6, 0.0, 0.1), torch.float16, torch.float16),
    (70, 136, 72, (66,), (0.3,), torch.float16, torch.float32),
):
    r = sum(ranks)
    operands = [laid_out(s, t, "strided").requires_grad_() for s, t in (
        ((M, K), dtype), ((N, K), dtype), ((N,), dtype), ((r, K), adapter_dtype), ((N, r), adapter_dtype)
    )]
    torch.manual_seed(3)
    seed = int(draw_seed(operands[0]))
    torch.manual_seed(3)
    masks, start = [], 0
    for stream, (rank, p) in enumerate(zip(ranks, dropouts)):
        keep = gpu_mask(seed, stream, 0, M * K, round(p * 2**32)).view(M, K).double() / (1 - p) if p else None
        masks.append((slice(start, start + rank), keep))
        start += rank
    layer = Layer(*operands, 0.5, masks, launches=len(ranks))
    y = lora_linear_stacked(*operands, 0.5, dropouts, ranks)
    layer.output().check(y.detach())
    grad = torch.randn(M, N).to(dtype)
    exact = layer.gradients(grad)
    for name, found in zip(("x", "weight", "bias", "lora_A", "lora_B"), torch.autograd.grad(y, operands, grad)):
        if name in exact:
            exact[name].check(found, name)
""")


def test_operands_of_any_shape():
    """The same bits as of matrices, whether rows lie one after the other or not, by one product for all rows; and y may
    be changed in place. As on a card, where nothing is packed first."""
    interpret("""
from torch.utils._python_dispatch import TorchDispatchMode
import torch_fused_lora as tfl
from torch_fused_lora.ops.lora_delta import operator as delta_operator
from torch_fused_lora.ops import dispatch
from torch_fused_lora.ops.lora_linear import portable
dispatch.dispatch_modes = lambda: 0  # else it would see the operators
portable.HALF = frozenset()
delta_operator.flat, delta_operator.packed = lambda t: t, lambda *t: t
half, products = torch.float16, []

class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        products.append(str(function.overloadpacket))
        return function(*arguments, **(options or {}))

def packed(t):
    return t

def with_gaps(t):
    return torch.cat([t, t], 1).narrow(1, 0, t.shape[1])

def transposed(t):  # of a batch of one: packed but for a stride that nothing reads
    return t.view(1, len(t), -1).transpose(0, 1)

K, N, r = 136, 72, 5
for M, p, has_bias in ((12, 0.0, False), (70, 0.0, True), (70, 0.0, False), (70, 0.3, True)):
    x, grad, bias = (torch.randn(shape).to(half) for shape in ((M, K), (M, N), (N,)))
    bias = bias if has_bias else None
    W, A, B = torch.randn(N, K).to(half), torch.randn(r, K).requires_grad_(), torch.randn(N, r).requires_grad_()
    found = []
    for shape, layout in (
        ((M,), packed), ((M,), with_gaps), ((2, 1, M // 2), packed), ((2, 1, M // 2), with_gaps), ((M, 1), transposed)
    ):
        torch.manual_seed(3)
        own_x, own_grad = layout(x.view(*shape, K)), layout(grad.view(*shape, N))
        leaves = own_x.detach().requires_grad_(), A, B
        y = tfl.lora_linear(leaves[0], W, bias, A, B, 0.5, p, True)
        before = y.detach().clone()
        y += 1
        delta = tfl.lora_delta(own_grad, leaves[0], A, B, 0.5, p, True)
        gradients = [*torch.autograd.grad(y, leaves, own_grad), *torch.autograd.grad(delta, leaves, own_grad)]
        assert y.shape == delta.shape == own_grad.shape and gradients[0].shape == gradients[3].shape == own_x.shape
        found.append([t.reshape(-1) for t in (before, delta, *gradients)])
        with Watching():
            y = tfl.lora_linear(own_x, W, bias, A, B, 0.5, p, True)
            torch.autograd.grad(tfl.lora_linear(leaves[0], W, bias, A, B, 0.5, p, True), leaves, own_grad)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others)), (M, p)
assert "aten.mm" in products and "aten.bmm" not in products, set(products)
""")


@pytest.mark.parametrize("rows", [3, 40])
def test_what_does_not_fit_is_refused(rows):
    """However few its rows are, by whoever knows dtypes and layouts to fit; so is an adapter on another device."""
    interpret(
        f"M = {rows}"
        + """
from torch_fused_lora.affine import quantize
from torch_fused_lora.ops.lora_delta.operator import lora_delta_stacked
from torch_fused_lora.ops.lora_linear.operator import lora_linear_stacked
from torch_fused_lora.ops.lora_linear_quantized.operator import lora_linear_quantized_stacked
K, N, r = 128, 72, 5
for call, wrongs in (
    (lora_linear_stacked, (0, 1, 2, 3)), (lora_delta_stacked, (0, 2, 3)), (lora_linear_quantized_stacked, (0, 2, 3))
):
    for wrong in (*wrongs, "lora_A", "lora_B"):
        shapes = [[M, K], [N, K], [r, K], [N, r]]
        if not isinstance(wrong, str):
            shapes[wrong][-1] += 8
        x, W, A, B = (torch.randn(s) for s in shapes)
        A, B = A.to("meta" if wrong == "lora_A" else "cpu"), B.to("meta" if wrong == "lora_B" else "cpu")
        x, y = x.half(), torch.randn(M, N).half()
        base = {lora_linear_stacked: (x, W.half(), None), lora_delta_stacked: (y, x)}
        base[lora_linear_quantized_stacked] = x, quantize(torch.randn(N, K), 4, 64), None
        try:
            call(*base[call], A, B, 0.5, checked=True)
        except ValueError as error:
            expected = f"{wrong}: expected x's device" if isinstance(wrong, str) else ""
            assert f"{call.__name__[:-8]}: " in str(error) and expected in str(error).replace("y's", "x's"), error
        else:
            raise AssertionError((call, shapes))
"""
    )


def test_lora_delta():
    """The same kernels add to what they did not make, which may be float32; its gradients are aten calls then, which
    draw the mask that the kernels drew."""
    interpret("""
from tests.operators.test_lora_delta import NAMES, check_call, operands
from tests.operators.test_lora_linear import seeded_masks
from tests.reference import Delta
from torch_fused_lora.ops.dropout import operator as dropout
from torch_fused_lora.ops.lora_delta.operator import lora_delta_stacked
dropout._cpu_mask = lambda *arguments: dropout.gpu_mask(*arguments).numpy()
seen = []
for name in ("add_delta_", "backward"):
    def counting(*arguments, name=name, kernel=getattr(kernels, name)):
        seen.append(name)
        return kernel(*arguments)
    setattr(kernels, name, counting)
half, wide = torch.float16, torch.float32
for dtypes, (K, N), dropouts, reached in (
    ((half, half, wide), (130, 200), (0.0,), ["add_delta_", "backward"]),
    ((half, half, half), (96, 80), (0.6, 0.0, 0.1), ["add_delta_", "backward"]),
    ((wide, half, wide), (130, 72), (0.0,), ["add_delta_"]),
    ((wide, half, half), (136, 72), (0.3,), ["add_delta_"]),
    ((wide, half, wide), (136, 72), (0.3, 0.6), ["add_delta_"]),
):
    ranks = [3, 2, 4][:len(dropouts)]
    tensors = operands(dtypes, (70,), (K, N, sum(ranks)))
    exact = Delta(*tensors, 0.5, seeded_masks(3, tensors[1], ranks, dropouts), len(ranks))
    found = lora_delta_stacked(*tensors, 0.5, dropouts, ranks)
    check_call(exact, dict(zip(NAMES, tensors)), found, torch.randn(70, N).to(found))
    assert seen == reached, (dtypes, seen)
    seen.clear()
""")


def test_a_tuned_layer():
    """Its tiles and its way, in the direction, rows, widths, rank and dtypes that are tuned, and nowhere else; ragged
    blocks. A torch that is to be deterministic takes none of it."""
    interpret("""
from tests.operators.test_lora_linear import laid_out
from tests.reference import Layer
from torch_fused_lora import tuned
from torch_fused_lora.ops.lora_linear.ways import tuned_layers, choose, BY_TRITON
import torch_fused_lora as tfl
seen = {}
for name in ("product", "expand", "gradients", "few_rows"):
    launcher = getattr(kernels, f"_launch_{name}")
    def preparing(*arguments, name=name, prepare=launcher._prepare):
        grid, found, how = prepare(*arguments)
        seen[name] = (grid[0], *how.values())
        return grid, found, how
    launcher._prepare = preparing

def run(M, K, N, r, dtype, adapter_dtype):
    operands = [laid_out(s, t, "strided").requires_grad_() for s, t in (
        ((M, K), dtype), ((N, K), dtype), ((N,), dtype), ((r, K), adapter_dtype), ((N, r), adapter_dtype)
    )]
    seen.clear()
    layer, y = Layer(*operands, 0.5), tfl.lora_linear(*operands, 0.5)
    layer.output().check(y.detach())
    forward = dict(seen)
    seen.clear()
    grad = torch.randn(M, N).to(dtype)
    exact = layer.gradients(grad)
    for name, found in zip(("x", "weight", "bias", "lora_A", "lora_B"), torch.autograd.grad(y, operands, grad)):
        exact[name].check(found, name)
    return forward, dict(seen)

torch.use_deterministic_algorithms(False)
half, wide = torch.float16, torch.float32
many, few = (70, 136, 200, 5, half, wide), (9, 136, 200, 5, half, half)
default = {shape: run(*shape) for shape in (many, few)}
def text(kernel, tile):
    return ",".join(f"{kernel}.{field}={number}" for field, number in tile._asdict().items())
def tune(shape, backward, overrides):
    M, K, N, r, *dtypes = shape
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return tuned_layers(-1).tune(tuned.Layer(backward, M, K, N, r, *names), overrides)
tiles = [(16, 64, 4, 3), (64, 256, 8, 1), (32, 128, 4, 2), (16, 128, 2, 3)]
product, expand, gradients, few_rows = (kernels.Tile(*tile) for tile in tiles)
assert tune(many, False, text("product", product) + "," + text("expand", expand)) is None
assert tune(many, True, text("gradients", gradients)) is None
assert tune(few, False, text("few_rows", few_rows)) is None
assert tune(few, True, "lora_linear.way=2") is None
forward, backward = run(*many)
assert forward == {"product": (5, 4, 3), "expand": (2, 8, 1)} != default[many][0], forward
assert backward["gradients"] == (2 + 2, 4, 2) != default[many][1]["gradients"], backward
assert backward["product"] == default[many][1]["product"]
assert run(*few) == ({"few_rows": (13, 2, 3)}, {}) != default[few]
for other in ((130, *many[1:]), (70, 128, *many[2:]), (*many[:2], 192, *many[3:]), (*many[:3], 6, half, wide)):
    forward, backward = run(*other)
    assert forward["expand"][1:] == default[many][0]["expand"][1:], other
    assert (5, 4, 3) not in (forward["product"], backward["product"])
halves = (*many[:4], half, half)
assert run(*halves)[0]["expand"] == default[many][0]["expand"]
assert tune(halves, False, "lora_linear.way=2") is tune(halves, True, "lora_linear.way=2") is None
assert run(*halves) == ({}, {})  # torch's own calls
torch.use_deterministic_algorithms(True)
assert {shape: run(*shape) for shape in (many, few)} == default
torch.use_deterministic_algorithms(False)

for wrong in (
    "product.rows=64", text("product", kernels.Tile(48, 128)), text("grid", product), "lora_linear.way=4", "way=1",
    "product.rows=064 ", text("gradients", product), "product.rows=-16", "lora_linear.way=1;product.rows=16",
):
    assert tune(many, False, wrong), wrong
    tune(many, False, "")
assert "half rows" in tuned_layers(-1).tune(tuned.Layer(False, 8, 8, 8, 8, "float64", "float64"), "lora_linear.way=2")
assert "half rows" in tuned_layers(-1).tune(tuned.Layer(False, 8, 8, 8, 8, "float16", "Tensor"), "lora_linear.way=2")
""")


@pytest.mark.parametrize("kernel", kernels.CANDIDATES)
def test_every_candidate_fits_the_smaller_cards(kernel, monkeypatch):
    """What may be read from a file: compiled, at the widest rank and operands, within what a block of an RTX 30 has."""
    default = kernels.tile
    for one in kernels.CANDIDATES[kernel]:
        monkeypatch.setattr(kernels, "tile", lambda name, *a, **k: one if name == kernel else default(name, *a, **k))  # noqa: B023
        kernels.parts_of.cache_clear()
        few = kernel == "few_rows"  # reads A itself where it is of the rows' dtype
        found = launches(16 if few else 4096, 64, torch.bfloat16 if few else torch.float32, 0.0, None)
        family = getattr(kernels, f"_{kernel}_kernel")
        launched, arguments, how = next(launch for launch in found if launch[0] is family)
        assert compiled_for(86, launched, arguments, how).metadata.shared <= 99 * 1024, one
    kernels.parts_of.cache_clear()


def test_what_can_be_tuned_is_what_is_launched():
    for M, r, early in (
        *((1, 16, False), (16, 64, False), (16, 65, False), (17, 16, False), (4096, 16, False)),
        *((17, 16, True), (65, 16, True)),
    ):
        for backward in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "begins_early", lambda _: early)  # noqa: B023
                ways, *tiles = kernels.candidates(backward, M, 4096, r, 0)
            assert ways == [{"lora_linear.way": 1}, {"lora_linear.way": 3}]
            found = {name.partition(".")[0] for candidate in tiles for one in candidate for name in one}
            launched = launches(M, r, torch.float32, 0.0, None, early=early)
            names = [launch[0].__name__ for launch in launched]
            split = names.index("_product_kernel", 1)  # the backward's first
            names = names[split:] if backward else names[:split]
            assert found == {name[1:].removesuffix("_kernel") for name in names} - ({"expand"} if backward else set())
            for one in itertools.chain.from_iterable(tiles):
                assert kernels.tiles_of(one) == ((next(iter(one)).partition(".")[0], kernels.Tile(*one.values())),)


def take_launches(patch):
    """From now on launches are not made but listed: kernel, arguments and how it is compiled."""
    found = []

    def take(self, tensors, numbers, options, launches):
        _, arguments, how = self.prepare(tensors, options)
        given = self._describe(*tensors, *options) if self._describe else tensors
        found.append((self._kernel, (*given, *numbers, *arguments), how))

    patch.setattr(launcher.Launcher, "__call__", take)
    return found


def launches(M, r, adapter_dtype, dropout_p, seed, carried=False, early=False):
    """What a forward and a backward of bfloat16 rows launch: kernel, arguments and how it is compiled."""
    x, W, bias, A, B, grad = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in (
            ((M, 4096), torch.bfloat16),
            ((4096, 4096), torch.bfloat16),
            ((4096,), torch.bfloat16),
            ((r, 4096), adapter_dtype),
            ((4096, r), adapter_dtype),
            ((M, 4096), torch.bfloat16),
        )
    )

    with pytest.MonkeyPatch.context() as patch:
        found = take_launches(patch)
        patch.setattr(kernels, "prepared", launcher.Prepared())
        patch.setattr(kernels, "carrying_rank", lambda *_: gluon if carried else None)
        for module in (launcher, kernels):
            patch.setattr(module, "begins_early", lambda _: early)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
        one = kernels.Dropout.of(slice(0, r), dropout_p, 0)
        dropouts = kernels.Dropouts.of((one,), seed) if dropout_p else kernels.NO_DROPOUTS
        _, h = kernels.forward(x, W, bias, A, B, 0.5, dropouts, True)
        kernels.backward(grad, W if carried else None, None, x, A, B, 0.5, h, True, True, dropouts)
    return found


def compiled_for(capability, kernel, arguments, how):
    """As Triton compiles it for a launch: pointers aligned, integers known to be 1 or a multiple of 16."""
    signature, constants, attributes = {}, {}, {}
    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8"}
    pointers |= {torch.float16: "*fp16", torch.int8: "*i8"}
    for parameter, value in zip(kernel.params, arguments, strict=True):
        is_tensor, known = isinstance(value, torch.Tensor), not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (known and type(value) is int and value == 1):
            constants[parameter.name], signature[parameter.name] = value, "constexpr"
            continue
        if isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<bf16{list(value.block_shape)},{value.layout!r}>".replace(
                ", ", ",", 1
            )
            continue
        signature[parameter.name] = pointers[value.dtype] if is_tensor else "fp32" if type(value) is float else "i32"
        if is_tensor or (known and type(value) is int and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)


SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB that a block may have


def check_compiled(capability, kernel, arguments, how):
    compiled = compiled_for(capability, kernel, arguments, how)
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= SHARED[capability] * 1024, kernel.__name__
    return compiled.asm["ptx"]


@pytest.mark.parametrize("capability", SHARED)
def test_triton_kernels_compile_for_an_nvidia_gpu(capability):
    """To machine code, without a GPU: within the shared memory that a card's blocks have, and reading 16 bytes at a
    time. A T4 (75) takes the composition: its matrix units multiply no bfloat16."""
    seed = torch.empty((), dtype=torch.int64, device="meta") if capability == 90 else 2**40 + 5
    early = capability >= 90
    few, *_ = launches(8, 16, torch.bfloat16, 0.0, None, early=early)
    beside = [launches(M, 16, torch.float32, 0.0, None, early=early)[1] for M in (8, 64)]  # h's launch
    for kernel, arguments, how in (few, *beside, *launches(4096, 64, torch.float32, 0.1, seed, early=early)):
        ptx = check_compiled(capability, kernel, arguments, how)
        assert ("griddepcontrol.wait" in ptx) == early, kernel.__name__
        if kernel is not kernels._expand_kernel:  # it reads little
            assert "cp.async.cg.shared.global" in ptx, kernel.__name__


@pytest.mark.parametrize("capability", [75, *SHARED])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16])
def test_a_mask_compiles_for_any_card(monkeypatch, capability, dtype):
    """That of the composition, which a T4 takes as well."""
    found = take_launches(monkeypatch)
    dropout.mask(5, 0, 8, 0.1, 64, 4096, torch.device("meta"), dtype)
    compiled = compiled_for(capability, *found[0])
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared == 0


@pytest.mark.parametrize(
    ("rows", "r", "adapter_dtype", "dropout_p"),
    [(4096, 64, torch.float32, 0.1), (4096, 16, torch.float32, 0.1), (512, 16, torch.bfloat16, 0.0)],
)
def test_what_the_base_product_carries_compiles_for_hopper(rows, r, adapter_dtype, dropout_p):
    """With wide tiles and narrow ones: on its matrix units, which read what the copy engine has brought."""
    product, augment, carrying = kernels._product_kernel, gluon._augment_kernel, gluon._carrying_kernel
    found = launches(rows, r, adapter_dtype, dropout_p, 5, carried=True, early=True)
    kinds = [kernel for kernel, *_ in found]
    assert kinds == [product, augment, carrying, product, augment, carrying, kernels._gradients_kernel]
    for kernel, arguments, how in found:
        ptx = check_compiled(90, kernel, arguments, how)
        assert "griddepcontrol.wait" in ptx, kernel.__name__
        if kernel is carrying:
            columns = arguments[4].block_shape[1]
            assert columns == (256 if rows == 4096 else 128)
            assert f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16" in ptx
            assert "cp.async.bulk.tensor.2d.shared" in ptx


def test_what_is_launched():
    """Forward and backward: products of the rank's order, and one launch for all that is made of z."""
    product, expand, gradients = kernels._product_kernel, kernels._expand_kernel, kernels._gradients_kernel
    few_rows, wide, half = kernels._few_rows_kernel, torch.float32, torch.bfloat16
    for operands, early, expected in (
        ((512, 16, wide, 0.1, 5), False, [product, expand, product, gradients]),
        ((16, 16, half, 0.0, 5), False, [few_rows, product, gradients]),
        ((16, 16, wide, 0.0, 5), False, [product, few_rows, product, gradients]),
        ((64, 16, wide, 0.0, 5), False, [product, expand, product, gradients]),
        ((64, 16, wide, 0.0, 5), True, [product, few_rows, product, gradients]),
        ((64, 16, half, 0.0, 5), True, [product, few_rows, product, gradients]),
        ((64, 16, wide, 0.1, 5), True, [product, expand, product, gradients]),
        ((65, 16, wide, 0.0, 5), True, [product, expand, product, gradients]),
    ):
        found = launches(*operands, early=early)
        assert [kernel for kernel, _, _ in found] == expected, operands
        assert all(how.get("launch_pdl", False) == early for *_, how in found)


def test_narrow_operands():
    """The product of what a base product carries is that of the adapters, and the bias, as far as `triton._dot` is, or
    for a half adapter to one rounding of h; nothing of it is left as it was allocated."""
    interpret("""
from tests.reference import UNIT
from torch_fused_lora.ops.lora_linear import gluon
M, N, half = 100, 72, torch.bfloat16
for adapter_dtype, has_bias, parts, turned, r in (
    (torch.float32, False, 2, True, 16),
    (torch.float32, True, 4, True, 5),
    (torch.float32, False, 2, False, 3),
    (half, True, 1, True, 70),
    (half, False, 1, False, 16),
):
    terms = 3 if adapter_dtype == torch.float32 else 1
    width = -(-(terms * r + has_bias) // 8) * 8
    found, bias = torch.randn(parts * M, r), torch.randn(N).to(half) if has_bias else None
    adapter = torch.randn((N, r) if turned else (r, N)).to(adapter_dtype)
    u, v = torch.empty(M, width, dtype=half), torch.empty((N, width) if turned else (width, N), dtype=half)
    assert u.isnan().all() and v.isnan().all()
    gluon._launch_augment((u, v, found, adapter, bias, found, None), (0.5,), (parts, terms, width, turned), {})
    a, b = found[:M].double(), adapter.double().T if turned else adapter.double()  # its first part has become their sum
    exact, magnitude = 0.5 * a @ b, 0.5 * a.abs() @ b.abs()
    if has_bias:
        exact += bias.double()
    error = (u.double() @ (v.double().T if turned else v.double()) - exact).abs()
    unit = 2 * UNIT[half]  # the interpreter cuts off
    assert (error <= (3 * unit**2 * (1 + unit) if terms == 3 else unit) * magnitude).all()
""")


def test_what_carries_the_rank_wants_hopper_and_a_tested_triton(monkeypatch):
    release = launcher.triton.__version__.rpartition(".")[0]
    for capability, tested, expected in (((9, 0), release, gluon), ((9, 0), "3.0", None), ((10, 0), release, None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(launcher, "TESTED", (tested,))
        ways._gluon_kernels.cache_clear()
        assert ways._gluon_kernels(0) is expected
    ways._gluon_kernels.cache_clear()


FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("shape", "dtype", "adapter_dtype", "drops", "capability", "expected"),
    [
        ((16, 4096, 4096), BFLOAT16, BFLOAT16, False, (8, 0), ways.BY_TRITON),
        ((17, 4096, 4096), BFLOAT16, BFLOAT16, False, (9, 0), ways.BY_TRITON),
        ((17, 4096, 4096), BFLOAT16, FLOAT32, False, (8, 0), ways.BY_TRITON),
        ((17, 4096, 4096), FLOAT16, FLOAT16, True, (8, 0), ways.BY_TRITON),
        ((17, 4092, 4096), FLOAT16, FLOAT16, True, (8, 0), ways.WHOLE),  # half a counter
        ((17, 4096, 4096), FLOAT16, FLOAT32, False, (7, 5), ways.WHOLE),
        ((17, 4096, 4096), FLOAT16, FLOAT16, False, (7, 5), ways.WHOLE),
        ((4096, 4096, 4096), FLOAT16, FLOAT16, False, (8, 0), ways.BY_TRITON),
        ((0, 4096, 4096), FLOAT16, FLOAT16, False, (8, 0), ways.WHOLE),  # no grid is empty
        ((4096, 4096, 4096), FLOAT32, FLOAT32, False, (9, 0), ways.WHOLE),
        ((64, 4096, 4096), FLOAT32, BFLOAT16, False, (9, 0), ways.WHOLE),  # the gradient of a wider y
        ((8192, 4092, 4096), FLOAT16, FLOAT16, True, (8, 0), ways.BLOCKS),
    ],
)
def test_which_way_rows_take_on_a_card(monkeypatch, shape, dtype, adapter_dtype, drops, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    untuned = SimpleNamespace(of=lambda *_: SimpleNamespace(way=0))
    monkeypatch.setattr(ways, "tuned_layers", lambda _: untuned)
    monkeypatch.setattr(launcher, "TESTED", (launcher.triton.__version__.rpartition(".")[0],))
    ways.has_kernels.cache_clear()
    ways._gluon_kernels.cache_clear()

    def on_card(shape, dtype):
        where = {"is_cpu": False, "is_cuda": True, "device": SimpleNamespace(type="cuda"), "get_device": lambda: 0}
        tensor = SimpleNamespace(shape=shape, dtype=dtype, **where)
        tensor.dim, tensor.numel = lambda: len(shape), lambda: math.prod(shape)
        tensor.float = lambda: on_card(shape, FLOAT32)
        return tensor

    M, K, N = shape
    operands = on_card((1, M, K), dtype), on_card((4, K), adapter_dtype), on_card((N, 4), adapter_dtype)
    way, *adapters = ways.choose(*operands, drops)
    assert way is expected
    if way is not ways.BY_TRITON:
        met_in = dtype if dtype is adapter_dtype and not drops else FLOAT32
        assert [adapter.dtype for adapter in adapters] == [met_in] * 2
    ways.has_kernels.cache_clear()
    ways._gluon_kernels.cache_clear()


@pytest.mark.parametrize(
    ("M", "N", "columns", "fills"),
    [
        (4096, 4096, 256, True),
        (1024, 4096, 256, True),
        (512, 4096, 128, True),
        (4096, 5632, 128, True),
        (512, 2048, 128, False),
        (4096, 256, 128, False),
    ],
)
def test_tiles_fill_an_h100(monkeypatch, M, N, columns, fills):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    assert (gluon._tile(M, N, 0)[0], gluon.fills.__wrapped__(M, N, 0)) == (columns, fills)


def test_an_old_card_takes_the_composition(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == 0 else (8, 0))
    ways.has_kernels.cache_clear()
    assert [ways.has_kernels(device) for device in (-1, 0, 1)] == [True, False, True]
    ways.has_kernels.cache_clear()


def test_packed_words():
    """Few rows in one pass with the low-rank term, and dequantised blocks: ragged tiles, every layout."""
    interpret("""
from tests.operators.test_lora_linear import laid_out
from tests.operators.test_quantized import call
from tests.reference import QuantizedLayer
from torch_fused_lora.affine import quantize
from torch_fused_lora.ops.lora_linear_quantized import portable, triton as quantized
launched = []
for name in ("product", "dequantize"):
    def counting(*arguments, name=name, kernel=getattr(quantized, name)):
        launched.append(name)
        return kernel(*arguments)
    setattr(quantized, name, counting)
portable._BLOCK = 64 * 40
half, wide = torch.float16, torch.float32
for bits, group_size, M, (K, N, r), dtype, adapter_dtype, scale_dtype, layout in (
    (4, 64, 1, (320, 37, 4), half, wide, half, "contiguous"),
    (8, 32, 16, (96, 16, 20), half, wide, torch.bfloat16, "transposed"),
    (4, 32, 2, (96, 90, 3), wide, wide, half, "contiguous"),
    (4, 128, 5, (384, 20, 1), half, half, wide, "strided"),
    (4, 32, 3, (32, 3, 0), half, None, wide, "offset"),
    (8, 64, 17, (64, 90, 3), half, wide, half, "contiguous"),
):
    packed = quantize((torch.randn(N, K) * K**-0.5).to(scale_dtype), bits, group_size)
    x, bias = laid_out((M, K), dtype, layout), torch.randn(N).to(dtype)
    A, B = (laid_out(s, adapter_dtype, layout) for s in ((r, K), (N, r))) if r else (None, None)
    leaves = [t.requires_grad_() for t in (x, bias, A, B) if t is not None]
    for scaling in (0.5, torch.tensor(0.5)) if r else (1.0,):
        launched.clear()
        y = call(x, packed, bias, A, B, scaling)
        few = M <= 16 and dtype == half
        assert launched == ["product"] if few else set(launched) == {"dequantize"} and len(launched) > 1, launched
        adapter = (A, B, 0.5) if r else (x.new_zeros(1, K), x.new_zeros(N, 1), 0.0)
        layer = QuantizedLayer.of(x, packed, bias, *adapter)
        layer.output().check(y.detach())
        grad = torch.randn(M, N).to(dtype)
        for name, found in zip(("x", "bias", "lora_A", "lora_B"), torch.autograd.grad(y, leaves, grad)):
            layer.gradients(grad)[name].check(found, name)
    for to in (half, wide):
        assert torch.equal(quantized.dequantize(packed, to), packed.dequantize(to))
""")


@pytest.mark.parametrize(("bits", "adapters"), [(4, True), (8, False)])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_of_packed_words_compile_for_an_nvidia_gpu(capability, rows, bits, adapters):
    N, K, half = 4096, 4096, torch.bfloat16
    words = torch.empty(N, K * bits // 32, dtype=torch.int32, device="meta")
    scales = torch.empty(N, K // 64, dtype=half, device="meta")
    packed = Packed(words, scales, scales, bits, 64)
    x, bias = torch.empty(rows, K, dtype=half, device="meta"), torch.empty(N, dtype=half, device="meta")
    A, B = torch.empty(16, K, device="meta"), torch.empty(N, 16, device="meta")
    adapter = (bias, A, B, 0.5, True) if adapters else (None, None, None, 1.0, False)
    with pytest.MonkeyPatch.context() as patch:
        found = take_launches(patch)
        quantized.product(x, packed, *adapter)
        quantized.dequantize(packed, half)
    for kernel, arguments, how in found:
        check_compiled(capability, kernel, arguments, how)


def test_a_launcher_compiles_once_for_a_key_and_launches_on_the_tensors_device(monkeypatch):
    """With a driver and a kernel that only take notes."""
    current, notes, hooked = [0], [], [False]

    class Device:
        def __init__(self, device):
            self.index = device

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    class Kernel:
        function = packed_metadata = None

        def __getitem__(self, grid):
            return lambda *arguments: notes.append(("compiled", current[0], grid, arguments)) or self

        def run(self, *arguments):
            notes.append(("launched", current[0], arguments[:3], arguments[9:]))

    target = SimpleNamespace(backend="cuda")
    driver = SimpleNamespace(
        get_current_device=lambda: current[0],
        get_current_stream=lambda device: 7,
        get_current_target=lambda: target,
    )
    monkeypatch.setattr(launcher, "JITFunction", Kernel)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(launcher.torch, "get_device_module", lambda _: SimpleNamespace(device=Device))
    monkeypatch.setattr(launcher, "_hooked", lambda: hooked[0])
    grid = (1, 2, 3)
    launch = launcher.Launcher(Kernel(), lambda *tensors_and_options: (grid, (9,), {}))

    def tensor(device, offset=0):
        how = {"device": device, "dtype": torch.half, "shape": (3,), "stride": lambda: (1,)}
        return SimpleNamespace(get_device=lambda: device, data_ptr=lambda: 256 + offset, **how)

    kinds = launcher.Prepared()

    def call(x, other, options, key):
        launches = kinds.setdefault((x.get_device(), options, key, launcher.kind(x), launcher.kind(other)), {})
        launch((x, other), (5,), (options,), launches)

    expected = []
    for options, key, device, offset, how in (
        ("a", "k", 0, 0, "compiled"),
        ("a", "k", 0, 32, "launched"),
        ("b", "k", 0, 0, "compiled"),
        ("a", "l", 0, 0, "compiled"),
        ("a", "k", 1, 0, "compiled"),
        ("a", "k", 1, 0, "launched"),
        ("a", "k", 0, 2, "compiled"),
        ("a", "k", 0, 2, "launched"),
        ("b", "k", 0, 0, "launched"),
    ):
        x = tensor(device, offset)
        call(x, None, options, key)
        pointer = x.data_ptr() if how == "launched" else x
        expected.append((how, device, grid, (pointer, None, 5, 9)))
    call(x, x, "b", "k")  # none is missing
    expected.append(("compiled", 0, grid, (x, x, 5, 9)))
    hooked[0] = True  # a profiler sees them by the long way
    call(x, None, "a", "k")
    assert notes == [*expected, ("compiled", 0, grid, (x, None, 5, 9))]
    assert current == [0]
    hooked[0], target.backend = False, "hip"  # Triton launches, every time
    notes.clear()
    for _ in range(2):
        call(x, None, "a", "another")
    assert [how for how, *_ in notes] == ["compiled"] * 2


def test_a_bias_of_any_stride_over_packed_words():
    interpret("""
from tests.operators.test_quantized import call
from torch_fused_lora.affine import quantize
packed, x = quantize(torch.randn(40, 128), 4, 64), torch.randn(3, 128).half()
for bias in (torch.randn(80).half()[::2], torch.randn(1).half().expand(40)):
    found, expected = (call(x, packed, b, None, None) for b in (bias, bias.clone().contiguous()))
    assert torch.equal(found, expected)
""")
