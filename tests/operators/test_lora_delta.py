"""lora_delta: its numbers, what it leaves alone and what it keeps, its derivatives, who sees it, and its errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_fused_lora as tfl
from tests.budget import examples
from tests.operators.test_lora_linear import DTYPES as ADAPTERS
from tests.operators.test_lora_linear import LAYOUTS, AllocationsOf, laid_out, seeded_masks
from tests.reference import HALF, Delta
from torch_fused_lora.ops.lora_delta.operator import _LoRADelta, lora_delta_stacked
from torch_fused_lora.ops.lora_linear.ways import block_rows

ops = torch.ops.torch_fused_lora
NAMES = ("y", "x", "lora_A", "lora_B", "scaling")
# Of y, x and the adapters: y as x, or float32 over a half x.
WIDER = [(torch.float32, dtype, adapter_dtype) for dtype in HALF for adapter_dtype in (dtype, torch.float32)]
DTYPES = [*((dtype, dtype, adapter_dtype) for dtype, adapter_dtype in ADAPTERS), *WIDER]


def operands(dtypes=(torch.float32,) * 3, lead=(6,), sizes=(8, 5, 2), device="cpu", needs=True):
    """y, x, lora_A and lora_B for sizes K, N and r."""
    (K, N, r), (y_dtype, x_dtype, adapter_dtype) = sizes, dtypes
    shapes = ((*lead, N), y_dtype), ((*lead, K), x_dtype), ((r, K), adapter_dtype), ((N, r), adapter_dtype)
    return [torch.randn(shape).to(device, dtype).requires_grad_(needs) for shape, dtype in shapes]


def stock(y, x, lora_A, lora_B, scaling=1.0, dropout_p=0.0, training=False):
    """As PEFT adds an adapter's term."""
    h = F.linear(F.dropout(x.to(lora_A.dtype), dropout_p, training), lora_A)
    return (y + F.linear(h, lora_B) * scaling).to(y.dtype)


def skip_float64_on_mps(device, dtypes):
    if device.type == "mps" and torch.float64 in dtypes:
        pytest.skip("mps has no float64")


def check_call(exact: Delta, leaves: dict[str, torch.Tensor], found: torch.Tensor, grad: torch.Tensor) -> None:
    """A call's output and its gradients in ``leaves``, by their names, against float64."""
    exact.output().check(found.detach())
    gradients = torch.autograd.grad(found, list(leaves.values()), grad)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert (gradient.dtype, gradient.device) == (leaf.dtype, leaf.device)
        if name == "y":
            assert torch.equal(gradient, grad)
        else:
            exact.gradients(grad)[name].check(gradient, name)


# ------------------------------------------------------------------------------------------------------------- numbers


def test_output_and_gradients(device):
    on_cpu = device.type == "cpu"

    @settings(max_examples=examples(150 if on_cpu else 40))
    @given(
        lead=st.sampled_from([(), (1,), (7,), (33,), (0,), (2, 3), (2, 0, 3), (2, 1, 2, 5)]),
        sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 3, 8, 17])),
        dtypes=st.sampled_from(DTYPES if on_cpu else DTYPES[1:]),
        layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
        scaling=st.sampled_from([0.0, 1.0, -0.37, 2.0]),
        scaling_on=st.sampled_from([None, "cpu", device]),
        dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
        needs=st.lists(st.booleans(), min_size=5, max_size=5),
    )
    def check(lead, sizes, dtypes, layouts, scaling, scaling_on, dropout_p, needs):
        (K, N, r), (y_dtype, x_dtype, adapter_dtype) = sizes, dtypes
        torch.manual_seed(K * 100 + N)
        tensors = {
            "y": laid_out((*lead, N), y_dtype, layouts[0], device=device),
            "x": laid_out((*lead, K), x_dtype, layouts[1], device=device),
            "lora_A": laid_out((r, K), adapter_dtype, layouts[2], K**-0.5, device),
            "lora_B": laid_out((N, r), adapter_dtype, layouts[3], device=device),
        }
        wide = torch.promote_types(x_dtype, torch.float32)
        exact_scaling = float(torch.tensor(scaling, dtype=wide))  # float32 holds what the operator sees of a float
        exact = Delta(*tensors.values(), exact_scaling, seeded_masks(5, tensors["x"], [r], [dropout_p]))
        if scaling_on is not None:
            tensors["scaling"] = torch.tensor(scaling, dtype=wide, device=scaling_on)
        leaves = {name: t for (name, t), need in zip(tensors.items(), needs, strict=False) if need}
        for leaf in leaves.values():
            leaf.requires_grad_()

        before = tensors["y"].detach().clone()
        found = tfl.lora_delta(**{"scaling": scaling} | tensors, dropout_p=dropout_p, training=True)
        assert (found.dtype, found.device.type, found.requires_grad) == (y_dtype, device.type, bool(leaves))
        assert found.is_contiguous()
        assert not found._is_view()
        assert found.numel() == 0 or found.data_ptr() != tensors["y"].data_ptr()
        if leaves:
            check_call(exact, leaves, found, laid_out(tuple(found.shape), y_dtype, layouts[4], device=device))
        else:
            exact.output().check(found)
        assert torch.equal(tensors["y"].detach(), before)

    check()


@pytest.mark.parametrize("dtypes", DTYPES[1:])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_many_row_blocks(device, dtypes, dropout_p):
    """More rows than a block (of the portable kernels) or a tile (of Metal's) holds, and not a multiple of it:
    nothing is lost or doubled at a seam."""
    K, N, r = (1200, 200, 5) if device.type == "cpu" else (130, 70, 5)
    rows = 2 * block_rows(torch.empty(r, K), torch.empty(N, r)) + 17 if device.type == "cpu" else 1041
    tensors = operands(dtypes, (rows,), (K, N, r), device)
    exact = Delta(*tensors, 0.5, seeded_masks(3, tensors[1], [r], [dropout_p]))
    found = tfl.lora_delta(*tensors, 0.5, dropout_p, training=True)
    check_call(exact, dict(zip(NAMES, tensors, strict=False)), found, torch.randn(rows, N).to(found))


@pytest.mark.parametrize("dropout_p", [(), (0.3, 0.0, 0.6)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_stacked_adapters(device, dtypes, dropout_p):
    """Several adapters in one call, each with its rank and its own dropout, which on mps is a launch each."""
    skip_float64_on_mps(device, dtypes)
    ranks = [2, 1, 4]
    tensors = operands(dtypes, (6,), (24, 10, 7), device)
    masks = seeded_masks(1, tensors[1], ranks, list(dropout_p)) if dropout_p else [(slice(None), None)]
    exact = Delta(*tensors, 1.0, masks, 1 if device.type == "cpu" else len(masks))
    found = lora_delta_stacked(*tensors, 1.0, dropout_p, ranks)
    check_call(exact, dict(zip(NAMES, tensors, strict=False)), found, torch.randn(6, 10).to(found))


@pytest.mark.parametrize(
    ("lead", "sizes"), [((0,), (8, 5, 2)), ((2, 0, 3), (8, 5, 2)), ((3,), (0, 5, 2)), ((3,), (8, 0, 2))]
)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(device, dtypes, lead, sizes, dropout_p):
    """Without rows, columns of x or columns of y; with every gradient."""
    skip_float64_on_mps(device, dtypes)
    tensors = operands(dtypes, lead, sizes, device)
    scaling = torch.tensor(0.5, dtype=torch.promote_types(dtypes[1], torch.float32), requires_grad=True)
    found = tfl.lora_delta(*tensors, scaling, dropout_p, training=True)
    assert torch.equal(found, tensors[0])
    gradients = torch.autograd.grad(found, (*tensors, scaling), torch.ones_like(found))
    for leaf, gradient in zip((*tensors, scaling), gradients, strict=True):
        assert torch.equal(gradient, torch.full_like(leaf, leaf is tensors[0]))


@pytest.mark.parametrize("dtypes", [(half,) * 2 + (torch.float32,) for half in HALF])
@pytest.mark.parametrize("rows", [3, 700])
def test_the_sum_is_rounded_once(device, dtypes, rows):
    """Element for element but for ties of the float32 sums, which are few; to round the term first would show."""
    y, x, A, B = operands(dtypes, (rows,), (64, 48, 8), needs=False)
    term = F.linear(F.linear(x.float(), A), B) * 0.3
    found = tfl.lora_delta(*(t.to(device) for t in (y, x, A, B)), 0.3).cpu()
    assert (found != (y + term).to(y.dtype)).float().mean() < 0.01
    assert (found != y + term.to(y.dtype)).float().mean() > 0.05


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_scaling_that_is_no_number(device, dtypes, as_tensor, value):
    """It multiplies the low-rank term. torch's addmm takes an alpha of NaN for 0, at some sizes."""
    skip_float64_on_mps(device, dtypes)
    wide = torch.promote_types(dtypes[1], torch.float32)
    scaling = torch.tensor(value, dtype=wide, device=device) if as_tensor else value
    for rows, K, N in ((1, 8, 6), (200, 8, 300)):
        tensors = [t.detach().abs().requires_grad_() for t in operands(dtypes, (rows,), (K, N, 4), device)]
        found = tfl.lora_delta(*tensors, scaling)
        assert found.isnan().all() if math.isnan(value) else (found == math.inf).all()
        _, *others = torch.autograd.grad(found.sum(), tensors)
        assert not any(gradient.isfinite().any() for gradient in others)


def test_scaling_changes_live(device):
    y, *rest = operands(device=device, needs=False)
    term = tfl.lora_delta(y, *rest) - y
    for scaling in (2.0, 2, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), torch.tensor(2.0).bfloat16()):
        torch.testing.assert_close(tfl.lora_delta(y, *rest, scaling), y + 2 * term)


def test_float64_scaling_is_not_rounded_to_float32():
    tensors = operands((torch.float64,) * 3, needs=False)
    Delta(*tensors, 1 / 3).output().check(tfl.lora_delta(*tensors, 1 / 3))
