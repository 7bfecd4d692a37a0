"""tfl.check_peft: it finds what is off, and nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import torch_fused_lora as tfl
from torch_fused_lora import peft as tfl_peft
from torch_fused_lora.decide import DISABLED


class Base(nn.Linear):
    """Not exactly an nn.Linear: it is called."""


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.plain, self.called = nn.Linear(24, 40, dtype=dtype), Base(40, 24, dtype=dtype)

    def forward(self, x):
        return self.called(torch.tanh(self.plain(x)))


PLAIN, CALLED = "base_model.model.plain", "base_model.model.called"


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["plain", "called"], init_lora_weights=False, lora_dropout=0.5, **options)
    model = get_peft_model(Net(dtype), config).train()
    tfl.patch_peft(model)
    return model


def inputs(dtype=torch.float32):
    return torch.randn(3, 7, 24).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_is_within_its_bound(dtype, capsys):
    model = build(dtype)
    report = tfl.check_peft(model, inputs(dtype))
    assert report.ok
    assert list(report) == [PLAIN, CALLED]
    assert all(set(check.errors) == {"y", "x", "default.lora_A", "default.lora_B"} for check in report.values())
    assert "2 layers both ways, 0 off" in capsys.readouterr().out
    if dtype in (torch.bfloat16, torch.float16):  # whose roundings show, and are not lost in the bound
        assert report[PLAIN].errors["x"] > 0.01


def test_on_mps(mps):
    assert tfl.check_peft(build().to(mps), inputs().to(mps)).ok


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert tfl.check_peft(build(), inputs()).ok


@pytest.mark.parametrize(("operator", "name"), [("lora_linear_stacked", PLAIN), ("lora_delta_stacked", CALLED)])
@pytest.mark.parametrize("factor", [1.0 + 2e-4, float("nan")])
def test_what_is_off_is_found(operator, name, factor, monkeypatch):
    model = build(lora_bias=True)
    real = getattr(tfl_peft, operator)
    monkeypatch.setattr(tfl_peft, operator, lambda *arguments: real(*arguments) * factor)
    report = tfl.check_peft(model, inputs())
    assert [layer for layer, check in report.items() if not check.ok] == [name]
    assert not report.ok
    assert f"off: {name}" in str(report)


def test_a_wrong_gradient_is_found(monkeypatch):
    model = build()
    real = tfl_peft.lora_linear_stacked
    monkeypatch.setattr(tfl_peft, "lora_linear_stacked", lambda x, *arguments: real(x + (x - x.detach()), *arguments))
    errors = tfl.check_peft(model, inputs())[PLAIN].errors
    assert errors["x"] > 1
    assert all(error <= 1 for name, error in errors.items() if name != "x")


def test_nothing_is_left_changed():
    model = build()
    report = tfl.patch_peft(model)
    tfl.check_peft(model, inputs())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert [(calls.fused, calls.declined) for calls in report.calls().values()] == [(1, 0)] * 2  # the model's own call


def test_layers_that_run_pefts_own_forward_say_so():
    model = build()
    with model.disable_adapter():
        report = tfl.check_peft(model, inputs())
    assert report.ok
    assert all(check.reason == DISABLED for check in report.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", ["by module", "by layer", "layerwise casting"])
def test_over_weights_that_hooks_bring(offload, dtype):
    model = build(dtype)
    if offload != "layerwise casting":
        whole = ["Linear"] if offload == "by layer" else None
        pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"), preload_module_classes=whole)
    else:
        pytest.importorskip("diffusers.hooks").apply_layerwise_casting(model, torch.float8_e4m3fn, dtype)
    report = tfl.check_peft(model, inputs(dtype))
    assert report.ok
    assert all({"y", "x"} <= check.errors.keys() for check in report.values())


def test_a_base_that_draws_random_numbers_draws_the_same():
    model = build()
    base = model.base_model.model.called.base_layer
    base.forward = lambda x: F.dropout(Base.forward(base, x), 0.5)
    assert tfl.check_peft(model, inputs()).ok


@pytest.mark.parametrize("compiled", [PLAIN, ""])
def test_what_is_compiled_is_checked_eagerly(compiled):
    model = build(torch.bfloat16)
    model.get_submodule(compiled).compile(backend="eager")
    model(inputs(torch.bfloat16))
    assert tfl.check_peft(model, inputs(torch.bfloat16))[PLAIN].errors["x"] > 0.01


def test_an_x_that_is_not_floating_has_no_gradient():
    model = build()
    layer = model.base_model.model.called
    layer.base_layer.forward = lambda x: x[..., :24].float()
    assert tfl.check_peft(layer, torch.ones(3, 40, dtype=torch.int64))[""].reason == "x is torch.int64"


def test_a_model_that_is_not_patched_is_refused():
    model = build()
    tfl.unpatch_peft(model)
    with pytest.raises(ValueError, match=r"model: expected one that torch_fused_lora\.patch_peft has patched"):
        tfl.check_peft(model, inputs())
