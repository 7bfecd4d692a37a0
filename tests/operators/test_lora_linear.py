"""Numbers: the operator's output and gradients against float64, over shapes, layouts, dtypes and subsets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import torch_fused_lora as tfl
from tests.budget import examples
from tests.reference import MIXED, Layer
from torch_fused_lora.ops.dropout import draw_seed
from torch_fused_lora.ops.lora_linear import differentiable, portable, ways
from torch_fused_lora.ops.lora_linear.operator import lora_linear_stacked
from torch_fused_lora.ops.rows import HALF

NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "scaling")
DTYPES = [(torch.float64, torch.float64), *MIXED]
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")


def laid_out(shape, dtype: torch.dtype, layout: str, scale: float = 1.0, device="cpu") -> torch.Tensor:
    """Random values of a shape, in memory as a user's views may be."""

    def randn(*sizes: int) -> torch.Tensor:
        return (torch.randn(sizes) * scale).to(device, dtype)

    if layout == "transposed" and len(shape) >= 2:
        return randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "strided" and shape:
        return randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "offset" and shape:
        return randn(*shape[:-1], shape[-1] + 3)[..., 3:]
    if layout == "expanded" and len(shape) >= 2:
        return randn(shape[-1]).expand(shape)
    return randn(*shape)


def seeded_masks(seed: int, x: torch.Tensor, ranks: list[int], dropout_p: list[float]):
    """Draw as the next call of the operator will after manual_seed(seed); returns `Layer.masks`."""
    torch.manual_seed(seed)
    drawn = draw_seed(x) if any(dropout_p) else None
    torch.manual_seed(seed)
    masks, start = [], 0
    for stream, (rank, p) in enumerate(zip(ranks, dropout_p, strict=True)):
        mask = None
        if p:
            rows, columns = x[..., 0].numel(), x.shape[-1]
            keep = torch.ops.torch_fused_lora.dropout_mask(drawn, stream, rows, columns, p, x.device)
            mask = keep.cpu().double() / (1 - p)
        masks.append((slice(start, start + rank), mask))
        start += rank
    return masks


def test_output_and_gradients(device):
    on_cpu = device.type == "cpu"

    @settings(max_examples=examples(150 if on_cpu else 40))
    @given(
        lead=st.sampled_from([(), (1,), (7,), (33,), (0,), (2, 3), (2, 0, 3), (2, 1, 2, 5)]),
        sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 3, 8, 17])),
        dtypes=st.sampled_from(DTYPES if on_cpu else DTYPES[1:]),
        layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
        has_bias=st.booleans(),
        scaling=st.sampled_from([0.0, 1.0, -0.37, 2.0]),
        scaling_on=st.sampled_from([None, "cpu", device]),
        dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
        needs=st.lists(st.booleans(), min_size=6, max_size=6),
    )
    def check(lead, sizes, dtypes, layouts, has_bias, scaling, scaling_on, dropout_p, needs):
        K, N, r = sizes
        dtype, adapter_dtype = dtypes
        torch.manual_seed(K * 100 + N)
        operands = {
            "x": laid_out((*lead, K), dtype, layouts[0], device=device),
            "weight": laid_out((N, K), dtype, layouts[1], K**-0.5, device),
            "bias": laid_out((N,), dtype, "offset", device=device) if has_bias else None,
            "lora_A": laid_out((r, K), adapter_dtype, layouts[2], K**-0.5, device),
            "lora_B": laid_out((N, r), adapter_dtype, layouts[3], device=device),
            "scaling": scaling,
        }
        if scaling_on is not None:
            wide = torch.promote_types(dtype, torch.float32)
            operands["scaling"] = torch.tensor(scaling, dtype=wide, device=scaling_on)
        wanted = [
            name for name, need in zip(NAMES, needs, strict=True) if need and isinstance(operands[name], torch.Tensor)
        ]
        for name in wanted:
            operands[name].requires_grad_()
        masks = seeded_masks(5, operands["x"], [r], [dropout_p])
        # float32 holds what the layer sees of a float scaling
        exact_scaling = scaling if dtype == torch.float64 else float(torch.tensor(scaling))
        layer = Layer(*[operands[name] for name in NAMES[:5]], exact_scaling, masks)

        y = tfl.lora_linear(*operands.values(), dropout_p=dropout_p, training=True)
        assert (y.dtype, y.device.type) == (dtype, device.type)
        assert y.is_contiguous()
        layer.output().check(y.detach())
        assert y.requires_grad == bool(wanted)
        if wanted:
            grad = laid_out(tuple(y.shape), dtype, layouts[0], device=device)
            found = torch.autograd.grad(y, [operands[name] for name in wanted], grad)
            exact = layer.gradients(grad)
            for name, g in zip(wanted, found, strict=True):
                assert (g.dtype, g.device) == (operands[name].dtype, operands[name].device)
                exact[name].check(g, name)

    check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_a_scaling_that_is_no_number(device, dtype, adapter_dtype, as_tensor, value):
    """As in PEFT: it multiplies the low-rank term. torch's addmm takes an alpha of NaN for 0, at some sizes."""
    if device.type == "mps" and dtype == torch.float64:
        pytest.skip("mps has no float64")
    wide = torch.promote_types(dtype, torch.float32)
    scaling = torch.tensor(value, dtype=wide, device=device) if as_tensor else value
    for M, K, N in ((1, 8, 6), (64, 8, 64), (200, 8, 300)):
        shapes = ((M, K), dtype), ((N, K), dtype), ((4, K), adapter_dtype), ((N, 4), adapter_dtype)
        x, W, A, B = (torch.rand(shape).to(device, its).requires_grad_() for shape, its in shapes)
        y = tfl.lora_linear(x, W, None, A, B, scaling)
        assert y.isnan().all() if math.isnan(value) else (y == math.inf).all()
        assert not any(g.isfinite().any() for g in torch.autograd.grad(y.sum(), (x, A, B)))


class HalfProducts(TorchDispatchMode):
    """The operands of half products, each a matrix that is packed by rows or by columns; how many there were."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            for matrix in args[-2:]:
                if matrix.dtype in HALF:
                    self.seen += 1
                    assert matrix.is_contiguous() or matrix.t().is_contiguous(), (function, matrix.stride())
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lead", [(17,), (1, 31), (2, 31)])
@pytest.mark.parametrize("dropouts", [(), (0.5, 0.0)])
def test_half_rows_with_gaps_are_packed_for_a_cpu(lead, adapter_dtype, dropouts):
    """torch's product by AMX reads into the gaps, where the operands' neighbours are NaN here."""
    padded = lambda *shape, dtype=torch.bfloat16: (  # noqa: E731
        torch.full([n + 3 for n in shape], float("nan"), dtype=dtype)[tuple(slice(1, n + 1) for n in shape)].copy_(
            torch.randn(shape)
        )
    )
    x, weight, grad = padded(*lead, 7), padded(10, 7), padded(*lead, 10)
    lora_A, lora_B = padded(4, 7, dtype=adapter_dtype), padded(10, 4, dtype=adapter_dtype)
    scaling, seed = torch.tensor(0.5), torch.tensor(7) if dropouts else None
    dropout = seed, dropouts, (1, 3) if dropouts else ()
    needs = (True, True, True, True, True, False)
    for forward, backward in (
        (portable.forward, portable.backward),
        (differentiable.forward, lambda grad, *rest: differentiable.backward(grad, None, *rest)),
    ):
        with HalfProducts() as products:
            y, h = forward(x, weight, None, lora_A, lora_B, scaling, *dropout, True)
            found = backward(grad, x, weight, lora_A, lora_B, scaling, h, *dropout, needs)
        assert products.seen >= 6
        assert all(t.isfinite().all() for t in (y, *found[:5]))


def check_layer(sizes, device, dtype, adapter_dtype, dropout_p):
    rows, K, N, r = sizes
    A, B = torch.randn(r, K).to(device, adapter_dtype), torch.randn(N, r).to(device, adapter_dtype)
    x = torch.randn(rows, K).to(device, dtype).requires_grad_()
    W, b = (torch.randn(N, K) * K**-0.5).to(device, dtype), torch.randn(N).to(device, dtype)
    A.requires_grad_(), B.requires_grad_()
    layer = Layer(x, W, b, A, B, 0.5, seeded_masks(3, x, [r], [dropout_p]))
    y = tfl.lora_linear(x, W, b, A, B, 0.5, dropout_p, training=True)
    layer.output().check(y.detach())
    grad = torch.randn(rows, N).to(device, dtype)
    found = dict(zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y, (x, A, B), grad), strict=True))
    for name, exact in layer.gradients(grad).items():
        if name in found:
            exact.check(found[name], name)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES[1:])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_many_row_blocks(device, dtype, adapter_dtype, dropout_p, small_blocks):
    """Nothing is lost or doubled at a seam."""
    check_layer(small_blocks, device, dtype, adapter_dtype, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(("multiplies", "adapter_dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_half_adapters_on_either_processor(monkeypatch, multiplies, adapter_dtype, dropout_p):
    """Where a CPU multiplies halves, rows meet half adapters as they are; elsewhere in float32."""
    monkeypatch.setattr(ways, "_multiplies", lambda dtype: multiplies)
    x, A, B = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((40, 24), (3, 24), (16, 3)))
    way, *adapters = ways.choose(x, A, B, dropout_p > 0)
    assert (way, *(adapter.dtype for adapter in adapters)) == (ways.WHOLE, adapter_dtype, adapter_dtype)
    check_layer((40, 24, 16, 3), torch.device("cpu"), torch.bfloat16, torch.bfloat16, dropout_p)


@pytest.mark.parametrize("dropout_p", [(), (0.3, 0.0, 0.6)])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES[:4])
def test_stacked_adapters(device, dtype, adapter_dtype, dropout_p):
    """Several adapters in one call, each with its rank and its own dropout, which on mps is a launch each."""
    if device.type != "cpu" and dtype == torch.float64:
        pytest.skip("mps has no float64")
    ranks, K, N = [2, 1, 4], 24, 10
    x = torch.randn(6, K).to(device, dtype).requires_grad_()
    W = torch.randn(N, K).to(device, dtype)
    A, B = (torch.randn(s).to(device, adapter_dtype).requires_grad_() for s in ((7, K), (N, 7)))
    masks = seeded_masks(1, x, ranks, list(dropout_p)) if dropout_p else [(slice(None), None)]
    launches = 1 if device.type == "cpu" else len(masks)
    layer = Layer(x, W, None, A, B, 1.0, masks, launches)
    y = lora_linear_stacked(x, W, None, A, B, 1.0, dropout_p, ranks)
    layer.output().check(y.detach())
    grad = torch.randn(6, N).to(device, dtype)
    exact = layer.gradients(grad)
    for name, g in zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y, (x, A, B), grad), strict=True):
        exact[name].check(g, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 700])
def test_rounds_where_peft_rounds(device, dtype, rows):
    """Over a half base, PEFT's two-rounding form element for element; one rounding would differ in many.

    Only where the float32 sums before the second rounding differ in their last bit may the results: those are
    ties of a 2**-13 neighbourhood, well under 1 % of elements, and then by one unit in the last place.
    """
    x, W, b = (torch.randn(s).to(dtype) for s in ((rows, 64), (48, 64), (48,)))
    A, B = torch.randn(8, 64), torch.randn(48, 8)
    base = F.linear(x, W, b)
    two_roundings = (base + F.linear(F.linear(x.float(), A), B) * 0.3).to(dtype)
    one_rounding = (F.linear(x.float(), W.float(), b.float()) + F.linear(F.linear(x.float(), A), B) * 0.3).to(dtype)
    y = tfl.lora_linear(*(t.to(device) for t in (x, W, b, A, B)), 0.3).cpu()
    # lora_decode, for few rows on mps, holds the base product in float32: it rounds once.
    same, other = two_roundings, one_rounding
    if device.type == "mps" and rows <= 8:
        same, other = other, same
    assert (y != same).float().mean() < 0.01
    assert (y != other).float().mean() > 0.05


def test_scaling_changes_live(device):
    x, W, A, B = (torch.randn(s).to(device) for s in ((2, 4), (3, 4), (2, 4), (3, 2)))
    base = F.linear(x, W)
    delta = tfl.lora_linear(x, W, None, A, B, 1.0) - base
    for scaling in (2.0, 2, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), torch.tensor(2.0).bfloat16()):
        torch.testing.assert_close(tfl.lora_linear(x, W, None, A, B, scaling), base + 2 * delta)


def test_float64_scaling_is_not_rounded_to_float32():
    x, W, A, B = (torch.randn(s, dtype=torch.float64) for s in ((2, 4), (3, 4), (2, 4), (3, 2)))
    Layer(x, W, None, A, B, 1 / 3).output().check(tfl.lora_linear(x, W, None, A, B, 1 / 3))


@pytest.mark.parametrize(("K", "N"), [(0, 3), (4, 0)])
def test_empty_dimensions(device, K, N):
    x, W, b, A, B = (torch.randn(s, device=device, requires_grad=True) for s in ((2, K), (N, K), (N,), (2, K), (N, 2)))
    scaling = torch.tensor(1.0, requires_grad=True)
    y = tfl.lora_linear(x, W, b, A, B, scaling)
    torch.testing.assert_close(y.detach(), b.expand(2, N))
    y.sum().backward()
    for leaf, gradient in ((x, 0), (W, 0), (b, 2), (A, 0), (B, 0), (scaling, 0)):
        assert torch.equal(leaf.grad, torch.full_like(leaf, gradient))


class AllocationsOf(TorchDispatchMode):
    """Collects the aten calls that return fresh memory of at least ``elements`` elements."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.found = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in storages:
            self.found += [str(func)] if out.numel() >= self.elements else []
        return out


def test_no_full_width_temporary():
    """Beyond the output nothing of M x K or M x N is allocated: mixed dtypes and dropout go by blocks of rows."""
    M, K, N, r = 140_000, 64, 48, 4  # more than four blocks
    x, W, A, B = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(r, K), torch.randn(N, r)
    s, h, seed, grad = torch.tensor(1.0), torch.randn(M, r), torch.tensor(3), torch.randn(M, N).bfloat16()
    with AllocationsOf(M * min(K, N)) as forward:
        portable.forward(x, W, None, A, B, s, seed, (0.5,), (), True)
    with AllocationsOf(M * min(K, N)) as backward:
        portable.backward(grad, x, W, A, B, s, h, seed, (0.5,), (), (True, False, False, True, True, False))
    assert len(forward.found) == 1, forward.found  # y
    assert len(backward.found) == 1, backward.found  # dx


def test_in_place_use_of_the_output(device):
    x, W, A, B = (torch.randn(s, device=device, requires_grad=True) for s in ((2, 3, 4), (5, 4), (2, 4), (5, 2)))
    expected = torch.autograd.grad(tfl.lora_linear(x, W, None, A, B).relu().sum(), x)
    y = tfl.lora_linear(x, W, None, A, B)
    assert not y._is_view()
    torch.testing.assert_close(torch.autograd.grad(y.relu_().sum(), x), expected)
