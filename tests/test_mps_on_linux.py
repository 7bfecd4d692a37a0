"""The bench's mps device and shim, tested as such: no part of the package is used here."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the bench stands in for a Mac on Linux", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mps_on_linux
from mps_on_linux import counters, execution, reset_counters
from mps_on_linux.shim import Kernel, ShimError

mps_on_linux.install()

EXAMPLE = Path(mps_on_linux.__file__).parent / "example"


@pytest.fixture(autouse=True)
def _nothing_leaks():
    torch.mps.synchronize()
    before = counters().live_buffers
    reset_counters()
    yield
    torch.mps.synchronize()
    if counters().live_buffers > before:
        gc.collect()
    assert counters().live_buffers <= before  # less: garbage of an earlier test went


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], cwd=EXAMPLE.parents[1], capture_output=True, text=True)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


# --- The device


def test_install_again_only_renames():
    mps_on_linux.install("Apple M4 (bench)", 10)
    assert (torch.backends.mps.get_name(), torch.backends.mps.get_core_count()) == ("Apple M4 (bench)", 10)
    mps_on_linux.install()
    assert torch.backends.mps.get_name() == "Apple M1 Max (bench)"
    assert torch.backends.mps.is_built()
    assert torch.accelerator.current_accelerator() == torch.device("mps")


def test_install_refuses_to_come_late():
    done = run_python("import torch, mps_on_linux; torch.backends.mps.is_available(); mps_on_linux.install()")
    assert "comes first" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fresh_and_reused_memory_is_nan(dtype):
    for size in (1, 1000, 100_000):
        torch.zeros(size, dtype=dtype, device="mps")
        assert torch.empty(size, dtype=dtype, device="mps").isnan().all()


def test_the_host_cannot_touch_device_memory():
    read = "m.install(); x = torch.ones(9, device='mps'); ctypes.string_at(x.data_ptr())"
    done = run_python(f"import ctypes, torch, mps_on_linux as m; {read}")
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, dtype=torch.float64, device="mps"),
        lambda: torch.ones(3, dtype=torch.float64).to("mps"),
        lambda: torch.ones(3, device="mps").double(),
        lambda: torch.empty_strided((2,), (1,), dtype=torch.complex128, device="mps"),
    ],
)
def test_float64_is_refused(make):
    with pytest.raises(TypeError, match="MPS framework doesn't support"):
        make()


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: F.linear(x, torch.ones(2, 3)),
        lambda x: torch.add(x, x, out=torch.empty(3)),
        lambda x: x.addcmul_(x, torch.ones(3)),
    ],
)
def test_mixed_devices_are_refused(mix):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix(torch.ones(3, device="mps"))


def test_what_mixes_on_a_mac():
    x = torch.arange(4.0, device="mps")
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert x[torch.tensor([3, 0])].tolist() == [3, 0]
    with pytest.raises(TypeError, match="mps"):
        x.numpy()


def test_operators_without_an_mps_kernel_are_refused():
    torch.library.define("mps_on_linux::cpu_only", "(Tensor x) -> Tensor")
    torch.library.impl("mps_on_linux::cpu_only", "CPU", lambda x: x + 1)
    with pytest.raises(NotImplementedError, match=r"cpu_only' is not currently implemented for the MPS device"):
        torch.ops.mps_on_linux.cpu_only(torch.ones(3, device="mps"))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, 1].add_(1),
        lambda x: x.transpose(0, 2)[1].mul_(x[0, 0, 3]),
        lambda x: x.permute(2, 0, 1).reshape(-1),
        lambda x: x.unfold(2, 2, 1).sum(-1),
        lambda x: x.masked_fill_(x > 7, 0.5),
        lambda x: x[x > 3],
        lambda x: x.view(-1).as_strided((3, 2), (5, 2), 1).neg_(),
        lambda x: torch.cumsum(x, 1, out=x),
        lambda x: torch.add(x, x, out=x.new_empty(0)),
        lambda x: torch.nonzero(x, out=torch.empty(0, dtype=torch.int64, device=x.device)),
        lambda x: x.view(-1).resize_(30)[:24],
        lambda x: torch.empty_like(x).set_(x.untyped_storage(), 3, (2, 4), (8, 1)).add_(1),
        lambda x: x.topk(2).values,
        lambda x: torch.view_as_complex(x.view(2, 3, 2, 2)).abs(),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: F.conv1d(x, x[:, :, :2], torch.ones(2, device=x.device)),
    ],
)
def test_same_as_cpu(change):
    expected = torch.arange(24.0).view(2, 3, 4)
    actual = expected.to("mps")
    expected_result, actual_result = change(expected), change(actual)
    assert actual_result.device.type == "mps"
    assert torch.equal(actual_result.cpu(), expected_result)
    assert torch.equal(actual.cpu(), expected)
    assert actual_result.stride() == expected_result.stride()


def test_results_alias_as_on_cpu():
    x = torch.zeros(3, 4, device="mps")
    assert x[1].data_ptr() == x.data_ptr() + 16
    assert x.add_(1) is x
    out = torch.empty(3, 4, device="mps")
    before = out.data_ptr()
    torch.add(x, x, out=out)
    assert out.data_ptr() == before


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
)
def test_training_equals_cpu_bit_for_bit(optimizer):
    model, x = mlp(), torch.randn(7, 5)
    losses = []
    for device in ("cpu", "mps"):
        own = copy.deepcopy(model).to(device)
        steps = optimizer(own.parameters())
        for _ in range(3):
            loss = own(x.to(device)).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_linear_is_one_operator_with_its_own_backward():
    layer, x = nn.Linear(5, 4).to("mps"), torch.ones(3, 5, device="mps")
    reset_counters()
    y = layer(x)
    assert type(y.grad_fn).__name__ == "LinearBackward0"
    assert (counters().fallbacks, counters().allocations) == ({"aten::linear": 1}, 1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_repeats_random_numbers(reentrant):
    x = torch.ones(100, device="mps", requires_grad=True)
    y = checkpoint(lambda x: F.dropout(x * x), x, use_reentrant=reentrant)
    y.sum().backward()
    assert y.count_nonzero() not in (0, 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    model, x = mlp(), torch.randn(7, 5)
    with torch.autocast("cpu", dtype):
        expected = model(x)
    with torch.autocast("mps", dtype):
        actual = model.to("mps")(x.to("mps"))
    actual.float().sum().backward()
    assert actual.dtype == dtype
    assert torch.equal(actual.cpu(), expected)


def test_random_numbers():
    torch.manual_seed(1)
    first, host = torch.randn(5, device="mps"), torch.randn(5)
    torch.manual_seed(1)
    torch.randn(99, device="mps")
    assert torch.equal(torch.randn(5), host)
    torch.mps.manual_seed(1)
    assert torch.equal(torch.randn(5, device="mps"), first)
    state = torch.mps.get_rng_state()
    second = torch.rand(3, device="mps")
    torch.mps.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="mps"), second)
    generator = torch.Generator("mps").manual_seed(1)
    assert torch.equal(torch.randn(5, device="mps", generator=generator), first)


def test_state_goes_between_devices():
    layer, file = nn.Linear(5, 4).to("mps"), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["weight"].device.type == "mps"
    file.seek(0)
    on_cpu = torch.load(file, map_location="cpu")
    assert torch.equal(on_cpu["weight"], layer.weight.cpu())
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    model, x = mlp().to("mps"), torch.randn(7, 5, device="mps")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    torch._dynamo.reset()


# --- Deferred execution


def test_a_model_is_encoded_without_waiting():
    model, x = mlp().to("mps"), torch.ones(7, 5, device="mps")
    reset_counters()
    y = model(x).square().sum()
    y.backward()
    assert (counters().commits, counters().synchronisations) == (0, 0)
    y.item()
    assert (counters().commits, counters().synchronisations) == (1, 1)


def test_inputs_live_until_they_are_used():
    x = torch.ones(1000, device="mps")
    torch.mps.synchronize()
    before = counters().live_buffers
    y = x + 1
    del x
    gc.collect()
    assert counters().live_buffers == before + 1
    assert y.eq(2).all()
    del y
    assert counters().live_buffers == before - 1


def test_host_tensors_are_read_when_the_operator_is_called():
    x, scalar, index, source = torch.ones(2, device="mps"), torch.tensor(3.0), torch.tensor([1]), torch.ones(2)
    y, z, copied = x * scalar, torch.arange(2, device="mps")[index], source.to("mps")
    scalar.zero_(), index.zero_(), source.zero_()
    assert (y.tolist(), z.tolist(), copied.tolist()) == ([3, 3], [1], [1, 1])


def test_errors_surface_when_somebody_waits_and_leave_the_device_usable():
    table = torch.ones(3, 4, device="mps")
    F.embedding(torch.tensor([7], device="mps"), table)
    with pytest.raises(RuntimeError, match="mps device: index out of range"):
        torch.mps.synchronize()
    assert table.sum().item() == 12


# --- The shim

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
    from mps_on_linux.shim import call

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
