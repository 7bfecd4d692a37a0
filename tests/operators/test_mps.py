"""The Metal extension as the package uses it: what is dispatched, allocated and waited for, and how it fails.

Numbers are checked by the operator's own tests, which run on every device.
"""

from __future__ import annotations

import functools
import gc
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torch_fused_lora as tfl
from tests import ROOT
from tests.operators import families
from tests.operators import test_lora_delta as delta
from tests.reference import Delta, Layer
from torch_fused_lora.mps import extension
from torch_fused_lora.ops.dispatch import Operator
from torch_fused_lora.ops.lora_linear.operator import lora_linear_stacked

if sys.platform != "linux":
    pytest.skip("what is counted here only the emulator counts", allow_module_level=True)

from tests.emulator import mps_on_linux
from tests.emulator.mps_on_linux import a_stream_a_thread, counters, reset_counters

pytestmark = pytest.mark.usefixtures("mps")


def operands(M=3, K=24, N=20, r=4, dtype=torch.float32, adapter_dtype=torch.float32, needs=True):
    shapes = ((M, K), dtype), ((N, K), dtype), ((N,), dtype), ((r, K), adapter_dtype), ((N, r), adapter_dtype)
    x, weight, bias, lora_A, lora_B = (torch.randn(shape).to("mps", t) for shape, t in shapes)
    return x.requires_grad_(needs), weight, bias, lora_A.requires_grad_(needs), lora_B.requires_grad_(needs)


@pytest.fixture
def start():
    """Wait until the device is idle, and count from here."""

    def begin() -> None:
        torch.mps.synchronize()
        reset_counters()

    return begin


OPERATORS = [f"{operator.name}_{way}" for operator in Operator.made for way in ("forward", "backward")]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_kernel_is_registered(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_fused_lora::{name}", "MPS")
    assert extension.reason == "loaded"


# --- Counts


@pytest.mark.parametrize(("M", "K", "dispatches"), [(1, 24, 1), (8, 24, 1), (1, 40_000, 2), (6, 40_000, 2)])
def test_few_rows_are_one_dispatch_or_two_where_a_is_long(start, M, K, dispatches):
    a = operands(M, K, 4)
    tfl.lora_linear(*a, 0.5)
    for recording, allocations in ((False, 0), (True, 1)):  # h
        start()
        with torch.set_grad_enabled(recording):
            y = tfl.lora_linear(*a, 0.5)
        seen = counters()
        assert families(seen.dispatches) == {"lora_decode": dispatches}
        assert (seen.fallbacks, seen.allocations) == ({}, allocations + dispatches)  # y, and what the first hands on
        assert (seen.command_blocks, seen.synchronisations, seen.commits, seen.libraries) == (1, 0, 0, 0)
        layer = Layer(*(t.detach() for t in a), 0.5)
        layer.output().check(y.detach())
        del y


@pytest.mark.parametrize(("first", "others"), [(8, (8, 5, 7)), (300, (300, 301, 517, 640))])
def test_a_second_training_step_and_new_lengths_compile_nothing(start, first, others):
    _, weight, bias, A, B = operands()

    def step(M: int) -> None:
        x = torch.randn(M, 24).to("mps").requires_grad_()
        y = tfl.lora_linear(x, weight, bias, A, B, 0.5)
        torch.autograd.grad(y, (x, A, B), torch.ones_like(y))

    step(first)
    start()
    for M in others:
        step(M)
    assert counters().libraries == 0


@pytest.mark.parametrize(("M", "dropout_p"), [(9, 0.0), (70, 0.0), (1, 0.5), (70, 0.5)])
def test_otherwise_two_dispatches_beside_linear(start, M, dropout_p):
    """h, over scratch that the call allocates, and what is added to y; in one command block."""
    a = operands(M)
    tfl.lora_linear(*a, 0.5, dropout_p, training=True)
    for recording, allocations in ((False, 2), (True, 3)):
        start()
        with torch.set_grad_enabled(recording):
            y = tfl.lora_linear(*a, 0.5, dropout_p, training=True)
        seen = counters()
        assert families(seen.dispatches) == {"lora_delta": 2}
        added = {"aten::sub.out": 1} if M == 1 else {}  # a single row's bias, which needs a result of its own
        assert (seen.fallbacks, seen.allocations) == ({"aten::linear": 1} | added, allocations + len(added))
        assert (seen.command_blocks, seen.synchronisations, seen.commits, seen.libraries) == (1, 0, 0, 0)
        del y


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_long_sum_is_split(start, dropout_p):
    """In both directions; in one command block."""
    a = operands(20, 640, 530)
    for _ in range(2):  # the first compiles
        start()
        torch.manual_seed(0)
        y = tfl.lora_linear(*a, 0.5, dropout_p, training=True)
        forward = counters()
        start()
        found = torch.autograd.grad(y, (a[0], a[3], a[4]), torch.ones_like(y))
        backward = counters()
    assert families(forward.dispatches) == {"lora_delta": 2}
    assert forward.allocations == 3  # y, h and the partial sums of h
    assert (forward.command_blocks, forward.synchronisations, forward.commits) == (1, 0, 0)
    assert families(backward.dispatches) == {"lora_delta": 2, "lora_grad": 1}
    cpu = [t.detach().cpu().requires_grad_(t.requires_grad) for t in a]
    if dropout_p == 0:
        expected = torch.nn.functional.linear(cpu[0], cpu[1], cpu[2]) + 0.5 * cpu[0] @ cpu[3].T @ cpu[4].T
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-3)
        grads = torch.autograd.grad(expected, (cpu[0], cpu[3], cpu[4]), torch.ones_like(expected))
        for one, other in zip(found, grads, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-3)


def test_adapters_with_their_own_dropout_are_two_dispatches_each(start):
    a = operands(9)
    run = lambda: lora_linear_stacked(*a, 0.5, (0.3, 0.6), (1, 3))  # noqa: E731
    run()
    start()
    run()
    assert families(counters().dispatches) == {"lora_delta": 4}


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("M", [3, 700])
def test_backward_is_four_dispatches_at_most(start, M, dropout_p):
    """dx and z by lora_delta, dA and dB by one lora_grad, and its sum where the rows were split."""
    a = operands(M)
    leaves = a[0], a[3], a[4]
    for _ in range(2):  # the first compiles
        y = tfl.lora_linear(*a, 0.5, dropout_p, training=True)
        grad = torch.ones_like(y)
        start()
        found = torch.autograd.grad(y, leaves, grad)
        seen = counters()
        del found
    assert families(seen.dispatches) in (
        {"lora_delta": 2, "lora_grad": 1},
        {"lora_delta": 2, "lora_grad": 1, "sum_splits": 1},
    )
    assert sum(seen.fallbacks.values()) == 1, seen.fallbacks  # dx's matmul
    assert (seen.command_blocks, seen.synchronisations, seen.commits) == (1, 0, 0)


@pytest.mark.parametrize("lead", [(20,), (4, 5), (2, 2, 5)])
def test_base_products_are_one_call_each(start, lead):
    """Whatever the dimensions of x; what mps_on_linux refuses of a product is tested with it."""
    _, weight, bias, lora_A, lora_B = operands()
    x = torch.randn(*lead, 24).to("mps").requires_grad_()
    weight.requires_grad_(), bias.requires_grad_()
    start()
    y = tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5)
    assert counters().stable_calls == {"aten::linear": 1}
    grad = torch.randn(*lead, 20).to("mps")
    start()
    found = torch.autograd.grad(y, (x, weight, bias), grad)
    assert counters().stable_calls == {"aten::mm": 2, "aten::transpose": 1, "aten::sum": 1}
    layer = Layer(x, weight, bias, lora_A, lora_B, 0.5)
    layer.output().check(y.detach())
    for name, gradient in zip(("x", "weight", "bias"), found, strict=True):
        layer.gradients(grad)[name].check(gradient, name)


@pytest.mark.parametrize(("M", "dropout_p"), [(2, 0.0), (12, 0.5)])
def test_a_chain_of_layers_is_encoded_without_waiting(start, M, dropout_p):
    x, weight, bias, lora_A, lora_B = operands(M, 16, 16)
    tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.1, dropout_p, training=True)
    start()
    y = x
    for _ in range(24):
        y = tfl.lora_linear(y, weight, bias, lora_A, lora_B, 0.1, dropout_p, training=True)
    seen = counters()
    dispatches = 24 * (2 if dropout_p else 1)
    assert (sum(seen.dispatches.values()), seen.synchronisations, seen.commits) == (dispatches, 0, 0)
    assert y.isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("M", [1, 70])
@pytest.mark.parametrize(
    ("dtypes", "casts"),
    [
        ((torch.float32, torch.float32, torch.float32), (0, 0)),
        ((torch.bfloat16, torch.bfloat16, torch.float32), (0, 0)),
        ((torch.float32, torch.bfloat16, torch.float32), (1, 1)),  # x
        ((torch.float32, torch.bfloat16, torch.bfloat16), (4, 6)),  # x, A, B and h; back: these, dA and dB
    ],
)
def test_lora_delta_is_two_dispatches_beside_a_copy(start, M, dropout_p, dtypes, casts):
    leaves = delta.operands(dtypes, (M,), (24, 20, 4), torch.device("mps"))
    for _ in range(2):  # the first compiles
        start()
        found = tfl.lora_delta(*leaves, 0.5, dropout_p, training=True)
        forward, grad = counters(), torch.ones_like(found)
        start()
        torch.autograd.grad(found, leaves, grad)
        backward = counters()
    assert families(forward.dispatches) == {"lora_delta": 2}
    assert families(backward.dispatches) == {"lora_delta": 2, "lora_grad": 1}
    for seen, call, count in ((forward, "aten::copy_", casts[0]), (backward, "aten::new_zeros", casts[1])):
        assert seen.stable_calls == {call: 1} | ({"aten::to": count} if count else {})
        assert (seen.command_blocks, seen.synchronisations, seen.commits) == (1, 0, 0)


@pytest.mark.parametrize(("M", "H"), [(3, 64), (300, 64), (3, 5000)])
def test_row_operators_are_one_dispatch_each_way(start, M, H):
    """The weight's gradient may take one more, which adds up the partial sums of several threadgroups."""
    x, weight = (torch.randn(shape, device="mps", requires_grad=True) for shape in ((M, H), (H,)))
    for name, run, leaves in (
        ("rms_norm", lambda: tfl.rms_norm(x, weight), (x, weight)),
        ("rms_norm", lambda: tfl.rms_norm(x, weight.detach()), (x,)),
        ("softmax", lambda: tfl.softmax(x), (x,)),
    ):
        for _ in range(2):  # the first compiles
            start()
            y = run()
            forward = counters()
            grad = torch.ones_like(y)
            start()
            torch.autograd.grad(y, leaves, grad)
            backward = counters()
        assert list(forward.dispatches.values()) == [1], forward.dispatches
        assert all(name in kernel for kernel in forward.dispatches)
        extra = {kernel: count for kernel, count in backward.dispatches.items() if name not in kernel}
        assert sum(backward.dispatches.values()) - sum(extra.values()) == 1
        assert not extra or (len(leaves) == 2 and list(extra.values()) == [1])
        for seen in (forward, backward):
            assert (seen.fallbacks, seen.command_blocks, seen.synchronisations, seen.commits) == ({}, 1, 0, 0)


# --- Layouts

MATRICES = {
    "transposed": lambda: torch.randn(24, 7).to("mps").t(),
    "offset": lambda: torch.randn(7, 27).to("mps")[1:, 3:],
    "expanded": lambda: torch.randn(24).to("mps").expand(7, 24),
    "every other row": lambda: torch.randn(14, 24).to("mps")[::2],
    "3-D, a slice of every row": lambda: torch.randn(2, 5, 30).to("mps")[..., 4:28],
}
NO_MATRICES = {
    "3-D, batch and sequence swapped": lambda: torch.randn(5, 2, 24).to("mps").transpose(0, 1),
    "3-D, channels first": lambda: torch.randn(2, 24, 5).to("mps").transpose(1, 2),
    "a slice of a sequence": lambda: torch.randn(2, 9, 24).to("mps")[:, 2:7],
}


@pytest.mark.parametrize("layout", MATRICES | NO_MATRICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_x_is_copied_once_where_it_is_no_matrix(layout, dropout_p):
    """For torch's linear; backward reads x as it is."""
    _, weight, bias, lora_A, lora_B = operands()
    x, before = (MATRICES | NO_MATRICES)[layout]().requires_grad_(), extension.contiguous_copies
    weight = weight.t().contiguous().t()
    y = tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5, dropout_p, training=True)
    grad = torch.randn(20).to("mps").expand(y.shape)
    found = dict(zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y, (x, lora_A, lora_B), grad), strict=True))
    assert extension.contiguous_copies == before + (layout in NO_MATRICES)
    if dropout_p == 0:
        layer = Layer(x, weight, bias, lora_A, lora_B, 0.5)
        layer.output().check(y.detach())
        for name, gradient in found.items():
            layer.gradients(grad)[name].check(gradient, name)


@pytest.mark.parametrize("layout", MATRICES | NO_MATRICES)
@pytest.mark.parametrize("of", ["y", "x", "grad"])
def test_lora_delta_reads_every_layout_as_it_is(layout, of):
    tensors = dict.fromkeys(("y", "x", "grad"), (MATRICES | NO_MATRICES)[layout]())
    y, x, grad = (t if name == of else torch.randn(t.shape, device="mps") for name, t in tensors.items())
    leaves = y, x, torch.randn(4, 24, device="mps"), torch.randn(24, 4, device="mps")
    leaves = dict(zip(delta.NAMES, (t.detach().requires_grad_() for t in leaves), strict=False))
    before = extension.contiguous_copies
    delta.check_call(Delta(*leaves.values(), 0.5), leaves, tfl.lora_delta(*leaves.values(), 0.5), grad)
    assert extension.contiguous_copies == before


@pytest.mark.parametrize("layout", NO_MATRICES)
def test_few_rows_are_read_as_they_are(layout):
    _, weight, bias, lora_A, lora_B = operands(needs=False)
    x, before = NO_MATRICES[layout]()[:, :2], extension.contiguous_copies
    Layer(x, weight, bias, lora_A, lora_B, 0.5).output().check(tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5))
    assert extension.contiguous_copies == before


@pytest.mark.parametrize(("name", "copies"), [("x", 1), ("weight", 2), ("bias", 1), ("lora_A", 0), ("lora_B", 0)])
def test_what_is_no_matrix_in_backward_is_copied_once_for_a_base_product(name, copies):
    """dY for dx, dW (which needs x, too) and the bias; the low-rank gradients read all as it is."""
    _, *rest = operands(needs=False)
    x = torch.randn(2, 9, 24).to("mps")[:, 2:7]
    layer, leaves = (
        Layer(x, *rest, 0.5),
        dict(zip(("x", "weight", "bias", "lora_A", "lora_B"), (x, *rest), strict=True)),
    )
    leaves[name].requires_grad_()
    y = tfl.lora_linear(x, *rest, 0.5)
    grad = torch.randn(5, 2, 20).to("mps").transpose(0, 1)
    before = extension.contiguous_copies
    (found,) = torch.autograd.grad(y, leaves[name], grad)
    assert extension.contiguous_copies == before + copies
    layer.gradients(grad)[name].check(found, name)


def test_one_copy_of_what_has_no_unit_stride():
    _, weight, bias, lora_A, lora_B = operands(needs=False)
    x, before = torch.randn(7, 48).to("mps")[:, ::2], extension.contiguous_copies
    Layer(x, weight, bias, lora_A, lora_B, 0.5).output().check(tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5))
    assert extension.contiguous_copies == before + 1


def test_scaling_and_seed_may_lie_anywhere_in_their_storage():
    """What binds a tensor of the CPU as a constant copies its storage from the start."""
    x, *rest = operands(12, needs=False)
    scalings, seeds = torch.tensor([1e6, 0.5]), torch.tensor([1, 2])
    operator = torch.ops.torch_fused_lora.lora_linear
    expected = operator(x, *rest, scalings[1].clone(), 0.5, seeds[1].clone())
    assert torch.equal(operator(x, *rest, scalings[1], 0.5, seeds[1]), expected)
    assert not torch.equal(operator(x, *rest, scalings[1], 0.5, seeds[0]), expected)


def test_what_a_hook_unpacks_may_lie_anywhere_in_its_storage():
    """As of one that keeps what is saved in one buffer: h, which is no operand, may begin between two runs."""

    def elsewhere(saved):
        flat = saved.new_empty(saved.numel() + 1)[1:]
        return flat.copy_(saved.reshape(-1)).view(saved.shape)

    a = operands(40, 128, 64, 8)
    expected = torch.autograd.grad(tfl.lora_linear(*a, 0.5).sum(), (a[0], *a[3:]))
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, elsewhere):
        y = tfl.lora_linear(*a, 0.5)
        found = torch.autograd.grad(y.sum(), (a[0], *a[3:]))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (0,)])
def test_no_rows(start, shape):
    _, weight, bias, lora_A, lora_B = operands(K=shape[-1])
    x = torch.empty(shape, device="mps", requires_grad=True)
    start()
    y = tfl.lora_linear(x, weight, bias, lora_A, lora_B)
    if shape[:-1]:
        assert counters().dispatches == {}
    y.sum().backward()
    assert x.grad.shape == shape
    assert lora_A.grad.count_nonzero() == lora_B.grad.count_nonzero() == 0


# --- What torch's products cannot be asked for

TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]


@pytest.mark.parametrize("size", [32_766, 32_767, 66_000])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), TYPES)
@pytest.mark.parametrize("name", ["K", "N"])
def test_long_sums_are_made_of_parts(start, name, size, dtype, adapter_dtype):
    """K of the output, N of dx: an lm_head's vocabulary."""
    x, weight, bias, lora_A, lora_B = operands(
        **{"M": 9, "K": 8, "N": 8, name: size}, dtype=dtype, adapter_dtype=adapter_dtype
    )
    layer = Layer(x, weight, bias, lora_A, lora_B, 0.5)
    parts = -(-size // 32_704) if size >= 32_767 else 1
    start()
    y = tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5)
    calls = counters().stable_calls
    assert calls["aten::mm" if name == "K" and parts > 1 else "aten::linear"] == (parts if name == "K" else 1)
    layer.output().check(y.detach())
    grad = torch.randn(y.shape).to("mps", dtype)
    start()
    (dx,) = torch.autograd.grad(y, x, grad)
    assert counters().stable_calls["aten::mm"] == (parts if name == "N" else 1)
    layer.gradients(grad)["x"].check(dx, "x")


@pytest.mark.parametrize("size", [32_766, 32_767, 65_409])
def test_no_part_of_a_long_sum_is_lost(mps, size):
    """Sums with a single term, at the seams of the parts: exact."""
    terms = torch.tensor([0, 32_703, 32_704 % size, size - 1] * 3)
    ones = torch.nn.functional.one_hot(terms, size).float().to(mps)
    none = lambda *shape: torch.zeros(shape, device=mps)  # noqa: E731
    weight = torch.randn(8, size, device=mps)
    assert torch.equal(tfl.lora_linear(ones, weight, None, none(1, size), none(8, 1)), weight.cpu().t()[terms].to(mps))
    x = torch.randn(12, 8, device=mps).requires_grad_()
    y = tfl.lora_linear(x, weight.t(), None, none(1, 8), none(size, 1))
    assert torch.equal(torch.autograd.grad(y, x, ones)[0], weight.cpu().t()[terms].to(mps))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), TYPES)
def test_long_sums_over_rows(dtype, adapter_dtype):
    x, weight, bias, lora_A, lora_B = operands(40_000, 8, 8, 1, dtype, adapter_dtype, needs=False)
    layer = Layer(x, weight.requires_grad_(), bias, lora_A, lora_B, 0.5)
    y = tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5)
    grad = torch.randn(y.shape).to("mps", dtype)
    layer.gradients(grad)["weight"].check(*torch.autograd.grad(y, weight, grad), "weight")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("lead", [(1,), (20,), (4, 5)])
def test_no_columns(lead, has_bias):
    """K = 0: the base product is the bias, or zeros, and the low-rank term is zero."""
    _, weight, bias, lora_A, lora_B = operands(K=0, dtype=torch.float16)
    x = torch.randn(*lead, 0).to("mps", torch.float16).requires_grad_()
    leaves = [x, weight.requires_grad_(), lora_A, lora_B] + ([bias.requires_grad_()] if has_bias else [])
    y = tfl.lora_linear(x, weight, bias if has_bias else None, lora_A, lora_B, 0.5, 0.5, training=True)
    assert y.dtype == torch.float16
    assert torch.equal(y, bias.expand(*lead, 20) if has_bias else torch.zeros_like(y))
    for leaf, found in zip(leaves, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True):
        assert torch.equal(found, torch.full_like(leaf, math.prod(lead) if leaf is bias else 0))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), TYPES)
@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_a_single_row(lead, dtype, adapter_dtype):
    """Of a transposed weight, which lora_decode leaves to torch."""
    _, weight, bias, lora_A, lora_B = operands(dtype=dtype, adapter_dtype=adapter_dtype, needs=False)
    x, weight = torch.randn(*lead, 24).to("mps", dtype), weight.t().contiguous().t()
    y = tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5)
    Layer(x, weight, bias, lora_A, lora_B, 0.5).output().check(y)
    assert y.shape == (*lead, 20)


# --- Lifetimes and threads


def assert_live_buffers(expected):
    """As many as expected, once torch's own thread has let go of the graph that it went back through."""
    for _ in range(500):
        if counters().live_buffers == expected:
            return
        time.sleep(0.01)
    raise AssertionError(f"{counters().live_buffers} live buffers, expected {expected}")


def test_operands_may_go_right_after_the_call(start):
    """The command stream keeps what it will read; nothing is left when it is done."""
    gc.collect()
    start()
    before = counters().live_buffers
    a = operands(12)
    layer = Layer(*(t.detach().cpu() for t in a), 0.5)
    y = tfl.lora_linear(*a, 0.5)
    grad = torch.randn(12, 20)
    exact = layer.gradients(grad)
    found = torch.autograd.grad(y, (a[0], a[3], a[4]), grad.to("mps"))
    y = y.detach()
    del a
    layer.output().check(y)
    for name, gradient in zip(("x", "lora_A", "lora_B"), found, strict=True):
        exact[name].check(gradient, name)
    del y, found, gradient
    gc.collect()
    torch.mps.synchronize()
    assert_live_buffers(before)


def test_converted_operands_may_go_right_after_the_call(start):
    """Those of lora_delta over a float32 y, which nobody else holds."""
    gc.collect()
    start()
    before = counters().live_buffers
    on_cpu = delta.operands(delta.WIDER[0], (12,), (24, 20, 4), needs=False)
    leaves = dict(zip(delta.NAMES, (t.to("mps").requires_grad_() for t in on_cpu), strict=False))
    found = tfl.lora_delta(*leaves.values(), 0.5)
    delta.check_call(Delta(*on_cpu, 0.5), leaves, found, torch.randn(12, 20, device="mps"))
    del leaves, found
    gc.collect()
    torch.mps.synchronize()
    assert_live_buffers(before)


def test_eight_threads(start):
    """Each with layers, dtypes and sizes of its own, two kernels a layer, first compiled while the others run."""
    gc.collect()
    start()
    before = counters().live_buffers
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            generator = torch.Generator().manual_seed(i)
            dtype = (torch.float32, torch.bfloat16)[i % 2]
            for M in (1, 3, 20 + i):
                x, W, A, B = (torch.randn(s, generator=generator) for s in ((M, 24), (20, 24), (4, 24), (20, 4)))
                x, W, A, B = x.to("mps", dtype).requires_grad_(), W.to("mps", dtype), A.to("mps"), B.to("mps")
                A.requires_grad_()
                layer = Layer(x, W, None, A, B, 0.5)
                y = tfl.lora_linear(x, W, None, A, B, 0.5)
                layer.output().check(y.detach())
                grad = torch.ones_like(y)
                exact = layer.gradients(grad)
                for name, found in zip(("x", "lora_A"), torch.autograd.grad(y, (x, A), grad), strict=True):
                    exact[name].check(found, name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures, failures
    gc.collect()
    torch.mps.synchronize()
    assert_live_buffers(before)


def test_two_streams(start):
    """A kernel's handle holds the encoder of whoever started it last, so that one thread encodes at a time."""
    operands_of = [operands(needs=False) for _ in range(2)]
    tfl.lora_linear(*operands_of[0], 0.5)  # compiled
    found: dict[int, torch.Tensor | BaseException] = {}

    def work(i: int) -> None:
        both.wait()
        try:
            found[i] = tfl.lora_linear(*operands_of[i], 0.5)
        except BaseException as error:
            found[i] = error

    both, threads = threading.Barrier(2), [threading.Thread(target=work, args=(i,)) for i in range(2)]
    with a_stream_a_thread():
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for i in range(2):
        assert isinstance(found[i], torch.Tensor), found[i]
        Layer(*operands_of[i], 0.5).output().check(found[i])


# --- Failures

# A process of its own, in which no kernel is compiled yet. The device is given a compiler that changes the source.
SABOTAGE = """
import ctypes, sys
import tests.conftest, torch
import torch_fused_lora as tfl
from tests.emulator.mps_on_linux.device import CompileCallback, Host, library

def attempt():
    y = tfl.lora_linear(x, weight, None, weight, weight, 2.0)
    return y.cpu().unique().tolist()

def compile_changed(source, handle):
    return honest.compile(source.replace(*map(str.encode, sys.argv[2:])), handle)

honest = library().host
corrupt = Host(CompileCallback(compile_changed), honest.describe, honest.execute)
x, weight = torch.ones(int(sys.argv[1]), 8, device="mps"), torch.ones(8, 8, device="mps")
library().emulator_set_host(ctypes.byref(corrupt))
for _ in range(2):
    try:
        print(attempt())
    except RuntimeError as error:
        print(str(error).replace("\\n", " "))
library().emulator_set_host(ctypes.byref(honest))
x, weight = x.half(), weight.half()  # another kernel
print(attempt())
"""
FAILURES = {
    "a shader that does not compile": (
        "1",
        "#include",
        "#error sabotage\n#include",
        r"lora_decode\w+: compiling it failed",
    ),
    "a kernel that does not exist": (
        "1",
        'host_name("',
        'host_name("no_',
        r"lora_decode\w+: finding it in its library failed",
    ),
    "a launch over the limits": ("20", "threadgroup(", "threadgroup(1 + 0 * ", r"lora_delta\w+: dispatch failed"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_launched(failure):
    """Each time one error that names the kernel and the versions; the process stays usable."""
    *arguments, message = FAILURES[failure]
    first, second, after = in_a_process(SABOTAGE, *arguments)
    assert re.match(
        rf"torch_fused_lora: kernel {message} \(torch 2\S+, macOS .*, Apple M1 Max \(emulator\)\)", first
    ), first
    assert "sabotage" in first or "#error" not in arguments[-1]  # the compiler's own text
    assert second == first
    assert after == "[136.0]"  # 8 + 2 * 8 * 8


@pytest.mark.parametrize(("planned", "at"), [(2, 2), (3, 2), (4, 2), (3, 1), (3, 3)])
def test_a_wrong_list_of_tensors(planned, at):
    """A small operator on the same encoder binds three tensors, in any order, whatever its plan says."""
    add_two = operator_that_binds_three()
    x, one = torch.zeros(5, device="mps"), torch.tensor(1.0)
    if (planned, at) == (3, 2):
        assert add_two(x, one, planned, at).eq(2).all()
        return
    with pytest.raises(RuntimeError, match=f"its plan has {planned} tensors, and bound are the buffers 1, {at}, 0"):
        add_two(x, one, planned, at)


@functools.cache
def operator_that_binds_three() -> Callable[..., torch.Tensor]:
    folder, csrc = Path(__file__).with_name("wrong_binding"), ROOT / "csrc"
    torch.library.define("wrong_binding::add_two", "(Tensor x, Tensor one, int planned, int at) -> Tensor")
    sources = [folder / "wrong_binding.mm", csrc / "plan/launch.h", csrc / "mps/kernels.h", csrc / "mps/kernels.mm"]
    torch.ops.load_library(mps_on_linux.extension(folder / "setup.py", sources))
    return torch.ops.wrong_binding.add_two


@pytest.mark.parametrize("M", [1, 64])
def test_out_of_memory_says_so(M):
    """One element stands for a weight of 2**38 bytes; the product of 64 rows is torch's own to allocate."""
    one, N = torch.ones(1, 1, device="mps"), 2**36
    with pytest.raises(RuntimeError, match="MPS backend out of memory"):
        tfl.lora_linear(one.expand(M, 1), one.expand(N, 1), None, one, one.expand(N, 1))
    assert tfl.lora_linear(one, one, None, one, one).item() == 2


def test_without_the_extension():
    script = """
import os, tests.conftest, torch
os.environ["TORCH_FUSED_LORA_MPS"] = "/nonexistent"
import torch_fused_lora as tfl
a = torch.ones(8, 8)
print(tfl.lora_linear(a, a, None, a, a)[0, 0].item())
a = a.to("mps")
for call in (
    lambda: tfl.lora_linear(a, a, None, a, a),
    lambda: tfl.lora_delta(a, a, a, a),
    lambda: tfl.rms_norm(a),
    lambda: tfl.softmax(a),
):
    try:
        call()
    except NotImplementedError as error:
        print(error)
"""
    on_cpu, *on_mps = in_a_process(script)
    assert on_cpu == "72.0"
    assert [line.split(":")[0] for line in on_mps] == ["lora_linear", "lora_delta", "rms_norm", "softmax"]
    assert all("it is not built (nonexistent is missing): on the Mac, pip install" in line for line in on_mps)


COMPILED_BY_MANY = """
import sys, threading
from tests.emulator.mps_on_linux import counters, install_with_extension
install_with_extension()
import torch, torch_fused_lora as tfl
x = torch.randn(3, 8).to("mps")
together = threading.Barrier(6)
def work():
    together.wait()
    tfl.softmax(x)
threads = [threading.Thread(target=work) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
torch.mps.synchronize()
print(counters().libraries)
"""


def test_a_kernel_that_several_threads_ask_for_first_is_compiled_once():
    assert in_a_process(COMPILED_BY_MANY) == ["1"]


def in_a_process(script: str, *arguments: str) -> list[str]:
    """The lines it prints."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
