"""The Triton kernels of `ops/lora_linear/triton.py` without a GPU."""

from __future__ import annotations

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

from torch_fused_lora.ops import launcher  # noqa: E402
from torch_fused_lora.ops.lora_linear import triton as kernels  # noqa: E402
from torch_fused_lora.ops.lora_linear import ways  # noqa: E402

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
    added, *grads = kernels.backward(grad, torch.zeros(N, K, dtype=dtype), x, A, B, 0.5, h, True, True)
    written, *again = kernels.backward(grad, None, x, A, B, 0.5, h, True, True)
    assert torch.equal(added, written) and all(map(torch.equal, grads, again))
    *none, alone = kernels.backward(grad, None, None, A, B, 0.5, h, False, True)
    assert none == [None, None]
    Exact(grad.double().T @ h.double() / 2, grad.double().abs().T @ h.double().abs() / 2, M).check(alone)

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


def launches(M, r, adapter_dtype, dropout_p, seed):
    """What a forward and a backward of bfloat16 rows launch: kernel, arguments and how it is compiled."""
    x, W, A, B, grad = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in (
            ((M, 4096), torch.bfloat16),
            ((4096, 4096), torch.bfloat16),
            ((r, 4096), adapter_dtype),
            ((4096, r), adapter_dtype),
            ((M, 4096), torch.bfloat16),
        )
    )
    found = []

    def take(self, tensors, numbers, options, key):
        _, arguments, how = self._prepare(*tensors, *options)
        found.append((self._kernel, (*tensors, *numbers, *arguments), how))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.Launcher, "__call__", take)
        dropouts = [kernels.Dropout(slice(0, r), dropout_p, seed, 0)] if dropout_p else []
        _, h = kernels.forward(x, W, None, A, B, 0.5, dropouts, True)
        kernels.backward(grad, None, x, A, B, 0.5, h, True, True, dropouts)
    return found


def compiled_for(capability, kernel, arguments, how):
    """As Triton compiles it for a launch: pointers aligned, integers known to be 1 or a multiple of 16."""
    signature, constants, attributes = {}, {}, {}
    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
    for parameter, value in zip(kernel.params, arguments, strict=True):
        is_tensor, known = isinstance(value, torch.Tensor), not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (known and type(value) is int and value == 1):
            constants[parameter.name], signature[parameter.name] = value, "constexpr"
            continue
        signature[parameter.name] = pointers[value.dtype] if is_tensor else "fp32" if type(value) is float else "i32"
        if is_tensor or (known and type(value) is int and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)


@pytest.mark.parametrize(("capability", "shared"), [(80, 163), (86, 99), (89, 99), (90, 227)])
def test_triton_kernels_compile_for_an_nvidia_gpu(capability, shared):
    """To machine code, without a GPU: within the shared memory that a card's blocks have, and reading 16 bytes at a
    time. A T4 (75) takes the composition: its matrix units multiply no bfloat16."""
    seed = torch.empty((), dtype=torch.int64, device="meta") if capability == 90 else 2**40 + 5
    few, *_ = launches(8, 16, torch.bfloat16, 0.0, None)
    for kernel, arguments, how in (few, *launches(4096, 64, torch.float32, 0.1, seed)):
        compiled = compiled_for(capability, kernel, arguments, how)
        assert len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared <= shared * 1024, kernel.__name__
        if kernel is not kernels._expand_kernel:  # it reads little
            assert "cp.async.cg.shared.global" in compiled.asm["ptx"], kernel.__name__


def test_what_is_launched():
    """Forward and backward: products of the rank's order, and one launch for all that is made of z."""
    product, expand, gradients = kernels._product_kernel, kernels._expand_kernel, kernels._gradients_kernel
    for operands, expected in (
        ((512, 16, torch.float32, 0.1, 5), [product, expand, product, gradients]),
        ((16, 16, torch.bfloat16, 0.0, 5), [kernels._few_rows_kernel, product, gradients]),
        ((16, 16, torch.float32, 0.0, 5), [product, kernels._few_rows_kernel, product, gradients]),
    ):
        assert [kernel for kernel, _, _ in launches(*operands)] == expected


def test_an_old_card_takes_the_composition(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == 0 else (8, 0))
    ways._has_kernels.cache_clear()
    assert [ways._has_kernels(device) for device in (-1, 0, 1)] == [True, False, True]
    ways._has_kernels.cache_clear()


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

    driver = SimpleNamespace(get_current_device=lambda: current[0], get_current_stream=lambda device: 7)
    monkeypatch.setattr(launcher, "JITFunction", Kernel)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(launcher.torch.cuda, "device", Device)
    monkeypatch.setattr(launcher, "_hooked", lambda: hooked[0])
    grid = (1, 2, 3)
    launch = launcher.Launcher(Kernel(), lambda *tensors_and_options: (grid, (9,), {}))

    def tensor(device, offset=0):
        return SimpleNamespace(get_device=lambda: device, data_ptr=lambda: 256 + offset)

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
        launch((x, None), (5,), (options,), (key,))
        pointer = x.data_ptr() if how == "launched" else x
        expected.append((how, device, grid, (pointer, None, 5, 9)))
    launch((x, x), (5,), ("b",), ("k",))  # none is missing
    expected.append(("compiled", 0, grid, (x, x, 5, 9)))
    hooked[0] = True  # a profiler sees them by the long way
    launch((x, None), (5,), ("a",), ("k",))
    assert notes == [*expected, ("compiled", 0, grid, (x, None, 5, 9))]
    assert current == [0]
