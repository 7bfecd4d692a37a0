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

# The interpreter multiplies no bfloat16: float16, and a plain product.
INTERPRETED = """
import torch
from torch_fused_lora.ops.lora_linear import triton as kernels, ways
ways.TABLE['cpu'], ways.FEW = ways.Limits(block=1 << 21, triton=True), 0
tl = kernels.tl
kernels._dot = lambda a, b, total: tl.dot(a.to(tl.float32), b.to(tl.float32), total)
"""


def interpret(script: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED + script], check=True, cwd=ROOT, env=environment)


def test_triton_kernels():
    """What an NVIDIA GPU does with many half rows and float32 adapters, executed by Triton's interpreter on the CPU
    (test_cuda.py does it on a GPU): ragged blocks, several blocks of rank, strided operands."""
    interpret("""
from tests.reference import Layer
from tests.operators.test_lora_linear import laid_out
import torch_fused_lora as tfl
from torch_fused_lora.ops.dropout.operator import draw_seed, gpu_mask
from torch_fused_lora.ops.lora_linear.operator import lora_linear_stacked
for M, K, N, r, dtype, layout in (
    (70, 130, 200, 5, torch.float16, "contiguous"),
    (600, 96, 80, 70, torch.float16, "strided"),
    (1, 7, 3, 1, torch.float16, "transposed"),
):
    operands = [laid_out(s, t, layout).requires_grad_() for s, t in (
        ((M, K), dtype), ((N, K), dtype), ((N,), dtype), ((r, K), torch.float32), ((N, r), torch.float32)
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

# Dropout in registers: of one adapter, of several, some of which drop nothing.
for M, K, N, ranks, dropouts, dtype, adapter_dtype in (
    (70, 136, 200, (5,), (0.3,), torch.float16, torch.float32),
    (600, 96, 80, (3, 2, 4), (0.6, 0.0, 0.1), torch.float16, torch.float16),
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
def test_kernels_of_packed_words_compile_for_an_nvidia_gpu(bits, adapters):
    from torch_fused_lora.ops.lora_linear_quantized import triton as kernels

    halves = dict.fromkeys(("out", "rows", "scales", "biases", "bias"), "*bf16")
    types = halves | {"words": "*u8", "h": "*fp32", "lora_B": "*fp32", "scaling": "fp32"}
    tiles = {"BITS": bits, "GROUP": 64, "BLOCK_N": 32, "BLOCK_K": 256}
    for kernel in (kernels._product_kernel, kernels._dequantize_kernel):
        constants = tiles if adapters else tiles | {"bias": None, "h": None, "lora_B": None}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert len(compiled.asm["cubin"]) > 0


@pytest.mark.parametrize("seed", [None, "*i64"])
def test_triton_kernels_compile_for_an_nvidia_gpu(seed):
    """To machine code for Hopper, without one; with the seed as a number and as a tensor of the device."""
    kernels, target = lora_triton(), GPUTarget("cuda", 90, 32)
    number = {"seed": None} if seed is None else {}
    tensors = {} if seed is None else {"seed": seed}
    tiles = {"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_C": 128, "BLOCK_R": 16, "TRANSPOSED": False, "DROPS": True}
    scales = {"scale": "fp32", "scale_2": "fp32"}
    for name, types in (
        ("_product_kernel", {"out": "*fp32", "rows": "*bf16", "small": "*fp32"}),
        ("_accumulate_kernel", {"out": "*fp16", "a": "*fp32", "b": "*fp32"}),
        ("_accumulate_kernel", {"out": "*fp32", "a": "*fp32", "b": "*bf16"}),
        ("_sums_kernel", {"out": "*fp32", "small": "*fp32", "rows": "*bf16", "small_2": "*fp32", "rows_2": "*bf16"}),
    ):
        kernel = getattr(kernels, name)
        constants = {key: value for key, value in (tiles | number).items() if key in kernel.arg_names}
        types = {key: value for key, value in (types | tensors | scales).items() if key in kernel.arg_names}
        signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=target)
        assert len(compiled.asm["cubin"]) > 0


def lora_triton():
    from torch_fused_lora.ops.lora_linear import triton as kernels

    return kernels


def test_a_launcher_compiles_once_for_a_key_and_launches_on_the_tensors_device(monkeypatch):
    """With a driver and a kernel that only take notes."""
    from torch_fused_lora.ops import launcher

    current, notes, hooked = [0], [], [False]

    class Device:
        def __init__(self, device):
            self.index = device.index

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
    launch, grid = launcher.Launcher(Kernel()), (1, 2, 3)
    expected = []
    for key, index, how in (
        ("a", 0, "compiled"),
        ("a", 0, "launched"),
        ("b", 0, "compiled"),
        ("a", 1, "compiled"),
        ("a", 1, "launched"),
        ("b", 0, "launched"),
    ):
        launch(torch.device("cuda", index), grid, key, "x", 5)
        expected.append((how, index, grid, ("x", 5)))
    hooked[0] = True  # a profiler sees them by the long way
    launch(torch.device("cuda", 0), grid, "a", "x", 5)
    assert notes == [*expected, ("compiled", 0, grid, ("x", 5))]
    assert current == [0]
