"""The emulator's mps device."""

from __future__ import annotations

import copy
import gc
import io
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests import ROOT
from tests.emulator import mps_on_linux
from tests.emulator.mps_on_linux import counters, no_leaks, reset_counters

if sys.platform != "linux" or not torch.backends.mps.is_built():
    pytest.skip("for the emulator, which tests/conftest.py installs on Linux", allow_module_level=True)

from tests.emulator.mps_on_linux.shim import Kernel


@pytest.fixture(autouse=True)
def _counted():
    with no_leaks():
        reset_counters()
        yield


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


def test_install_again_only_renames():
    mps_on_linux.install("Apple M4 (emulator)", 10)
    assert (torch.backends.mps.get_name(), torch.backends.mps.get_core_count()) == ("Apple M4 (emulator)", 10)
    mps_on_linux.install()
    assert torch.backends.mps.get_name() == "Apple M1 Max (emulator)"
    assert torch.backends.mps.is_built()
    assert torch.accelerator.current_accelerator() == torch.device("mps")


def test_install_refuses_to_come_late():
    late = "torch.backends.mps.is_available(); mps_on_linux.install()"
    done = run_python(f"import torch; from tests.emulator import mps_on_linux; {late}")
    assert "comes first" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fresh_and_reused_memory_is_nan(dtype):
    for size in (1, 1000, 100_000):
        torch.zeros(size, dtype=dtype, device="mps")
        assert torch.empty(size, dtype=dtype, device="mps").isnan().all()


def test_released_memory_comes_back_as_nan():
    torch.zeros(100_000, device="mps")
    assert torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory() >= 400_000
    torch.mps.empty_cache()
    assert torch.mps.driver_allocated_memory() == torch.mps.current_allocated_memory()
    assert torch.empty(100_000, device="mps").isnan().all()


def test_the_host_cannot_touch_device_memory():
    read = "m.install(); x = torch.ones(9, device='mps'); ctypes.string_at(x.data_ptr(), 4)"
    done = run_python(f"import ctypes, torch; from tests.emulator import mps_on_linux as m; {read}")
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
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.tensor([True, True, False], device=x.device)),
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


@pytest.mark.parametrize("zipped", [True, False])  # what pickle.dumps does with a model is the format without
def test_state_goes_between_devices(zipped):
    layer, file = nn.Linear(5, 4).to("mps"), io.BytesIO()
    torch.save(layer.state_dict(), file, _use_new_zipfile_serialization=zipped)
    file.seek(0)
    assert torch.load(file)["weight"].device.type == "mps"
    file.seek(0)
    on_cpu = torch.load(file, map_location="cpu")
    assert torch.equal(on_cpu["weight"], layer.weight.cpu())
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.vmap(f)(x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x + 1,))[1],
        lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f, x: torch.inference_mode()(lambda x: f(x).add_(1))(x),
    ],
)
def test_transforms_equal_cpu(transform):
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    expected = transform(lambda x: F.linear(x, weight).tanh(), x)
    actual = transform(lambda x: F.linear(x, weight.to("mps")).tanh(), x.to("mps"))
    torch.testing.assert_close(actual.cpu(), expected)


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


def test_long_queues_start_by_themselves():
    x = torch.zeros((), device="mps")
    for _ in range(2000):
        x.add_(1)
    assert (counters().commits, counters().synchronisations) == (1, 0)
    assert x.item() == 2000


@pytest.mark.parametrize(("blocks", "dispatches"), [(2000, 1), (1, 2000)])
def test_long_queues_of_kernels_start_between_command_blocks(blocks, dispatches):
    x = torch.zeros(1, device="mps")
    count = Kernel("kernel void count(device float* x) { x[0] += 1; }", "count")

    def encode():
        for _ in range(dispatches):
            count.encode(x, threads=(1,))

    for _ in range(blocks):
        count.run(encode)
    assert (counters().commits, counters().synchronisations) == (1, 0)
    assert x.item() == 2000


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


def test_commands_run_outside_of_what_surrounds_the_wait():
    x = torch.ones(3).to("mps").requires_grad_()
    y, z = x * 2, x.cumsum(0)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        torch.mps.synchronize()
    assert (y.tolist(), z.tolist()) == ([2, 2, 2], [1, 2, 3])


def test_commands_run_outside_of_what_surrounded_the_call():
    with torch.inference_mode():
        x = torch.ones(3).to("mps")
        y = F.linear(x, torch.ones(2, 3, device="mps"))
    torch.mps.synchronize()
    assert (x.tolist(), y.tolist()) == ([1, 1, 1], [3, 3])


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
