"""lora_linear_quantized and quantized_linear on device mps: against float64 within a single rounding, and what is
dispatched and allocated."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

import torch_fused_lora as tfl
from tests.emulator.mps_on_linux import counters, reset_counters
from tests.operators import families
from tests.operators.test_lora_linear import laid_out, seeded_masks
from tests.reference import MIXED, Exact, Layer, dequantized, with_table
from torch_fused_lora.affine import GROUP_SIZES, SCALE_DTYPES, Packed, quantize
from torch_fused_lora.mps import extension
from torch_fused_lora.ops.lora_linear_quantized.operator import lora_linear_quantized_stacked

pytestmark = pytest.mark.usefixtures("mps")
on_the_emulator = pytest.mark.skipif(sys.platform != "linux", reason="only the emulator counts dispatches")
NAMES = ("x", "bias", "lora_A", "lora_B", "scaling")
NF4 = "NF4"  # as the bits of a format


def operands(lead, K, N, r, its_format=(4, 64, torch.float16), dtypes=(torch.float32,) * 2, layout="contiguous"):
    """x, the packed weight, bias, lora_A, lora_B; all that is differentiable asks for its gradient."""
    bits, group_size, scale_dtype = its_format
    if bits == NF4:
        packed = with_table(N, K, group_size, K**-0.5)
    else:
        packed = quantize((torch.randn(N, K) * K**-0.5).to(scale_dtype), bits, group_size)
    shapes = ((*lead, K), dtypes[0]), ((N,), dtypes[0]), ((r, K), dtypes[1]), ((N, r), dtypes[1])
    x, *others = (laid_out(shape, dtype, layout).to("mps").requires_grad_() for shape, dtype in shapes)
    return x, Packed(*(t.to("mps") for t in packed[:3]), packed.bits, group_size), *others


class Fused(Layer):
    """A `Layer` whose result and whose dx are rounded once; so are h and z before, where the adapters are half."""

    @classmethod
    def over(cls, x, packed: Packed, *others, **options) -> Fused:
        return cls(x, dequantized(packed)[0], *others, **options)

    def output(self) -> Exact:
        return dataclasses.replace(super().output(), rounded=self._if_half(self.low_rank()[1]).view(self.shape(0)))

    def gradients(self, grad):
        found = super().gradients(grad)
        magnitude = self._low_rank_gradients(grad.cpu().double().reshape(-1, grad.shape[-1]))[1]
        return found | {"x": dataclasses.replace(found["x"], rounded=self._if_half(magnitude).view(self.x.shape))}

    def shape(self, side: int) -> tuple[int, ...]:
        return (*self.x.shape[:-1], self.weight.shape[side])


CASES = [
    ((), (64, 5, 2), (4, 64, torch.float32), (torch.float32, torch.float32), "contiguous"),
    ((3,), (128, 70, 8), (8, 32, torch.float16), (torch.float16, torch.float16), "strided"),
    ((2, 20), (256, 33, 17), (4, 128, torch.bfloat16), (torch.bfloat16, torch.float32), "transposed"),
    ((70,), (96, 130, 3), (4, 32, torch.float16), (torch.float16, torch.float32), "offset"),
    ((2, 3, 5), (128, 40, 300), (8, 128, torch.float32), (torch.bfloat16, torch.bfloat16), "expanded"),
    ((3,), (192, 70, 8), (NF4, 64, torch.float32), (torch.bfloat16, torch.float32), "contiguous"),
    ((20,), (96, 33, 5), (NF4, 32, torch.float32), (torch.float16, torch.float16), "strided"),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("lead", "sizes", "its_format", "dtypes", "layout"), CASES)
def test_output_and_gradients(lead, sizes, its_format, layout, dtypes, dropout_p):
    x, packed, bias, A, B = operands(lead, *sizes, its_format, dtypes, layout)
    masks, scaling = seeded_masks(3, x, [len(A)], [dropout_p]), torch.tensor(0.7, requires_grad=True)
    layer = Fused.over(x, packed, bias, A, B, scaling.item(), masks)
    words, scales, biases, bits, group_size = packed
    options = {"bits": bits, "group_size": group_size}
    y = tfl.lora_linear_quantized(
        x, words, scales, biases, bias, A, B, scaling, dropout_p=dropout_p, training=True, **options
    )
    layer.output().check(y.detach())
    grad = laid_out(tuple(y.shape), y.dtype, layout).to("mps")
    for name, found in zip(NAMES, torch.autograd.grad(y, (x, bias, A, B, scaling), grad), strict=True):
        layer.gradients(grad)[name].check(found, name)
    y = tfl.quantized_linear(x, words, scales, biases, bias, **options)
    base = Fused.over(x, packed, bias, A, B, 0.0)
    base.output().check(y.detach())
    for name, found in zip(NAMES[:2], torch.autograd.grad(y, (x, bias), grad), strict=True):
        base.gradients(grad)[name].check(found, name)


@pytest.mark.parametrize(("group_size", "scale_dtype"), list(zip(GROUP_SIZES, SCALE_DTYPES, strict=True)))
@pytest.mark.parametrize(("M", "bits"), [(2, 4), (12, 8)])
def test_every_format(M, bits, group_size, scale_dtype):
    x, packed, bias, A, B = operands((M,), 256, 20, 4, (bits, group_size, scale_dtype))
    y = lora_linear_quantized_stacked(x, packed, bias, A, B, 0.5)
    Fused.over(x, packed, bias, A, B, 0.5).output().check(y.detach())


@pytest.mark.parametrize("dtypes", MIXED[1::2])
def test_adapters_that_drop_apart(dtypes):
    """In backward lora_delta adds each, and rounds: the bound is that of a plain base."""
    ranks, dropout_p = [2, 1, 4], [0.3, 0.0, 0.6]
    x, packed, bias, A, B = operands((12,), 128, 40, 7, dtypes=dtypes)
    masks = seeded_masks(1, x, ranks, dropout_p)
    y = lora_linear_quantized_stacked(x, packed, bias, A, B, 1.0, tuple(dropout_p), tuple(ranks))
    layer = Fused.over(x, packed, bias, A, B, 1.0, masks, launches=3)
    layer.output().check(y.detach())
    grad = torch.randn(y.shape).to(y.dtype).to("mps")
    exact = layer.gradients(grad) | {"x": super(Fused, layer).gradients(grad)["x"]}
    for name, found in zip(NAMES[:4], torch.autograd.grad(y, (x, bias, A, B), grad), strict=True):
        exact[name].check(found, name)


def counted(run):
    """What one call does once its kernels are compiled."""
    run()
    torch.mps.synchronize()
    reset_counters()
    kept = run()
    found = counters()
    del kept
    return found


@pytest.mark.parametrize("M", [2, 12])
def test_bytes_that_begin_within_a_word(M):
    """As a checkpoint's may: the kernels read whole words."""
    x, packed, bias, A, B = operands((M,), 128, 20, 4, (NF4, 64, torch.float32))
    moved = torch.cat([torch.zeros(3, dtype=torch.uint8, device="mps"), packed.words.flatten()])[3:]
    packed = packed._replace(words=moved.view(20, 64))
    assert packed.words.storage_offset() == 3
    y = lora_linear_quantized_stacked(x, packed, bias, A, B, 0.5)
    Fused.over(x, packed, bias, A, B, 0.5).output().check(y.detach())


@on_the_emulator
@pytest.mark.parametrize(("M", "K", "expected"), [(1, 64, 1), (2, 512, 1), (8, 1024, 2)])
def test_few_rows_are_one_dispatch_or_two(M, K, expected):
    """In two, h is in one of its own, where all threadgroups reading A again would take longer."""
    x, packed, bias, A, B = operands((M,), K, 640, 16)
    with torch.no_grad():
        seen = counted(lambda: lora_linear_quantized_stacked(x, packed, bias, A, B, 0.5))
    assert families(seen.dispatches) == {"lora_decode": expected}
    assert (seen.fallbacks, seen.command_blocks, seen.synchronisations, seen.commits) == ({}, 1, 0, 0)
    assert seen.allocations == expected  # y, and h between the two
    with torch.no_grad():
        seen = counted(lambda: tfl.quantized_linear(x, *packed[:3], bias))
    assert families(seen.dispatches) == {"lora_decode": 1}
    assert (seen.fallbacks, seen.allocations) == ({}, 1)


@on_the_emulator
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_many_rows_and_backward(dropout_p):
    """Nothing of torch's but the bias's gradient, and nothing of W's size is allocated."""
    x, packed, bias, A, B = operands((40,), 256, 512, 8)
    bias.requires_grad_(False)
    made = [None]

    def forward():
        made[0] = lora_linear_quantized_stacked(x, packed, bias, A, B, 0.5, (dropout_p,))
        return made[0]

    seen = counted(forward)
    assert families(seen.dispatches) == {"lora_delta": 2, "lora_gemm": 1}
    assert (seen.fallbacks, seen.allocations, seen.synchronisations, seen.commits) == ({}, 3, 0, 0)  # y, h, h's parts
    before = counters().live_bytes
    grad = torch.ones_like(made[0])
    seen = counted(lambda: torch.autograd.grad(made[0], (x, A, B), grad, retain_graph=True))
    assert families(seen.dispatches) == {"lora_delta": 2, "lora_gemm": 1, "lora_grad": 1}  # a long sum
    assert (seen.fallbacks, seen.synchronisations, seen.commits) == ({}, 0, 0)
    assert seen.peak_bytes - before < packed.scales.numel() * 64 * 4  # W as float32


@on_the_emulator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_plain_half_base_goes_the_same_way_by_override(dtype):
    x, _, bias, A, B = operands((40,), 128, 70, 8, dtypes=(dtype, torch.float32))
    weight = (torch.randn(70, 128) / 8).to(dtype).to("mps")
    layer = Fused(x, weight, bias, A, B, 0.5)
    cores = torch.backends.mps.get_core_count()
    configure = lambda text: extension.library.tfl_configure(cores, b"the emulator", text)  # noqa: E731
    assert configure(b"lora_gemm.plain=1") is None
    try:
        run = lambda: tfl.lora_linear(x, weight, bias, A, B, 0.5)  # noqa: E731
        assert families(counted(run).dispatches) == {"lora_delta": 2, "lora_gemm": 1}
        y = run()
        layer.output().check(y.detach())
        grad = torch.randn(40, 70).to(dtype).to("mps")
        for name, found in zip(NAMES[:4], torch.autograd.grad(y, (x, bias, A, B), grad), strict=True):
            layer.gradients(grad)[name].check(found, name)
    finally:
        configure(b"")


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_compute(rows):
    x, packed, bias, A, B = operands((rows,), 64, 0 if rows else 5, 2)
    y = lora_linear_quantized_stacked(x, packed, bias, A, B, 0.5)
    assert y.shape == (rows, 0 if rows else 5)
    for found, like in zip(torch.autograd.grad(y.sum(), (x, A, B)), (x, A, B), strict=True):
        assert found.shape == like.shape
        assert not found.any()


WITH_TABLE = {"weight": torch.zeros(5, 32, dtype=torch.uint8), "scales": torch.ones(5, 1), "biases": torch.zeros(16)}
REFUSED = {
    "bits: expected 4 or 8, got 3": {"bits": 3},
    "group_size: expected 32, 64 or 128, got 16": {"group_size": 16},
    "weight: expected shape .* torch.uint32, contiguous, on mps": {"weight": torch.zeros(5, 8, dtype=torch.int32)},
    "scales: expected shape .5, 1., float16": {"scales": torch.zeros(5, 2)},
    "biases: expected scales's shape, dtype and device": {"biases": torch.zeros(5, 1)},
    "x: expected shape .*64., since weight is .5, 64.": {"x": torch.zeros(3, 65)},
    "bias: expected shape .5,., x's dtype": {"bias": torch.zeros(4)},
    "lora_A, lora_B: expected both or neither": {"lora_B": None},
    "bits: expected 4, got 8": WITH_TABLE | {"bits": 8},
    "weight: expected shape .N, K / 2.*K a multiple of 64": WITH_TABLE | {"weight": WITH_TABLE["weight"][:, 1:]},
    "scales: expected shape .5, 1., torch.float32": WITH_TABLE | {"scales": torch.ones(5, 1).half()},
    "biases: expected a table of shape .16,., scales's dtype": WITH_TABLE | {"biases": torch.zeros(5, 1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_kernel_refuses(message):
    """Of callers that go by the dispatcher; the public function has said so before."""
    x, (words, scales, biases, bits, group_size), bias, A, B = operands((3,), 64, 5, 2)
    arguments = {"x": x, "weight": words, "scales": scales, "biases": biases, "bias": bias, "lora_A": A, "lora_B": B}
    changed = {name: t.to("mps") if isinstance(t, torch.Tensor) else t for name, t in REFUSED[message].items()}
    arguments |= {"scaling": torch.tensor(1.0), "seed": None, "dropout_p": (), "ranks": (), "bits": bits}
    arguments |= {"group_size": group_size, "save_h": False}
    arguments |= changed
    forward = torch.ops.torch_fused_lora.lora_linear_quantized_forward.default
    with torch._C._AutoDispatchBelowAutograd(), pytest.raises(RuntimeError, match=f"lora_linear_quantized: {message}"):
        forward(*arguments.values())
