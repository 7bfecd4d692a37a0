"""What a report says of calls, which layers a patch follows, and what a notebook does to a patched model."""

from __future__ import annotations

import copy
import functools
import importlib
import warnings

import pytest
import torch
import torch._dynamo.testing
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import torch_fused_lora as tfl
from torch_fused_lora import peft as tfl_peft
from torch_fused_lora.originals import Patched


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def config(*targets, **options):
    return LoraConfig(r=3, target_modules=[*targets] or ["first", "second"], init_lora_weights=False, **options)


def build(*targets, **options):
    torch.manual_seed(0)
    return get_peft_model(Net(), config(*targets, **options))


X = torch.randn(4, 8)
FIRST, SECOND = "base_model.model.first", "base_model.model.second"


@pytest.fixture(autouse=True)
def _clean():
    tfl_peft._warned.clear()
    tfl_peft._followed.clear()  # models of other tests that are not collected yet
    yield
    tfl.unpatch_peft()


def counts(report):
    return {name: (calls.fused, calls.declined) for name, calls in report.calls().items()}


def patched(model):
    return [name for name, module in model.named_modules() if isinstance(module, Patched)]


def test_calls_are_counted_with_the_last_reason():
    model = build()
    report = tfl.patch_peft(model)
    assert counts(report) == {FIRST: (0, 0), SECOND: (0, 0)}
    assert "not called" in str(report.calls())
    model(X), model(X)
    with model.disable_adapter():
        model(X)
    model.merge_adapter()
    model(X)
    assert counts(report) == {FIRST: (2, 2), SECOND: (2, 2)}
    assert report.calls()[FIRST].reason == "adapters are merged"
    table = str(report.calls())
    assert "4 calls fused, 4 left to PEFT" in table
    assert "2 calls fused, 2 not: adapters are merged" in table
    before = report.calls()
    model(X)
    assert before[FIRST].declined == 2  # it is what was then


def test_a_report_does_not_keep_its_model():
    report = tfl.patch_peft(build())
    assert report.calls() == {}
    assert report.patched == [FIRST, SECOND]


def test_a_copy_counts_for_itself():
    model = build()
    report = tfl.patch_peft(model)
    copy.deepcopy(model)(X)
    assert counts(report) == {FIRST: (0, 0), SECOND: (0, 0)}


def test_compiled_calls_are_not_counted_and_add_no_guards():
    torch._dynamo.reset()
    blocks = nn.ModuleList(build("first") for _ in range(3))
    report = tfl.patch_peft(blocks)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(blocks[0].__class__.forward, backend=counter)
    with tfl.keep_operators():
        for block in blocks:
            compiled(block, X)
    assert all(calls.fused == calls.declined == 0 for calls in report.calls().values())
    assert "compiled, or not called" in str(report.calls())
    stock = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(blocks[0].__class__.forward, backend=stock)
    tfl.unpatch_peft(blocks)
    for block in blocks:
        compiled(block, X)
    assert counter.frame_count == stock.frame_count


def test_a_lasting_reason_is_warned_of_once():
    model = build()
    report = tfl.patch_peft(model)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    model(X), model(X)
    with pytest.warns(
        UserWarning, match="first and others like it run PEFT's own forward: adapter 'default' has hooks"
    ):
        model(X)
    assert "hooks or a replaced forward" in report.calls()[FIRST].reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)


def test_a_passing_reason_is_not_warned_of():
    model = build()
    tfl.patch_peft(model)
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model(X)


def test_adapters_injected_after_the_patch_are_patched():
    model = build("first")
    report = tfl.patch_peft(model)
    model.add_adapter("more", config("second"))
    assert patched(model) == [FIRST, SECOND]
    assert report.patched == [FIRST, SECOND]
    model.set_adapter("more")
    model(X)
    assert counts(report)[SECOND] == (1, 0)
    tfl.unpatch_peft(model)
    assert not patched(model)
    model.add_adapter("again", config("first"))
    assert not patched(model)
    assert not hasattr(BaseTuner.inject_adapter, "_follows")


def test_a_loaded_adapter_is_patched(tmp_path):
    build("second").save_pretrained(tmp_path)
    model = build("first")
    tfl.patch_peft(model)
    model.load_adapter(tmp_path, "loaded")
    assert patched(model) == [FIRST, SECOND]


def test_injection_without_a_peft_model_is_followed():
    """As diffusers' load_lora_weights and Transformers' add_adapter do it."""
    model = inject_adapter_in_model(config("first"), Net())
    tfl.patch_peft(model)
    inject_adapter_in_model(config("second"), model, "more")
    assert patched(model) == ["first", "second"]
    outer = nn.Sequential(Net())
    inject_adapter_in_model(config("first"), outer[0])
    tfl.patch_peft(outer)
    inject_adapter_in_model(config("second"), outer[0], "more")
    assert patched(outer) == ["0.first", "0.second"]


def test_every_model_built_from_now_on(tmp_path):
    build().save_pretrained(tmp_path)
    before = build()
    report = tfl.patch_peft()
    assert report.patched == []
    assert not patched(before)
    model, loaded = build(), PeftModel.from_pretrained(Net(), tmp_path)
    assert patched(model) == patched(loaded) == [FIRST, SECOND]
    model(X), loaded(X), loaded(X)
    assert counts(report)["first"] == (1, 0)
    assert counts(report)["first (model 2)"] == (2, 0)
    tfl.patch_peft()  # again: nothing changes
    tfl.unpatch_peft()
    assert not patched(build())
    assert patched(model)
    assert not hasattr(BaseTuner.inject_adapter, "_follows")


def test_a_mixed_model_is_reported_once():
    report = tfl.patch_peft()
    model = get_peft_model(Net(), config("first"), mixed=True)
    model.add_adapter("more", config("second"))
    model(X)
    assert report.patched == list(report.calls()) == ["first", "second"]


def test_adapters_made_without_memory_are_patched(tmp_path):
    """As low_cpu_mem_usage has them: while they are injected, accelerate puts all parameters on meta. What a class was
    found to be is not kept from there."""
    build().save_pretrained(tmp_path)
    tfl_peft._plain.clear()
    report = tfl.patch_peft()
    model = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True)
    assert patched(model) == [FIRST, SECOND]
    assert not report.declined


def test_a_layer_patched_and_then_declined_is_in_one_place():
    model = build("first")
    report = tfl.patch_peft(model)
    model.base_model.model.first.lora_A["default"].register_forward_hook(lambda *_: None)
    model.add_adapter("more", config("second"))
    assert report.patched == [SECOND]
    assert list(report.declined) == [FIRST]


def test_a_module_with_calls_of_its_own_is_not_reported():
    model = build()
    model.base_model.model._calls = 0
    assert counts(tfl.patch_peft(model)) == {FIRST: (0, 0), SECOND: (0, 0)}


def test_the_reason_is_what_was_found_between_the_hooks():
    dispatch_model = pytest.importorskip("accelerate").dispatch_model
    model = build("first")
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    report = tfl.patch_peft(model)
    model.base_model.model.first.lora_B.double()
    with pytest.raises(RuntimeError, match="dtype"):
        model(X)
    assert report.calls()[FIRST].reason == "lora_A is torch.float32, lora_B torch.float64"


def test_removed_hooks_leave_layers_fused():
    accelerate = pytest.importorskip("accelerate")
    model = build()
    expected = model(X)
    for _ in range(2):
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        report = tfl.patch_peft(model)
        torch.testing.assert_close(model(X), expected)
    assert counts(report) == {FIRST: (2, 0), SECOND: (2, 0)}


@pytest.mark.parametrize("hooks", ["accelerate", "diffusers"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_forward_beside_the_hooks_is_called(hooks, when):
    model = build("first")
    A = model.base_model.model.first.lora_A["default"]

    def replace():
        forward = A.forward
        A.forward = lambda x: 3 * forward(x)

    if when == "before":
        replace()
    if hooks == "accelerate":
        pytest.importorskip("accelerate").dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        pytest.importorskip("diffusers.hooks").apply_layerwise_casting(model, torch.bfloat16, torch.float32)
    if when == "after":
        replace()
    expected = model(X)
    report = tfl.patch_peft(model)
    assert torch.equal(model(X), expected)
    assert not report.patched


def test_somebody_elses_hook_stays(monkeypatch):
    tfl.patch_peft()
    ours = BaseTuner.inject_adapter

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    for hook in (theirs, functools.wraps(ours)(theirs)):
        monkeypatch.setattr(BaseTuner, "inject_adapter", hook)
        tfl.unpatch_peft()
        assert BaseTuner.inject_adapter is hook
        assert not patched(build())


def test_the_patch_cell_twice_and_a_reload():
    model = build()
    expected = model(X)
    for _ in range(2):
        report = tfl.patch_peft(model)
        assert report.patched == [FIRST, SECOND]
    for module in (tfl, tfl_peft):
        importlib.reload(module)
    torch.testing.assert_close(model(X), expected)
    report = tfl.patch_peft(model)
    assert report.patched == [FIRST, SECOND]
    torch.testing.assert_close(model(X), expected)
    assert counts(report)[FIRST] == (1, 0)
    tfl.unpatch_peft(model)
    assert type(model.base_model.model.first) is lora.Linear
    assert torch.equal(model(X), expected)


def test_an_interrupted_patch_can_be_repeated(monkeypatch):
    model = build()
    expected = model(X)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(tfl_peft.hooks, "rebind", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tfl.patch_peft(model)
    torch.testing.assert_close(model(X), expected)
    report = tfl.patch_peft(model)
    model(X)
    assert counts(report)[SECOND] == (1, 0)
    tfl.unpatch_peft(model)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_interrupted_step_can_be_repeated(error, when):
    model = build()
    expected = model(X).sum()
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    tfl.patch_peft(model)
    raises = [error()]

    def interrupt(*_):
        if raises:
            raise raises.pop()

    if when == "forward":
        model.base_model.model.second.base_layer.register_forward_pre_hook(interrupt)
    else:
        model.base_model.model.second.register_full_backward_hook(interrupt)
    with pytest.raises(error):
        model(X).sum().backward()
    model.zero_grad()
    model(X).sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-6)
