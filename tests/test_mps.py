"""The Metal extension as the package uses it: what is dispatched, allocated and waited for, and how it fails.

Numbers are checked by the operator's own tests, which run on every device.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import torch_fused_lora as tfl
from reference import Layer
from torch_fused_lora.mps import extension
from torch_fused_lora.ops.lora_linear import lora_linear_stacked

if sys.platform != "linux":
    pytest.skip("what is counted here only the bench counts", allow_module_level=True)

from mps_on_linux import counters, reset_counters

pytestmark = pytest.mark.usefixtures("mps")


def operands(M=3, K=24, N=20, r=4, dtype=torch.float32, adapter_dtype=torch.float32, needs=True):
    shapes = ((M, K), dtype), ((N, K), dtype), ((N,), dtype), ((r, K), adapter_dtype), ((N, r), adapter_dtype)
    x, weight, bias, lora_A, lora_B = (torch.randn(shape).to("mps", t) for shape, t in shapes)
    return x.requires_grad_(needs), weight, bias, lora_A.requires_grad_(needs), lora_B.requires_grad_(needs)


FAMILY_WORDS = ("lora", "decode", "delta", "grad", "sum", "splits")


def families(dispatches: dict[str, int]) -> dict[str, int]:
    """Dispatches by kernel family: lora_decode_float_float_3_1_4_4 is a lora_decode."""
    found: dict[str, int] = {}
    for name, count in dispatches.items():
        family = "_".join(word for word in name.split("_") if word in FAMILY_WORDS)
        found[family] = found.get(family, 0) + count
    return found


@pytest.fixture
def start():
    """Wait until the device is idle, and count from here."""

    def begin() -> None:
        torch.mps.synchronize()
        reset_counters()

    return begin


OPERATORS = ("_lora_linear", "lora_linear_backward", "_rms_norm", "rms_norm_backward", "softmax", "softmax_backward")


@pytest.mark.parametrize("name", OPERATORS)
def test_the_kernel_is_registered(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_fused_lora::{name}", "MPS")
    assert extension.reason == "loaded"


# --- Counts


@pytest.mark.parametrize("M", [1, 8])
def test_few_rows_are_one_dispatch(start, M):
    a = operands(M)
    tfl.lora_linear(*a, 0.5)
    for recording, allocations in ((False, 1), (True, 2)):  # y, and h
        start()
        with torch.set_grad_enabled(recording):
            y = tfl.lora_linear(*a, 0.5)
        seen = counters()
        assert families(seen.dispatches) == {"lora_decode": 1}
        assert (seen.fallbacks, seen.allocations) == ({}, allocations)
        assert (seen.command_blocks, seen.synchronisations, seen.commits, seen.libraries) == (1, 0, 0, 0)
        del y


@pytest.mark.parametrize(("M", "dropout_p"), [(9, 0.0), (70, 0.0), (1, 0.5), (70, 0.5)])
def test_otherwise_one_dispatch_beside_linear(start, M, dropout_p):
    a = operands(M)
    tfl.lora_linear(*a, 0.5, dropout_p, training=True)
    for recording, allocations in ((False, 1), (True, 2)):
        start()
        with torch.set_grad_enabled(recording):
            y = tfl.lora_linear(*a, 0.5, dropout_p, training=True)
        seen = counters()
        assert families(seen.dispatches) == {"lora_delta": 1}
        assert (seen.fallbacks, seen.allocations) == ({"aten::linear": 1}, allocations)
        assert (seen.command_blocks, seen.synchronisations, seen.commits, seen.libraries) == (1, 0, 0, 0)
        del y


def test_adapters_with_their_own_dropout_are_one_dispatch_each(start):
    a = operands(9)
    run = lambda: lora_linear_stacked(*a, 0.5, (0.3, 0.6), (1, 3))  # noqa: E731
    run()
    start()
    run()
    assert families(counters().dispatches) == {"lora_delta": 2}


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("M", [3, 700])
def test_backward_is_three_dispatches_at_most(start, M, dropout_p):
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
        {"lora_delta": 1, "lora_grad": 1},
        {"lora_delta": 1, "lora_grad": 1, "sum_splits": 1},
    )
    assert sum(seen.fallbacks.values()) == 1, seen.fallbacks  # dx's matmul
    assert (seen.command_blocks, seen.synchronisations, seen.commits) == (1, 0, 0)


@pytest.mark.parametrize(("M", "dropout_p"), [(2, 0.0), (12, 0.5)])
def test_a_chain_of_layers_is_encoded_without_waiting(start, M, dropout_p):
    x, weight, bias, lora_A, lora_B = operands(M, 16, 16)
    tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.1, dropout_p, training=True)
    start()
    y = x
    for _ in range(24):
        y = tfl.lora_linear(y, weight, bias, lora_A, lora_B, 0.1, dropout_p, training=True)
    seen = counters()
    assert (sum(seen.dispatches.values()), seen.synchronisations, seen.commits) == (24, 0, 0)
    assert y.isfinite().all()


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

READ_AS_THEY_ARE = {
    "transposed": lambda: torch.randn(24, 7).to("mps").t(),
    "offset": lambda: torch.randn(7, 27).to("mps")[1:, 3:],
    "expanded": lambda: torch.randn(24).to("mps").expand(7, 24),
    "every other row": lambda: torch.randn(14, 24).to("mps")[::2],
    "3-D, batch and sequence swapped": lambda: torch.randn(5, 2, 24).to("mps").transpose(0, 1),
    "3-D, channels first": lambda: torch.randn(2, 24, 5).to("mps").transpose(1, 2),
    "a slice of a sequence": lambda: torch.randn(2, 9, 24).to("mps")[:, 2:7],
}


@pytest.mark.parametrize("layout", READ_AS_THEY_ARE)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_copy_of_what_has_a_unit_stride(layout, dropout_p):
    _, weight, bias, lora_A, lora_B = operands()
    x, before = READ_AS_THEY_ARE[layout]().requires_grad_(), extension.contiguous_copies
    weight = weight.t().contiguous().t()
    y = tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5, dropout_p, training=True)
    grad = torch.randn(20).to("mps").expand(y.shape)
    found = dict(zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y, (x, lora_A, lora_B), grad), strict=True))
    assert extension.contiguous_copies == before
    if dropout_p == 0:
        layer = Layer(x, weight, bias, lora_A, lora_B, 0.5)
        layer.output().check(y.detach())
        for name, gradient in found.items():
            layer.gradients(grad)[name].check(gradient, name)


def test_one_copy_of_what_has_none():
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


# --- Lifetimes and threads


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
    assert counters().live_buffers == before


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
    assert counters().live_buffers == before


# --- Failures

# A process of its own, in which no kernel is compiled yet. The device is given a compiler that changes the source.
SABOTAGE = """
import ctypes, sys
import conftest, mps_on_linux, torch
import torch_fused_lora as tfl
from mps_on_linux.device import CompileCallback, Host, library

def attempt():
    y = tfl.lora_linear(x, weight, None, weight, weight, 2.0)
    return y.cpu().unique().tolist()

def compile_changed(source, handle):
    return honest.compile(source.replace(*map(str.encode, sys.argv[2:])), handle)

honest = library().host
corrupt = Host(CompileCallback(compile_changed), honest.describe, honest.execute)
x, weight = torch.ones(int(sys.argv[1]), 8, device="mps"), torch.ones(8, 8, device="mps")
library().bench_set_host(ctypes.byref(corrupt))
for _ in range(2):
    try:
        print(attempt())
    except RuntimeError as error:
        print(str(error).replace("\\n", " "))
library().bench_set_host(ctypes.byref(honest))
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
    assert re.match(rf"torch_fused_lora: kernel {message} \(torch 2\S+, macOS .*, Apple M1 Max \(bench\)\)", first), (
        first
    )
    assert "sabotage" in first or "#error" not in arguments[-1]  # the compiler's own text
    assert second == first
    assert after == "[136.0]"  # 8 + 2 * 8 * 8


BACKWARD = torch.ops.torch_fused_lora.lora_linear_backward
BAD_BACKWARD = {
    "grad on the CPU": ({"grad": lambda t: t.cpu()}, "grad: expected .* on mps; got .* on cpu"),
    "grad dtype": ({"grad": lambda t: t.long()}, "grad: expected float16, bfloat16 or float32"),
    "x on the CPU": ({"x": lambda t: t.cpu()}, "x: expected grad's dtype torch.float32, on mps; got .* on cpu"),
    "x dtype": ({"x": lambda t: t.half()}, "x: expected grad's dtype torch.float32, on mps; got .* torch.float16"),
    "x shape": ({"x": lambda t: t.view(1, 2, 4)}, "x: expected the shape"),
    "weight on the CPU": ({"weight": lambda t: t.cpu()}, "weight: expected grad's dtype .* on cpu"),
    "weight dtype": ({"weight": lambda t: t.half()}, "weight: expected grad's dtype torch.float32, on mps"),
    "h on the CPU": ({"h": lambda t: t.cpu()}, "h: expected lora_A's dtype torch.float32, on mps; got .* on cpu"),
    "h dtype": ({"h": lambda t: t.half()}, "h: expected lora_A's dtype torch.float32, on mps; got .* torch.float16"),
    "lora_A on the CPU": ({"lora_A": lambda t: t.cpu()}, "lora_A: expected .* on mps; got .* on cpu"),
}


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_the_backward_operator_names_itself_and_is_as_strict(case):
    shapes = {"grad": (2, 3), "x": (2, 4), "weight": (3, 4), "lora_A": (2, 4), "lora_B": (3, 2), "h": (2, 2)}
    arguments = {name: torch.randn(shape).to("mps") for name, shape in shapes.items()}
    rest = {"scaling": torch.tensor(1.0), "seed": None, "dropout_p": [], "ranks": [], "needs": [True] * 6}
    assert len(BACKWARD(**arguments, **rest)) == 6
    changes, message = BAD_BACKWARD[case]
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(RuntimeError, match=f"lora_linear_backward: {message}"):
        BACKWARD(**arguments, **rest)


@pytest.mark.parametrize("M", [1, 64])
def test_out_of_memory_says_so(M):
    """One element stands for a weight of 2**38 bytes; the product of 64 rows is torch's own to allocate."""
    one, N = torch.ones(1, 1, device="mps"), 2**36
    with pytest.raises(RuntimeError, match="MPS backend out of memory"):
        tfl.lora_linear(one.expand(M, 1), one.expand(N, 1), None, one, one.expand(N, 1))
    assert tfl.lora_linear(one, one, None, one, one).item() == 2


def test_without_the_extension():
    script = """
import os, conftest, torch
os.environ["TORCH_FUSED_LORA_MPS"] = "/nonexistent"
import torch_fused_lora as tfl
a = torch.ones(8, 8)
print(tfl.lora_linear(a, a, None, a, a)[0, 0].item())
a = a.to("mps")
for call in (lambda: tfl.lora_linear(a, a, None, a, a), lambda: tfl.rms_norm(a), lambda: tfl.softmax(a)):
    try:
        call()
    except NotImplementedError as error:
        print(error)
"""
    on_cpu, *on_mps = in_a_process(script)
    assert on_cpu == "72.0"
    assert [line.split(":")[0] for line in on_mps] == ["lora_linear", "rms_norm", "softmax"]
    assert all("it is not built (nonexistent is missing): on the Mac, pip install" in line for line in on_mps)


def in_a_process(script: str, *arguments: str) -> list[str]:
    """The lines it prints."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
