"""LoRALinear: LoRA without PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_fused_lora as tfl


@pytest.fixture(autouse=True)
def _on(device):
    """Everything made in a test is on the device, as after torch.set_default_device."""
    with device:
        yield


def layer(dtype=torch.float32, **options):
    found = tfl.LoRALinear.from_linear(nn.Linear(6, 5, dtype=dtype), **{"r": 2, "lora_alpha": 4} | options)
    nn.init.normal_(found.lora_B)
    return found


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("r", 1.5, "an int"),
        ("r", "a", "an int"),
        ("r", True, "an int"),
        ("lora_alpha", "16", "a number"),
        ("lora_dropout", None, "a number"),
    ],
)
def test_arguments_of_a_wrong_type(name, value, expected):
    for build in (lambda **options: tfl.LoRALinear(6, 5, **options), layer):
        with pytest.raises(TypeError, match=f"{name}: expected {expected}, got {value!r}"):
            build(**{name: value})


@pytest.mark.parametrize("lora_alpha", [float("nan"), float("inf")])
def test_merging_an_alpha_that_is_no_number(lora_alpha):
    merged = tfl.LoRALinear.from_linear(nn.Linear(64, 64), lora_alpha=lora_alpha)
    nn.init.normal_(merged.lora_B)
    merged.merge()
    assert not merged.weight.isfinite().any()


def test_a_new_layer_computes_what_its_base_did():
    linear = nn.Linear(6, 5)
    x = torch.randn(9, 6)  # from nine rows on, every device leaves the base product to torch
    expected = linear(x)
    fresh = tfl.LoRALinear.from_linear(linear, r=16, lora_alpha=32, lora_dropout=0.05)
    assert torch.equal(fresh.eval()(x), expected)
    assert fresh.weight is linear.weight
    assert not fresh.weight.requires_grad
    assert not fresh.bias.requires_grad
    assert fresh.scaling == 2.0
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_forward_is_the_formula():
    found, x = layer(), torch.randn(4, 6)
    expected = F.linear(x, found.weight, found.bias) + 2.0 * x @ found.lora_A.T @ found.lora_B.T
    torch.testing.assert_close(found(x), expected)


def test_training_trains_the_adapter_only():
    found = layer(lora_dropout=0.3)
    found(torch.randn(4, 6)).sum().backward()
    assert found.weight.grad is None
    assert found.lora_A.grad is not None
    assert found.lora_B.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    found = layer(dtype).eval()
    x, weight = torch.randn(4, 6).to(dtype), found.weight.detach().clone()
    expected = found(x)
    found.merge()
    found.merge()
    assert found.merged
    unit = torch.finfo(dtype).eps
    scale = float((x.abs().float() @ found.weight.abs().float().T).max()) + float(expected.abs().max())
    torch.testing.assert_close(found(x), expected, rtol=0, atol=4 * unit * scale)
    found.unmerge()
    found.unmerge()
    assert not found.merged
    largest = float(weight.abs().max() + (2 * found.lora_B @ found.lora_A).abs().max())
    torch.testing.assert_close(found.weight.detach(), weight, rtol=0, atol=2 * unit * largest)


def test_a_merged_layer_never_saves_or_loads_its_adapter_twice():
    found, x = layer().eval(), torch.randn(3, 6)
    expected, weight = found(x), found.weight.detach().clone()
    found.merge()
    state = copy.deepcopy(found.state_dict())
    assert list(state) == ["weight", "bias", "lora_A", "lora_B"]
    torch.testing.assert_close(state["weight"], weight)
    other = tfl.LoRALinear(6, 5, r=2, lora_alpha=4).eval()
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), expected)
    found.load_state_dict(state)
    assert not found.merged
    torch.testing.assert_close(found(x), expected)
    found.merge()
    found.load_state_dict({"lora_B": torch.zeros(5, 2)}, strict=False)  # the base survives a partial load
    torch.testing.assert_close(found(x), F.linear(x, weight, found.bias))


def test_half_base_has_float32_adapters():
    found = layer(torch.bfloat16)
    assert found.lora_A.dtype == found.lora_B.dtype == torch.float32
    assert found(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    assert layer(torch.bfloat16, adapter_dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16


def test_repr_and_deepcopy():
    found = layer(lora_dropout=0.1)
    assert repr(found) == ("LoRALinear(in_features=6, out_features=5, bias=True, r=2, lora_alpha=4, lora_dropout=0.1)")
    found.merge()
    assert repr(found).endswith("merged)")
    twin = copy.deepcopy(found)
    x = torch.randn(2, 6)
    torch.testing.assert_close(twin(x), found(x))


def test_without_bias_on_meta_and_through_the_constructor():
    found = tfl.LoRALinear(6, 5, r=3, bias=False, device="meta", dtype=torch.bfloat16)
    assert found.bias is None
    assert found(torch.empty(2, 6, device="meta", dtype=torch.bfloat16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"), [({"r": 0}, "rank of at least 1"), ({"lora_dropout": 1.0}, r"probability in \[0, 1\)")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_from_something_else():
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got Conv1d"):
        tfl.LoRALinear.from_linear(nn.Conv1d(1, 1, 1))
