"""The bench's Metal shim, called by ctypes and by a small Objective-C++ extension."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path

import pytest
import torch

import mps_on_linux
from mps_on_linux import counters, execution, no_leaks, reset_counters

if sys.platform != "linux" or not torch.backends.mps.is_built():
    pytest.skip("for the bench, which tests/conftest.py installs on Linux", allow_module_level=True)

from mps_on_linux.shim import Kernel, ShimError, call

EXAMPLE = Path(mps_on_linux.__file__).parent / "example"


@pytest.fixture(autouse=True)
def _counted():
    with no_leaks():
        reset_counters()
        yield


SOURCE = """
kernel void add(device float* y, device const float* x, constant int2& v, constant float& w,
                uint i [[thread_position_in_grid]]) {
  y[i] = x[i] + v.x + v.y + w;
}
[[max_total_threads_per_threadgroup(64)]]
kernel void small(device float* y, uint i [[thread_position_in_grid]]) { y[i] = i; }
kernel void index(device uint* y, uint3 p [[thread_position_in_grid]], uint3 n [[threads_per_grid]],
                  uint3 group [[dispatch_threads_per_threadgroup]]) {
  y[p.x + n.x * (p.y + n.y * p.z)] = group.x;
}
"""


def test_arguments():
    y, base = torch.empty(8, device="mps"), torch.arange(16.0, device="mps")
    scalars = torch.tensor([0.5, 99.0])
    add = Kernel(SOURCE, "add")
    add(
        y[2:], base[4::2], 3 | 7 << 32, scalars[1], threads=(6,), group=(4,)
    )  # strides and a scalar's offset are ignored
    assert y[2:].tolist() == [14.5, 15.5, 16.5, 17.5, 18.5, 19.5]
    assert y[:2].isnan().all()
    add(y, base, 0, torch.tensor(0.25, dtype=torch.float64), threads=(8,))
    assert y.tolist() == [i + 0.25 for i in range(8)]
    assert counters().dispatches == {"add": 2}
    assert counters().command_blocks == 2


@pytest.mark.parametrize(
    ("threads", "group", "size"), [((5,), None, 1024), ((5, 3), (2, 3), 2), ((3, 2, 4), (3, 1, 2), 3)]
)
def test_grids(threads, group, size):
    y = torch.zeros(threads, dtype=torch.int32, device="mps")
    Kernel(SOURCE, "index")(y, threads=threads, group=group)
    assert y.eq(size).all()


@pytest.mark.parametrize("order", ["forward", "reverse", "permuted"])
def test_several_kernels_in_one_block(order):
    y = torch.empty(100, device="mps")
    add, small = Kernel(SOURCE, "add"), Kernel(SOURCE, "small")

    def encode() -> None:
        small.encode(y, threads=(100,), group=(64,))
        add.encode(y, y, 1, torch.tensor(0.0), threads=(100,), group=(32,))

    with execution(order=order):
        add.run(encode)
        assert (counters().command_blocks, counters().commits) == (1, 0)
    assert torch.equal(y.cpu(), torch.arange(100.0) + 1)


def test_a_kernel_has_no_arguments_of_an_earlier_one():
    y = torch.zeros(4, device="mps")
    add = Kernel(SOURCE, "add")
    add.run(lambda: (add.encode(y, y, 0, torch.tensor(0.0), threads=(4,)), add.encode(threads=(4,))))
    with pytest.raises(RuntimeError, match="add:4: out-of-bounds"):
        torch.mps.synchronize()


def test_kernels_and_operators_run_in_the_order_of_their_calls():
    y = torch.zeros(4, device="mps")
    add = Kernel(SOURCE, "add")
    for _ in range(3):
        y.mul_(2)
        add(y, y, 1, torch.tensor(0.0), threads=(4,))
    assert y.tolist() == [7] * 4


def test_a_source_that_does_not_compile():
    with pytest.raises(ShimError, match="Failed to create metal library"):
        Kernel("kernel void broken(device float* y) { y[0] = nonsense; }", "broken")
    with pytest.raises(ShimError, match="Failed to create function state object for: absent"):
        Kernel(SOURCE, "absent")


ZERO, HALF = torch.tensor(0.0), torch.zeros(4, dtype=torch.float16, device="mps")
MISUSE = {
    "offset 48 is past the end": lambda k, y: k.encode(y, y.as_strided((0,), (1,), 12), threads=(1,)),
    "start_encoding of small comes first": lambda k, y: Kernel(SOURCE, "small").dispatch(4),
    "1025 threads a threadgroup; it takes 1024": lambda k, y: k.encode(y, threads=(2048,), group=(1025,)),
    "small: 65 threads a threadgroup; it takes 64": lambda k, y: Kernel(SOURCE, "small").encode(
        y, threads=(65,), group=(65,)
    ),
    r"a grid of \[0\] threads": lambda k, y: k.encode(y, threads=(0,), group=(32,)),
    "one to three dimensions, not 4": lambda k, y: k.encode(y, threads=(1, 1, 1, 1), group=(1, 1, 1, 1)),
    "one to three dimensions, not 2 and 1": lambda k, y: k.encode(y, threads=(4, 4), group=(4,)),
    "buffer 0 is written by the kernel": lambda k, y: k.encode(ZERO, threads=(1,)),
    "buffer 2 takes 8 bytes, not 4": lambda k, y: k.encode(y, y, ZERO, threads=(1,)),
    "add has no buffer 4": lambda k, y: k.encode(y, y, 0, ZERO, y, threads=(1,)),
    "buffer index 31": lambda k, y: (k.start(), k.set(31, 0)),
    "Passed CPU tensor to MPS op": lambda k, y: k.encode(y, torch.ones(4), threads=(1,)),
    "offset 2 is not a multiple of 4": lambda k, y: k.encode(y, HALF[1:], threads=(1,)),
    "a command block inside a command block": lambda k, y: k.run(k.start),
    "a copy inside a command block": lambda k, y: y.cpu(),
    "aten::add.* inside a command block": lambda k, y: y + 1,
    "waiting for the device inside a command block": lambda k, y: torch.mps.synchronize(),
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_refused(message):
    add, y = Kernel(SOURCE, "add"), torch.zeros(12, device="mps")
    with pytest.raises(RuntimeError, match=message):
        add.run(lambda: MISUSE[message](add, y))
    assert y.tolist() == [0] * 12
    assert counters().dispatches == {}


def test_encoding_belongs_to_the_thread_of_its_command_block():
    small, y = Kernel(SOURCE, "small"), torch.zeros(4, device="mps")
    with pytest.raises(ShimError, match="outside a command block"):
        small.encode(y, threads=(4,))
    seen = []

    def elsewhere() -> None:
        try:
            small.start()
        except ShimError as error:
            seen.append(str(error))

    def encode() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    small.run(encode)
    assert "outside a command block" in seen[0]


def test_what_a_kernel_does_wrong_is_told_when_somebody_waits():
    small, y = Kernel(SOURCE, "small"), torch.zeros(12, device="mps")
    small(y, threads=(13,), group=(13,))
    with pytest.raises(RuntimeError, match=r"small:7: out-of-bounds: .* of buffer 0 \(y\), which has 48 bytes"):
        torch.mps.synchronize()
    assert y.zero_().add_(1).eq(1).all()


def test_raw_buffers():
    a, b, text = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.create_string_buffer(b"0123456789")
    for buffer in (a, b):
        call("malloc", ctypes.byref(buffer), ctypes.c_size_t(8))
    sizes = [ctypes.c_size_t(n) for n in (0, 2, 8)]
    call("memcpy", a, *sizes, text)
    call("copy_buffer", a, b, *[ctypes.c_size_t(n) for n in (4, 0, 4)])
    with pytest.raises(ShimError, match="past the end"):
        call("copy_buffer", a, b, *[ctypes.c_size_t(n) for n in (8, 0, 4)])
    for buffer in (a, b):
        call("free", buffer)


# --- An Objective-C++ extension


@pytest.fixture(scope="module")
def double_plus_one():
    torch.library.define("mps_on_linux::double_plus_one", "(Tensor x) -> Tensor")
    torch.ops.load_library(mps_on_linux.extension(EXAMPLE / "setup.py", [EXAMPLE / "double_plus_one.mm"]))
    operator = torch.ops.mps_on_linux.double_plus_one
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.default.name(), "MPS")
    return operator


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[3:, 2:9:3], lambda x: x[:0]])
def test_extension_on_views(double_plus_one, view):
    x = torch.randn(70, 33)
    actual = double_plus_one(view(x.to("mps")))
    assert torch.equal(actual.cpu(), 2 * view(x) + 1)


def test_extension_is_deferred_and_keeps_its_inputs(double_plus_one):
    y = torch.zeros(8, 8, device="mps")
    reset_counters()
    for _ in range(5):
        y = double_plus_one(y)
    seen = counters()
    assert seen.dispatches == {"double_plus_one": 5}
    assert (seen.allocations, seen.synchronisations, seen.commits, seen.fallbacks) == (5, 0, 0, {})
    assert seen.live_buffers >= 6
    assert y.eq(31).all()


def test_extension_errors(double_plus_one):
    with pytest.raises(RuntimeError, match="x is a float32 matrix"):
        double_plus_one(torch.zeros(2, 2, dtype=torch.float16, device="mps"))
    assert double_plus_one(torch.zeros(2, 2, device="mps")).eq(1).all()


def test_extension_in_eight_threads(double_plus_one):
    results: list[bool] = []

    def work(i: int) -> None:
        for n in range(1, 20):
            y = double_plus_one(double_plus_one(torch.full((n, 5), float(i), device="mps")))
            results.append(bool(y.eq(4 * i + 3).all()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == [True] * 8 * 19


def test_without_execution_outputs_stay_nan(double_plus_one):
    with execution(enabled=False):
        y = double_plus_one(torch.zeros(2, 2, device="mps"))
    assert y.isnan().all()
