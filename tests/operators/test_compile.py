"""torch.library, torch.compile and torch.export."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import torch_fused_lora as tfl
from torch_fused_lora.ops.lora_linear.operator import lora_linear_stacked

ops = torch.ops.torch_fused_lora


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    """Dynamo counts the recompilations of a function over the whole process, and gives up after eight."""
    torch.compiler.reset()


def operands(dtype=torch.float32, adapter_dtype=None, lead=(4,), needs=True, device="cpu"):
    adapter_dtype = adapter_dtype or dtype
    scaling_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.randn(s).to(device, d).requires_grad_(needs)
        for s, d in (
            ((*lead, 3), dtype),
            ((5, 3), dtype),
            ((5,), dtype),
            ((2, 3), adapter_dtype),
            ((5, 2), adapter_dtype),
            ((), scaling_dtype),
        )
    ]


# autograd_registration is not implemented for mps.
ON_MPS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
OPCHECKS = {"cpu": (*ON_MPS, "test_autograd_registration"), "mps": ON_MPS}
DTYPES = [(torch.float64, None), (torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None)]


@pytest.fixture
def by_itself():
    """torch.compile as it is without `keep_operators`."""


@pytest.fixture(autouse=True)
def _operators_in_compiled_code(request):
    """What a compiler does with the operators, as on mps; on a CPU and on CUDA it sees torch's own calls by itself."""
    keep = contextlib.nullcontext() if "by_itself" in request.fixturenames else tfl.keep_operators()
    torch.compiler.reset()
    with keep:
        yield


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "lead", "needs"),
    [
        (torch.float64, None, (), True),
        (torch.float32, None, (2, 3), False),
        (torch.float32, None, (0,), True),
        (torch.bfloat16, torch.float32, (2, 3), True),
        (torch.bfloat16, torch.float32, (4,), False),
        (torch.float16, None, (4,), True),
    ],
)
def test_opcheck(device, dtype, adapter_dtype, lead, needs):
    if device.type != "cpu" and dtype == torch.float64:
        pytest.skip("mps has no float64")
    opcheck = partial(torch.library.opcheck, test_utils=OPCHECKS[device.type])
    a = operands(dtype, adapter_dtype, lead, needs, device)
    opcheck(ops.lora_linear, a)
    opcheck(ops.lora_linear_forward, (*a, None, [], [], not needs))
    opcheck(ops.lora_linear, (a[0], a[1], None, *a[3:]), {"dropout_p": 0.5, "seed": torch.tensor(4)})
    opcheck(ops.lora_linear_forward, (*a, torch.tensor(4), [0.5, 0.0], [1, 1], False))
    grad, h = torch.randn(*lead, 5).to(a[0]), torch.randn(a[0][..., 0].numel(), 2).to(a[3])
    x, W, _, A, B, s = a
    opcheck(ops.lora_linear_backward, (grad, x, W, A, B, s, h, None, [], [], [True] * 6))
    opcheck(
        ops.lora_linear_backward,
        (grad, x, W, A, B, s, h, torch.tensor(4), [0.5], [], [True, False, False, True, False, False]),
    )
    opcheck(ops.dropout_mask, (torch.tensor(4), 0, 3, 5, 0.5, device))


BACKENDS = pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "aot_eager"), ("cpu", "inductor"), ("mps", "aot_eager")],  # the emulator has no inductor for mps
    indirect=["device"],
)


@BACKENDS
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES[1:3])
def test_compile_without_a_graph_break(device, backend, dtype, adapter_dtype):
    a = operands(dtype, adapter_dtype, (2, 3), device=device)

    def layer(*arguments):
        return tfl.lora_linear(*arguments) * 2

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            actual, expected = compiled(*a), layer(*a)
        torch.testing.assert_close(actual, expected)
        if grad_mode:
            found, wanted = (torch.autograd.grad(y.float().sin().sum(), a) for y in (actual, expected))
            torch.testing.assert_close(found, wanted)


@BACKENDS
def test_compiled_dropout_with_and_without_checkpointing(device, backend):
    """The compiled mask is one mask: dx is zero exactly where the adapter's input was dropped."""
    x, A, B = (torch.randn(s).to(device) for s in ((8, 64), (4, 64), (5, 4)))
    W = torch.zeros(5, 64, device=device)
    x.requires_grad_()

    def layer(x):
        return tfl.lora_linear(x, W, None, A, B, 1.0, 0.5, training=True)

    def checkpointed(x):
        return checkpoint(layer, x, use_reentrant=False)

    for function in (layer, checkpointed):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        y = compiled(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        dropped = grad == 0
        assert 0.3 < dropped.float().mean() < 0.7
        torch.testing.assert_close(y.detach(), (x.detach() * ~dropped * 2) @ A.T @ B.T)


def test_a_changing_float_scaling_does_not_recompile(device):
    a = operands(device=device)[:5]
    counter = CompileCounter()
    compiled = torch.compile(lambda s: tfl.lora_linear(*a, s), backend=counter, fullgraph=True)
    for i in range(6):
        torch.testing.assert_close(compiled(0.5 + i), tfl.lora_linear(*a, 0.5 + i))
    assert counter.frame_count <= 2  # the first float is a constant, from the second on it is symbolic
    counter = CompileCounter()
    compiled = torch.compile(lambda s: tfl.lora_linear(*a, s), backend=counter, fullgraph=True)
    for i in range(6):
        torch.testing.assert_close(compiled(torch.tensor(0.5 + i)), tfl.lora_linear(*a, 0.5 + i))
    assert counter.frame_count == 1


def test_dynamic_shapes_compile_once(device):
    _, *rest = operands(device=device)
    counter = CompileCounter()
    compiled = torch.compile(tfl.lora_linear, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 9, 12):  # other numbers than K, N and r, which would be taken for them
        x = torch.randn(rows, 3, device=device)
        torch.testing.assert_close(compiled(x, *rest), tfl.lora_linear(x, *rest))
    assert counter.frame_count == 1


def test_compiled_func_grad(device):
    x, W, b, A, B, _ = operands(needs=False, device=device)

    def loss(A):
        return tfl.lora_linear(x, W, b, A, B, 0.5).sin().sum()

    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(A), torch.func.grad(loss)(A))


def compiled_targets(device) -> list[str]:
    x, weight, bias, lora_A, lora_B, _ = operands(device=device)
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def layers(x):
        return tfl.softmax(tfl.rms_norm(tfl.lora_linear(x, weight, bias, lora_A, lora_B)))

    torch.compile(layers, backend=backend, fullgraph=True)(x)
    return targets


def test_the_compiled_graph_holds_the_operators(device):
    """The short way and torch's own calls are for those who do not compile: here they would be seen as such."""
    targets = compiled_targets(device)
    for name in ("lora_linear_forward", "rms_norm_forward", "softmax_forward"):
        assert f"torch_fused_lora.{name}.default" in targets, targets


@pytest.mark.usefixtures("by_itself")
def test_inductor_sees_torchs_own_calls_where_kernels_are_portable(device):
    own = [target for target in compiled_targets(device) if target.startswith("torch_fused_lora.")]
    assert len(own) == (3 if device.type == "mps" else 0)


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float32, None), (torch.bfloat16, torch.float32)])
def test_compiled_torch_calls_compute_the_layer(dtype, adapter_dtype, dropout_p):
    a = operands(dtype, adapter_dtype)
    eager = tfl.lora_linear(*a)
    compiled = torch.compile(tfl.lora_linear, fullgraph=True)
    y = compiled(*a, dropout_p, True)
    if dropout_p == 0.0:
        tolerance = {} if dtype == torch.float32 else {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0.01}
        torch.testing.assert_close(y, eager, **tolerance)
    else:
        assert not torch.equal(y, compiled(*a, dropout_p, True))
    y.float().sum().backward()
    assert all(t.grad is not None for t in a if t is not None and t.requires_grad)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = tfl.LoRALinear(3, 5, r=2)
        torch.nn.init.normal_(self.layer.lora_B)

    def forward(self, x):
        return self.layer(x).relu()


@pytest.mark.parametrize("strict", [False, True])
def test_export(device, strict):
    model, x = Module().eval().to(device), torch.randn(4, 3, device=device)
    with tfl.keep_operators():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("torch_fused_lora.") for target in targets), targets
    y = torch.randn(9, 3, device=device)
    torch.testing.assert_close(program.module()(y), model(y))
    torch.testing.assert_close(program.run_decompositions().module()(y), model(y))


def test_fake_tensors_do_not_leak_into_the_scaling_cache():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        a = operands()[:5]
        assert tfl.lora_linear(*a, 0.777).shape == (4, 5)
    a = operands()[:5]
    grads = torch.autograd.grad(tfl.lora_linear(*a, 0.777).sum(), a)
    assert all(type(grad) is torch.Tensor and torch.isfinite(grad).all() for grad in grads)


def test_a_profile_names_the_operator(device):
    a = operands(device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tfl.lora_linear(*a).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"torch_fused_lora::lora_linear_forward", "torch_fused_lora::lora_linear_backward"} <= names


def test_stacked_adapters_compile(device):
    x, W, b, A, B = (torch.randn(s, device=device) for s in ((4, 3), (5, 3), (5,), (3, 3), (5, 3)))
    A.requires_grad_(), B.requires_grad_()
    compiled = torch.compile(lora_linear_stacked, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, W, b, A, B, 1.0, (0.0, 0.0), (1, 2)), lora_linear_stacked(x, W, b, A, B, 1.0)
    )
    y = compiled(x, W, b, A, B, 1.0, (0.5, 0.5), (1, 2))
    torch.autograd.grad(y.sum(), (A, B))
