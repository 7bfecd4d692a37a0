"""The whole product in ten seconds: `make tiny`. What is shown here in passing, the other files test."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

import torch_fused_lora as tfl
from tests.reference import Layer

# Two float32 results, each of sums of up to 32 products that together stay below 2**8.
close = functools.partial(torch.testing.assert_close, rtol=0, atol=2 * 32 * 2.0**-24 * 2.0**8)


def tiny_model(dropout: float = 0.0) -> nn.Module:
    base = nn.Sequential(nn.Linear(16, 24), nn.RMSNorm(24), nn.Linear(24, 16))
    config = LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(base, config)


def test_the_operator(device):
    x, W, b, A, B = (torch.randn(shape).to(device) for shape in ((12, 16), (24, 16), (24,), (4, 16), (24, 4)))
    y = tfl.lora_linear(x, W, b, A, B, scaling=0.5)
    Layer(x, W, b, A, B, 0.5).output().check(y)  # against float64
    close(tfl.lora_delta(F.linear(x, W, b), x, A, B, scaling=0.5), y)  # after a base of any kind


def test_its_gradients():
    operands = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 5), (4, 5), (4,), (2, 5), (4, 2))]
    assert torch.autograd.gradcheck(lambda *a: tfl.lora_linear(*a, 0.5), operands)


def test_one_line_under_peft(device):
    model, x = tiny_model().to(device), torch.randn(5, 16).to(device)
    stock = model(x)
    report = tfl.patch_peft(model)
    assert len(report.patched) == 2
    close(model(x), stock)
    tfl.unpatch_peft(model)
    assert torch.equal(model(x), stock)


def test_training_with_dropout():
    model = tiny_model(dropout=0.1)
    tfl.patch_peft(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(32, 16), torch.randn(32, 16)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_norms_and_softmax():
    x, weight = torch.randn(6, 24), torch.randn(24)
    close(tfl.rms_norm(x, weight), F.rms_norm(x, (24,), weight, 1e-6))
    close(tfl.softmax(x), torch.softmax(x, -1))


def test_without_peft():
    layer = tfl.LoRALinear.from_linear(nn.Linear(16, 24), r=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 16)
    expected = layer(x)
    layer.merge()
    close(layer(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_an_export_needs_no_package():
    model, x = tiny_model().eval(), torch.randn(5, 16)
    tfl.patch_peft(model)
    graph = torch.export.export(model, (x,)).graph
    assert not [node for node in graph.nodes if "torch_fused_lora" in str(node.target)]
