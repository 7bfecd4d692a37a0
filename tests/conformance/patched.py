"""Pytest plugin: patch every LoRA Linear from the moment it is built, and write ``--calls FILE``: the forward calls
of LoRA Linears, each with its kind, whether the operator ran in it, and its test; and on the emulator, the Metal
kernels that were dispatched."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft.tuners import lora
from torch import nn

import torch_fused_lora.peft as fused
from torch_fused_lora import decide, originals

calls: Counter[tuple[str, bool, str]] = Counter()  # (kind, operator ran, test)
operator_calls = 0
emulator = sys.modules.get("emulator.mps_on_linux")  # on_mps.py imports it where it is needed
dispatches: Counter[str] = Counter()  # by kernel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--calls", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    _patch_layers_as_they_are_built()
    _count_operator_calls()
    for cls in (lora.Linear, fused.Fused):
        _count_calls(cls, config.getoption("--device"))
    _pass_for_own()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if emulator:
        dispatches.update(emulator.counters().dispatches)
    counts = {"calls": list(calls.items()), "dispatches": dict(dispatches)}
    if hasattr(session.config, "workeroutput"):  # a process of xdist hands its counts to the controller
        session.config.workeroutput["counts"] = counts
    else:
        session.config.getoption("--calls").write_text(json.dumps(counts))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error: object) -> None:
    if error:  # it crashed; outcomes.py ends the run
        return
    counts = node.workeroutput["counts"]
    calls.update(dict(counts["calls"]))
    dispatches.update(counts["dispatches"])


def _patch_layers_as_they_are_built() -> None:
    """`patch_peft` a layer whenever it gets an adapter: every way in which PEFT builds or loads one comes by there."""
    update_layer = lora.Linear.update_layer

    @functools.wraps(update_layer)
    def update_and_patch(layer: lora.Linear, *args, **kwargs) -> None:
        update_layer(layer, *args, **kwargs)
        fused.patch_peft(layer)

    lora.Linear.update_layer = update_and_patch


def _count_operator_calls() -> None:
    def counting(operator):
        @functools.wraps(operator)
        def counted(*args, **kwargs):
            global operator_calls
            operator_calls += 1
            return operator(*args, **kwargs)

        return counted

    fused.lora_linear_stacked = counting(fused.lora_linear_stacked)
    fused.lora_delta_stacked = counting(fused.lora_delta_stacked)


def _operator_runs() -> int:
    """How often the operator ran so far. On the emulator, what counts is a kernel on its way to the device."""
    return sum(emulator.counters().dispatches.values()) if emulator else operator_calls


def _count_calls(cls: type[lora.Linear], device: str) -> None:
    """Count the forward calls of LoRA Linears, patched or not; hooks have had their say when forward is entered."""
    forward = cls.forward

    @functools.wraps(forward)
    def counted(layer: lora.Linear, *args, **kwargs):
        if isinstance(layer, fused.Fused) is not (cls is fused.Fused):  # a patched one that calls super().forward()
            return forward(layer, *args, **kwargs)
        kind, runs_before = _kind(layer, device, *args, **kwargs), _operator_runs()
        result = forward(layer, *args, **kwargs)
        test = os.environ["PYTEST_CURRENT_TEST"].split("[")[0].split("::")[-1]
        calls[kind, _operator_runs() > runs_before, test] += 1
        return result

    cls.forward = counted


def _pass_for_own() -> None:
    """A forward that somebody replaced is called, not fused: this plugin's counting one is none of those."""
    is_own = originals.is_own

    def passes(owner, name: str) -> bool:
        return (name == "forward" and owner.forward is lora.Linear.forward) or is_own(owner, name)

    originals.is_own = passes
    decide._OWN = decide.called()


def _kind(layer: lora.Linear, device: str, x: torch.Tensor, *args: object, **kwargs: object) -> str:
    """What PEFT's own forward would do, read from PEFT's state: the code under test is not asked."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    variants = {type(layer.lora_variant[name]).__name__ for name in active if name in layer.lora_variant}
    if x.device.type != device:
        return f"on {x.device.type}"
    if args or kwargs:
        return f"extra arguments: {', '.join(sorted(kwargs))}"
    if layer.disable_adapters:
        return "disabled"
    if layer.merged:
        return "merged"
    if not active:
        return "no active adapter"
    if variants:
        return f"variant: {', '.join(sorted(variants))}"
    if type(layer.base_layer) is fused._Part:
        return "tried by patch_peft"
    if type(layer.base_layer) is not nn.Linear:
        return f"plain over {type(layer.base_layer).__name__}"
    return "plain"
