"""Layers that are left to autograd, as CUDA's are by default where they are torch's own calls: here on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_fused_lora as tfl
from tests.operators.test_lora_linear import laid_out
from tests.reference import HALF, Layer
from torch_fused_lora.bench.measure import saved_bytes
from torch_fused_lora.ops.lora_linear import portable, ways
from torch_fused_lora.ops.lora_linear.operator import _operator, lora_linear_stacked

DTYPES = [torch.float64, torch.float32, *HALF]


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    """The table's rule for CUDA, half adapters as they are, and no node of the operator."""

    def choose(rows, lora_A, lora_B, drops, **others):
        same = lora_A.dtype is rows.dtype and not drops
        return (ways.WHOLE, lora_A, lora_B) if same else ways.choose(rows, lora_A, lora_B, drops, **others)

    monkeypatch.setitem(ways.TABLE, "cpu", ways.Limits(block=1 << 21, follows=True))
    monkeypatch.setattr(portable, "choose", choose)


@pytest.fixture
def no_node(monkeypatch):
    monkeypatch.setattr(_operator, "_apply", None)


def operands(lead, dtype, layout="contiguous"):
    shapes = (*lead, 40), (24, 40), (24,), (5, 40), (24, 5)
    return [laid_out(shape, dtype, layout, 0.4).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (33,), (0,), (2, 3), (2, 1, 2, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("scaling", [1.0, -0.37])
def test_against_float64(dtype, lead, layout, scaling, no_node):
    leaves = operands(lead, dtype, layout)
    exact_scaling = scaling if dtype == torch.float64 else float(torch.tensor(scaling))
    layer = Layer(*leaves, exact_scaling, followed=True)
    y = tfl.lora_linear(*leaves, scaling)
    layer.output().check(y.detach())
    grad = torch.randn(y.shape).to(dtype)
    exact = layer.gradients(grad)
    for name, found in zip(
        ("x", "weight", "bias", "lora_A", "lora_B"), torch.autograd.grad(y, leaves, grad), strict=True
    ):
        exact[name].check(found, name)


def test_second_order(no_node):
    def layer(*leaves):
        return lora_linear_stacked(*leaves, -0.37)

    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,), (2, 4), (5, 2))
    ]
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


def test_what_the_operator_keeps_for_itself():
    x, W, b, A, B = leaves = operands((2, 20), torch.float32)
    assert portable.followed(*leaves, 0.5, None) is not None
    half = x.bfloat16(), W.bfloat16(), b.bfloat16()
    with torch.inference_mode():
        inference = torch.randn(2, 20, 40)
    for arguments in (
        (*half, A, B, 0.5, None),
        (*leaves, torch.tensor(0.5), None),
        (*leaves, float("nan"), None),
        (*leaves, 0.5, torch.tensor(1)),
        (inference, W, b, A, B, 0.5, None),
    ):
        assert portable.followed(*arguments) is None
    ways.TABLE["cpu"] = ways.Limits(block=1 << 21)
    assert portable.followed(*leaves, 0.5, None) is None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 24)

    def forward(self, x):
        return self.inner(x)


def models(**options):
    torch.manual_seed(0)
    stock = get_peft_model(Block(), LoraConfig(r=4, target_modules=["inner"], init_lora_weights=False))
    patched = copy.deepcopy(stock)
    return stock, patched, tfl.patch_peft(patched, **options)


def test_a_patched_layer_is_fused_and_keeps_no_more_than_stock(no_node):
    stock, patched, report = models()
    x = torch.randn(2, 30, 16, requires_grad=True)
    assert saved_bytes(lambda: patched(x)) <= saved_bytes(lambda: stock(x))
    assert [calls.fused for calls in report.calls().values()] == [1]
    (expected,) = torch.autograd.grad(stock(x).sin().sum(), x)
    for use_reentrant in (False, True):
        x.grad = None
        checkpoint(patched, x, use_reentrant=use_reentrant).sin().sum().backward()
        torch.testing.assert_close(x.grad, expected)


def test_an_input_that_does_not_fit_is_named(no_node):
    with pytest.raises(ValueError, match=r"lora_linear: x: expected shape \(\.\.\., 16\)"):
        models()[1](torch.randn(3, 15))


def test_an_input_changed_in_place(no_node):
    """The error is torch's own, which knows of no module; the remedy is the same."""
    stock, patched, _ = models()
    for model in (stock, patched):
        x = torch.randn(3, 16, requires_grad=True).clone()
        y = model(x)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    _, patched, _ = models(copy_input=True)
    x = torch.randn(3, 16, requires_grad=True).clone()
    y = patched(x)
    x.add_(1.0)
    y.sum().backward()


def test_in_place_use_of_the_output(no_node):
    leaves, added = operands((2, 3), torch.float32), torch.randn(24, requires_grad=True)
    expected = torch.autograd.grad((tfl.lora_linear(*leaves, 0.5) + added).relu().sum(), [*leaves, added])
    y = tfl.lora_linear(*leaves, 0.5)
    y += added
    torch.testing.assert_close(torch.autograd.grad(y.relu_().sum(), [*leaves, added]), expected, rtol=0, atol=0)
    with torch.no_grad():
        y = tfl.lora_linear(*leaves, 0.5)
    y += added  # which a view made under no_grad would refuse
    assert torch.equal(torch.autograd.grad(y.sum(), added)[0], torch.full((24,), 6.0))
