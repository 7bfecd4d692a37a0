"""Tuned configurations on the emulated mps: which calls take them, and what they compute."""

from __future__ import annotations

import contextlib
import re
import sys

import pytest
import torch

import torch_fused_lora as tfl
from tests.operators.test_mps import operands
from tests.packaging.test_tuned import deterministic
from tests.reference import HALF, Layer
from torch_fused_lora import tuned
from torch_fused_lora.mps import extension
from torch_fused_lora.plan import plan

if sys.platform != "linux":
    pytest.skip("what is counted here only the emulator counts", allow_module_level=True)

from tests.emulator.mps_on_linux import counters, reset_counters

FORWARD = tuned.Layer(False, 64, 300, 200, 4, "float16", "float32")
BACKWARD = FORWARD._replace(backward=True)
BOTH = "lora_delta.row_blocks=1,lora_delta.k_splits=2,lora_grad.splits=2"


@contextlib.contextmanager
def tuned_as(text: str, *layers: tuned.Layer):
    for layer in layers:
        assert extension.tune(layer, text) is None
    try:
        yield
    finally:
        for layer in layers:
            extension.tune(layer, "")


@contextlib.contextmanager
def overridden(text: str):
    """As TORCH_FUSED_LORA_PLAN=text has it."""
    cores = torch.backends.mps.get_core_count()
    assert extension.library.tfl_configure(cores, b"the tests' torch", text.encode()) is None
    try:
        yield
    finally:
        extension.library.tfl_configure(cores, b"the tests' torch", b"")


def run(a, scaling: float | torch.Tensor = 0.5, dropout_p: float = 0.0):
    """A forward and a backward: the bits of y and of the gradients, what was launched, and what torch was asked for."""
    torch.manual_seed(1)
    leaves = [t for t in (*a, scaling) if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.mps.synchronize()
    reset_counters()
    y = tfl.lora_linear(*a, scaling, dropout_p, training=True)
    found = [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
    torch.mps.synchronize()
    seen = counters()
    return [t.cpu() for t in found], seen.dispatches, seen.stable_calls


def same(one, other) -> bool:
    return one[1:] == other[1:] and all(map(torch.equal, one[0], other[0]))


def described(layer: tuned.Layer) -> str:
    direction = "backward" if layer.backward else "forward"
    return str([d for d in plan("lora_linear", layer[1:5], *layer[5:]) if d.direction == direction])


def test_an_entry_changes_its_layer_and_no_other(mps):
    others = [
        FORWARD._replace(M=32),
        FORWARD._replace(M=65),
        FORWARD._replace(K=304),
        FORWARD._replace(N=208),
        FORWARD._replace(r=5),
        FORWARD._replace(dtype="bfloat16"),
        FORWARD._replace(adapter_dtype="float16"),
        BACKWARD,
    ]
    inside = [FORWARD, FORWARD._replace(M=33)]
    before = {layer: described(layer) for layer in (*inside, *others)}
    with tuned_as(BOTH, FORWARD):
        after = {layer: described(layer) for layer in before}
        assert all("'row_blocks': 1" in after[layer] and "'k_splits': 2" in after[layer] for layer in inside)
        assert {layer for layer in before if before[layer] != after[layer]} == set(inside)
    assert {layer: described(layer) for layer in before} == before


@pytest.mark.parametrize("text", [BOTH, "lora_gemm.plain=1"])
def test_the_bits_are_those_of_the_same_override(mps, text):
    a = operands(40, 300, 200, dtype=torch.float16)
    default = run(a)
    with overridden(text):
        expected = run(a)
    with tuned_as(text, FORWARD, BACKWARD):
        planned = {name for layer in (FORWARD, BACKWARD) for name in re.findall(r"kernel='(\w+)'", described(layer))}
        found, again = run(a), run(a)
        elsewhere = run(operands(40, 300, 192, dtype=torch.float16))
    assert set(found[1]) == planned
    assert same(found, expected)
    assert same(found, again)
    assert not same(found, default)
    assert elsewhere[1] == default[1]
    assert same(run(a), default)


def test_calls_that_leave_what_is_tuned_aside(mps):
    """With torch to be deterministic, and with dropout; a learned scaling leaves torch's way aside."""
    a = operands(40, 300, 200, dtype=torch.float16, adapter_dtype=torch.float16)
    layers = [layer._replace(adapter_dtype="float16") for layer in (FORWARD, BACKWARD)]
    default, dropping = run(a), run(a, dropout_p=0.5)
    learned = torch.tensor(0.5, requires_grad=True)
    for text in (BOTH, "lora_linear.way=2"):
        with tuned_as(text, *layers):
            assert not same(run(a), default)
            with deterministic():
                assert same(run(a), default)
            assert same(run(a, dropout_p=0.5), dropping)
    with tuned_as("lora_linear.way=2", layers[1]):
        assert "aten::addmm" not in run(a, learned)[2]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lead", [(1,), (8,), (40,), (2, 3, 7)])
def test_torchs_own_products(mps, lead, dtype):
    _, weight, bias, lora_A, lora_B = operands(1, 130, 72, 5, dtype=dtype, adapter_dtype=dtype)
    x = torch.randn(*lead, 130).to("mps", dtype).requires_grad_()
    name = str(dtype).removeprefix("torch.")
    layer = tuned.Layer(False, x[..., 0].numel(), 130, 72, 5, name, name)
    with tuned_as("lora_linear.way=2", layer, layer._replace(backward=True)):
        assert described(layer) == described(layer._replace(backward=True)) == "[]"
        (y, *gradients), dispatches, calls = run((x, weight, bias, lora_A, lora_B))
    assert dispatches == {}
    assert calls["aten::addmm"] == 2
    exact = Layer(x, weight, bias, lora_A, lora_B, 0.5)
    exact.output().check(y)
    expected = exact.gradients(torch.ones(*lead, 72, dtype=dtype))
    for gradient, name in zip(gradients, ("x", "lora_A", "lora_B"), strict=True):
        expected[name].check(gradient, name)


def test_torchs_own_products_are_a_layers_alone(mps):
    """lora_delta, whose rows need not be a matrix, is its kernels under the same override."""
    y, x = (torch.randn(2, 3, n).to("mps", torch.float16) for n in (30, 40))
    _, _, _, lora_A, lora_B = operands(6, 40, 30, 4, torch.float16, torch.float16)
    leaves = [t.detach().requires_grad_() for t in (y, x, lora_A, lora_B)]

    def found():
        out = tfl.lora_delta(*leaves, 0.5)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    default = found()
    with overridden("lora_linear.way=2"):
        assert all(map(torch.equal, found(), default))
