"""The emulator's Metal shim, called by ctypes and by a small Objective-C++ extension."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.emulator import mps_on_linux
from tests.emulator.mps_on_linux import a_stream_a_thread, counters, execution, no_leaks, reset_counters

if sys.platform != "linux" or not torch.backends.mps.is_built():
    pytest.skip("for the emulator, which tests/conftest.py installs on Linux", allow_module_level=True)

from tests.emulator.mps_on_linux.shim import Kernel, ShimError, call, call_operator

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


@pytest.mark.parametrize("lock", [threading.Lock(), None])
def test_two_streams_share_a_handle(lock):
    """Which holds the encoder of whoever started it last: without a lock, one encodes into the other's, every time."""
    small, y = Kernel(SOURCE, "small"), torch.zeros(2, 4, device="mps")
    both, errors = threading.Barrier(2), []

    def work(i: int) -> None:
        both.wait()
        with lock or contextlib.nullcontext():
            try:
                small(y[i], threads=(4,), group=(4,))
            except ShimError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    with a_stream_a_thread(meet_seconds=0.2 if lock else 60):
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert len(errors) == (0 if lock else 1)
    assert all("small: its handle holds another stream's encoder" in error for error in errors)
    assert sum(y[i].tolist() == [0, 1, 2, 3] for i in range(2)) == 2 - len(errors)


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


# --- ATen as an extension calls it


def on_mps(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="mps")


REFUSED = {
    "aten::linear of [2, 3, 4] and [5, 4]: an operand that has not two dimensions": (
        on_mps(2, 3, 4),
        on_mps(5, 4),
        None,
    ),
    "aten::linear of [4] and [5, 4]: an operand that has not two dimensions": (on_mps(4), on_mps(5, 4), None),
    "aten::linear of [1, 4] and [5, 4]: a single row with a bias": (on_mps(1, 4), on_mps(5, 4), on_mps(5)),
    "aten::linear of [9, 0] and [5, 0]: an empty operand": (on_mps(9, 0), on_mps(5, 0), None),
    "aten::linear of [2, 32767] and [2, 32767]: a reduction of": (on_mps(2, 32767), on_mps(2, 32767), None),
    "aten::matmul of [2, 3, 4] and [4, 5]: an operand that has not two dimensions": (on_mps(2, 3, 4), on_mps(4, 5)),
    "aten::mm of [9, 0] and [0, 5]: an empty operand": (on_mps(9, 0), on_mps(0, 5)),
    "aten::mm of [0, 9] and [9, 5]: an empty operand": (on_mps(0, 9), on_mps(9, 5)),
    "aten::mm of [2, 40000] and [40000, 2]: a reduction of 32,767 or more": (on_mps(2, 40000), on_mps(40000, 2)),
    "aten::bmm of [2, 3, 4] and [2, 4, 5]: an operand that has not two": (on_mps(2, 3, 4), on_mps(2, 4, 5)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_products_that_fail_on_some_mac_are_refused(message):
    name = message.split()[0]
    with pytest.raises(ShimError, match=re.escape(f"mps emulator: {message}")):
        call_operator(name, "", *REFUSED[message])
    assert counters().stable_calls == {name: 1}
    assert counters().fallbacks == {}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("aten::linear", (on_mps(2, 4), on_mps(5, 4), on_mps(5))),
        ("aten::linear", (on_mps(1, 4), on_mps(5, 4), None)),
        ("aten::linear", (on_mps(2, 32766), on_mps(2, 32766), on_mps(2))),
        ("aten::matmul", (on_mps(2, 4), on_mps(4, 5))),
        ("aten::mm", (on_mps(1, 4), on_mps(4, 1))),
        ("aten::relu", (on_mps(2, 0, 4),)),
    ],
)
def test_other_calls_of_an_extension_are_not(name, arguments):
    call_operator(name, "", *arguments)
    assert counters().stable_calls == {name: 1}


def test_stock_code_is_let_through():
    x, weight = on_mps(2, 3, 4), on_mps(5, 4)
    assert torch.nn.functional.linear(x, weight, on_mps(5)).eq(5).all()
    assert counters().stable_calls == {}


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
