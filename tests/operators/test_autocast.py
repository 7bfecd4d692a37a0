"""Autocast: everything is cast to its dtype, inner products included, as PEFT's separate linears are."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

import torch_fused_lora as tfl
from tests.reference import Layer

op = torch.ops.torch_fused_lora.lora_linear


def operands(base=torch.float32, needs=False, device="cpu"):
    shapes = {"x": (6, 8), "weight": (5, 8), "bias": (5,), "lora_A": (2, 8), "lora_B": (5, 2)}
    return {
        name: torch.randn(s).to(device, torch.float32 if "lora" in name else base).requires_grad_(needs)
        for name, s in shapes.items()
    }


def plain(x, weight, bias, lora_A, lora_B, scaling):
    result = F.linear(x, weight, bias)
    return result + F.linear(F.linear(x, lora_A), lora_B) * scaling


@pytest.mark.parametrize(
    ("base", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("call", [tfl.lora_linear, op], ids=["function", "operator"])
def test_autocast(device, call, base, dtype):
    """Within the roundings of a layer all of whose operands are of autocast's dtype, and close to stock PEFT's."""
    a = operands(base, needs=True, device=device)
    with torch.autocast(device.type, dtype):
        y = call(*a.values(), torch.tensor(0.5))
        stock = plain(*a.values(), 0.5)
    assert y.dtype == stock.dtype == dtype
    cast = {name: t.detach().to(dtype) for name, t in a.items()}
    layer = Layer(*cast.values(), 0.5)
    layer.output().check(y.detach())
    torch.testing.assert_close(y, stock, rtol=0.02, atol=0.1)

    grad = torch.randn(6, 5).to(device, dtype)
    found = torch.autograd.grad(y, list(a.values()), grad)
    exact = layer.gradients(grad)
    for (name, leaf), g in zip(a.items(), found, strict=True):
        assert g.dtype == leaf.dtype
        exact[name].check(g.to(dtype), name)  # exact: a float32 leaf gets the half gradient widened


@pytest.mark.parametrize("keep", [True, False], ids=["keep_operators", "by itself"])
def test_compiled_calls_agree(device, keep):
    a = operands(device=device)
    a["x"] = a["x"].bfloat16()  # what the layer before it made there

    def layer(*arguments):
        with torch.autocast(device.type, torch.bfloat16):
            return tfl.lora_linear(*arguments, 0.5)

    for backend in ("aot_eager", "inductor")[: 2 if device.type == "cpu" else 1]:  # the emulator has no inductor
        with tfl.keep_operators() if keep else contextlib.nullcontext():
            compiled = torch.compile(layer, backend=backend, fullgraph=True)(*a.values())
        assert compiled.dtype == torch.bfloat16
        if keep:
            torch.testing.assert_close(compiled, layer(*a.values()))
        else:  # torch's own calls round h and the term
            torch.testing.assert_close(compiled, layer(*a.values()), rtol=0.02, atol=0.1)


def test_backward_inside_autocast_keeps_its_dtypes(device):
    """Calling backward() within the autocast region must not cast the backward's own products."""
    a = operands(needs=True, device=device)
    outside = torch.autograd.grad(tfl.lora_linear(*a.values()).sum(), list(a.values()))
    y = tfl.lora_linear(*a.values()).sum()
    with torch.autocast(device.type, torch.bfloat16):
        inside = torch.autograd.grad(y, list(a.values()))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_double_backward_inside_autocast(device):
    a = operands(needs=True, device=device)

    def second_order(autocast):
        y = tfl.lora_linear(*a.values()).sin().sum()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            (first,) = torch.autograd.grad(y, a["lora_A"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), a["x"])[0]

    torch.testing.assert_close(second_order(True), second_order(False), rtol=1e-5, atol=1e-5)


def test_disabled_autocast_changes_nothing(device):
    a = operands(device=device)
    with torch.autocast(device.type, enabled=False):
        assert torch.equal(tfl.lora_linear(*a.values()), tfl.lora_linear(*a.values()))
        assert tfl.lora_linear(*a.values()).dtype == torch.float32


def test_float64_is_left_alone():
    a = {name: t.double() for name, t in operands().items()}
    with torch.autocast("cpu"):
        assert tfl.lora_linear(*a.values()).dtype == torch.float64
