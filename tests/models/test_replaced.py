"""What somebody replaced for the whole process is called, as stock calls it; TORCH_FUSED_LORA=off patches nothing."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.export import export
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import torch_fused_lora as tfl
from torch_fused_lora import originals


def lora_model(base=None, dropout=0.5, **options):
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout, **options)
    return get_peft_model(nn.Sequential(base or nn.Linear(8, 6)), config)


def conv1d_model():
    return lora_model(Conv1D(6, 8), fan_in_fan_out=True)


REPLACED = {  # what stock calls: a class or module, the function's name, and a model that calls it
    "nn.Linear.forward": (nn.Linear, "forward", lora_model),
    "nn.Linear.__call__": (nn.Module, "__call__", lora_model),
    "nn.Module._call_impl": (nn.Module, "_call_impl", lora_model),
    "F.linear": (F, "linear", lora_model),
    "nn.Dropout.forward": (nn.Dropout, "forward", lora_model),
    "nn.Dropout.__call__": (nn.Dropout, "__call__", lora_model),
    "F.dropout": (F, "dropout", lora_model),
    "nn.Identity.__call__": (nn.Identity, "__call__", lambda: lora_model(dropout=0.0)),
    "Conv1D.forward": (Conv1D, "forward", conv1d_model),
    "Conv1D.__call__": (Conv1D, "__call__", conv1d_model),
    "torch.addmm": (torch, "addmm", conv1d_model),
    "lora.Linear.forward": (lora.Linear, "forward", lora_model),
    "PEFT's cast": (lora.Linear, "_cast_input_dtype", lora_model),
    "LlamaRMSNorm.forward": (LlamaRMSNorm, "forward", lambda: LlamaRMSNorm(8)),
    "nn.RMSNorm.forward": (nn.RMSNorm, "forward", lambda: nn.RMSNorm(8)),
    "F.rms_norm": (F, "rms_norm", lambda: nn.RMSNorm(8)),
}


def patch(model):
    return (
        tfl.patch_norms(model) if hasattr(model, "eps") or hasattr(model, "variance_epsilon") else tfl.patch_peft(model)
    )


def replace(monkeypatch, owner, name, wraps: bool) -> list:
    """Count the calls of a function; with ``wraps`` by one that has the names of what it stands for."""
    original, calls = getattr(owner, name), []

    def replacement(*arguments, **options):
        calls.append(name)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, functools.wraps(original)(replacement) if wraps else replacement)
    return calls


def output(model, x):
    torch.manual_seed(0)
    return model(x)


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("case", REPLACED)
def test_a_replacement_sees_stocks_calls(monkeypatch, case, wraps):
    """Replaced before the patch, or after it; given back, the operator takes the call again."""
    owner, name, build = REPLACED[case]
    stock, x = build(), torch.randn(3, 8)
    after, before = copy.deepcopy(stock), copy.deepcopy(stock)
    assert patch(after).patched
    fused = output(after, x)
    with monkeypatch.context() as patches:
        calls = replace(patches, owner, name, wraps)
        expected = output(stock, x)
        number = len(calls)
        assert number > 0
        calls.clear()
        assert torch.equal(output(after, x), expected)
        assert len(calls) == number
        report = patch(before)
        assert not report.patched
        assert all(f"{name} replaced for the whole process" in reason for reason in report.declined.values()), report
        calls.clear()
        assert torch.equal(output(before, x), expected)
        assert len(calls) == number
    assert torch.equal(output(after, x), fused)
    assert patch(before).patched


@pytest.mark.parametrize("name", ["disable_adapters", "merged"])
def test_a_replaced_property_is_asked(monkeypatch, name):
    patched, x = lora_model().eval(), torch.randn(3, 8)
    assert tfl.patch_peft(patched).patched
    monkeypatch.setattr(lora.Linear, name, property(lambda _: True))  # either way the base computes alone
    assert torch.equal(patched(x), patched.base_model.model[0].base_layer(x))


@pytest.mark.parametrize("case", ["nn.Linear.forward", "F.linear", "lora.Linear.forward", "PEFT's cast"])
def test_compiled_code_is_compiled_anew(monkeypatch, case):
    """Where it holds the operators; elsewhere it is torch's own calls, and stock's."""
    owner, name, build = REPLACED[case]
    torch.compiler.reset()
    stock, x = build().eval(), torch.randn(3, 8)
    model = copy.deepcopy(stock)
    tfl.patch_peft(model)
    compiled, original = torch.compile(model, backend="aot_eager"), getattr(owner, name)
    with tfl.keep_operators():
        before = compiled(x)
    with tfl.keep_operators(), monkeypatch.context() as patches:
        patches.setattr(owner, name, lambda *arguments, **options: original(*arguments, **options) * 2)
        assert torch.equal(compiled(x), stock(x))
    with tfl.keep_operators():
        assert torch.equal(compiled(x), before)


def test_a_replacement_that_this_package_finds_when_it_is_imported(monkeypatch):
    """A wrapper with all names of what it wraps is known by where its code is."""
    for owner, name, _ in REPLACED.values():
        assert originals.is_own(owner, name)
        with monkeypatch.context() as patches:
            replace(patches, owner, name, wraps=True)
            assert not originals.is_own(owner, name)


def test_what_a_layer_does_not_call_may_be_replaced(monkeypatch):
    model = lora_model()
    replace(monkeypatch, Conv1D, "forward", wraps=True)
    assert tfl.patch_peft(model).patched


@pytest.mark.parametrize("trace", [make_fx, lambda model: lambda x: export(model, (x,), strict=False)])
def test_torch_fx_traces_the_operator(trace):
    """Its tracer, torch.export's too, replaces nn.Module.__call__ while it runs: that is torch's own."""
    model = lora_model().eval()
    assert tfl.patch_peft(model).patched
    with tfl.keep_operators():
        graph = trace(model)(torch.ones(3, 8)).graph
    assert "torch_fused_lora.lora_linear_forward" in str(graph)


# --- TORCH_FUSED_LORA=off


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_switched_off(monkeypatch, value):
    monkeypatch.setenv("TORCH_FUSED_LORA", value)
    originals._warn_once.cache_clear()
    model, norm = lora_model(), LlamaRMSNorm(8)
    with pytest.warns(UserWarning, match=f"TORCH_FUSED_LORA={value}: patch_peft and patch_norms patch nothing"):
        report = tfl.patch_peft(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        norm_report = tfl.patch_norms(norm)
    assert not report.patched + norm_report.patched
    assert f"TORCH_FUSED_LORA={value}" in str(report)
    assert type(model.base_model.model[0]) is lora.Linear
    assert type(norm) is LlamaRMSNorm


@pytest.mark.parametrize("value", ["", "on", "1"])
def test_not_switched_off(monkeypatch, value):
    monkeypatch.setenv("TORCH_FUSED_LORA", value)
    assert tfl.patch_peft(lora_model()).patched


def test_switching_off_undoes_an_earlier_patch(monkeypatch):
    model = lora_model()
    tfl.patch_peft(model)
    monkeypatch.setenv("TORCH_FUSED_LORA", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tfl.patch_peft(model)
    assert type(model.base_model.model[0]) is lora.Linear
