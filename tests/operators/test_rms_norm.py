"""rms_norm: values and gradients against float64, and everything that PyTorch asks of an operator."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_fused_lora as tfl
from tests.budget import examples
from tests.operators.test_compile import OPCHECKS
from tests.operators.test_lora_linear import DTYPES as LORA_DTYPES
from tests.operators.test_lora_linear import LAYOUTS, laid_out
from tests.reference import Exact

ops = torch.ops.torch_fused_lora
EPS = 1e-5
# x, weight
DTYPES = [*LORA_DTYPES, (torch.float64, torch.float32), (torch.float32, None), (torch.float16, None)]
ON_MPS = [dtypes for dtypes in DTYPES if dtypes[0] != torch.float64]


def exact(x: Tensor, weight: Tensor | None, grad: Tensor) -> tuple[Exact, Exact, Exact]:
    """y, dx and dweight. rstd = (mean of squares + eps)^(-1/2) is off by half of what that sum is, relatively."""
    H, x, grad = x.shape[-1], x.detach().cpu().double(), grad.cpu().double()
    w = weight.detach().cpu().double() if weight is not None else torch.ones(H).double()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    normed, scaled = x * rstd, grad * w
    y = normed * w
    pull, pull_magnitude = (f(scaled * normed).mean(-1, keepdim=True) for f in (lambda t: t, torch.abs))
    dx = rstd * (scaled - normed * pull)
    dx_magnitude = rstd * (scaled.abs() + normed.abs() * pull_magnitude)
    dweight, dweight_magnitude = (f(grad * normed).reshape(-1, H).sum(0) for f in (lambda t: t, torch.abs))
    M = x[..., 0].numel()
    return Exact(y, y.abs(), H), Exact(dx, dx_magnitude, 3 * H), Exact(dweight, dweight_magnitude, M + H)


def test_output_and_gradients(device):
    on_cpu = device.type == "cpu"

    @settings(max_examples=examples(150 if on_cpu else 40))
    @given(
        lead=st.sampled_from([(), (1,), (7,), (33,), (0,), (2, 3), (2, 0, 3), (2, 1, 2, 5)]),
        H=st.sampled_from([1, 5, 8, 64, 130]),
        dtypes=st.sampled_from(DTYPES if on_cpu else ON_MPS),
        layout=st.sampled_from(LAYOUTS),
        scale=st.sampled_from([1e-4, 1.0, 100.0]),
        needs=st.tuples(st.booleans(), st.booleans()),
    )
    def check(lead, H, dtypes, layout, scale, needs):
        dtype, weight_dtype = dtypes
        x = laid_out((*lead, H), dtype, layout, scale, device).requires_grad_(needs[0])
        weight = laid_out((H,), weight_dtype, layout, device=device) if weight_dtype is not None else None
        if weight is not None:
            weight.requires_grad_(needs[1])
        grad = laid_out((*lead, H), dtype, layout, device=device)
        exact_y, exact_dx, exact_dweight = exact(x, weight, grad)
        with torch.no_grad():
            exact_y.check(tfl.rms_norm(x, weight, EPS))
        y = tfl.rms_norm(x, weight, EPS)
        assert y.dtype == dtype
        assert y.is_contiguous()
        exact_y.check(y.detach())
        leaves = [t for t in (x, weight) if t is not None and t.requires_grad]
        if leaves:
            found = dict(zip(map(id, leaves), torch.autograd.grad(y, leaves, grad), strict=True))
            if id(x) in found:
                assert found[id(x)].dtype == dtype
                exact_dx.check(found[id(x)], "dx")
            if id(weight) in found:
                assert found[id(weight)].dtype == weight_dtype
                exact_dweight.check(found[id(weight)], "dweight")

    check()


@pytest.mark.parametrize(("M", "H"), [(3, 4096), (2, 5001), (700, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_and_many(device, dtype, M, H):
    x, weight, grad = (torch.randn(s).to(device, dtype) for s in ((M, H), (H,), (M, H)))
    x.requires_grad_(), weight.requires_grad_()
    y = tfl.rms_norm(x, weight, EPS)
    found = torch.autograd.grad(y, (x, weight), grad)
    again = torch.autograd.grad(tfl.rms_norm(x, weight, EPS), (x, weight), grad)
    for value, actual, name in zip(exact(x, weight, grad), (y.detach(), *found), ("y", "dx", "dweight"), strict=True):
        value.check(actual, name)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_torch_computes_it_in_float32(device, dtype):
    """Half results are within one unit in the last place of torch's, rounded once; its own on the CPU."""
    x, weight = (torch.randn(s).to(dtype) for s in ((64, 300), (300,)))
    expected = F.rms_norm(x.float(), (300,), weight.float(), EPS).to(dtype)
    actual = tfl.rms_norm(x.to(device), weight.to(device), EPS).cpu()
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    else:
        bits = actual.view(torch.int16).int() - expected.view(torch.int16).int()
        assert bits.abs().max() <= 1


def test_gradcheck():
    x, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    x.requires_grad_(), weight.requires_grad_()
    for arguments in ((x, weight), (x, None), (x.detach(), weight), (x, weight.detach())):
        function = partial(tfl.rms_norm, eps=1e-3)
        assert torch.autograd.gradcheck(function, arguments, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, arguments)
    assert torch.autograd.gradcheck(lambda x: tfl.rms_norm(x, weight.detach()), (x,), check_forward_ad=True)


def test_gradgradcheck_of_the_backward_operator():
    grad, x, weight, rstd = (torch.randn(s, dtype=torch.float64) for s in ((3, 5), (3, 5), (5,), (3, 1)))
    inputs = [t.requires_grad_() for t in (grad, x, weight, rstd)]
    assert torch.autograd.gradcheck(lambda *t: tuple(ops.rms_norm_backward(*t, [True, True])), inputs)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [ON_MPS[i] for i in (0, 1, 4, 5)])
def test_opcheck(device, dtype, weight_dtype):
    opcheck = partial(torch.library.opcheck, test_utils=OPCHECKS[device.type])
    x = torch.randn(2, 3, 8).to(device, dtype).requires_grad_()
    weight = torch.randn(8).to(device, weight_dtype).requires_grad_() if weight_dtype is not None else None
    opcheck(ops.rms_norm, (x, weight))
    opcheck(ops.rms_norm_forward, (x, weight, EPS))
    rstd = ops.rms_norm_forward(x.detach(), None, EPS)[1]
    grad = torch.randn_like(x)
    opcheck(ops.rms_norm_backward, (grad, x.detach(), weight, rstd, [True, weight is not None]))


def test_compile_and_export(device):
    x, weight = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    x.requires_grad_(), weight.requires_grad_()
    backends = ("aot_eager", "inductor") if device.type == "cpu" else ("aot_eager",)
    for backend in backends:
        compiled = torch.compile(lambda x, w: tfl.rms_norm(x, w) * 2, fullgraph=True, backend=backend)
        actual, expected = compiled(x, weight), tfl.rms_norm(x, weight) * 2
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sin().sum(), (x, weight)), torch.autograd.grad(expected.sin().sum(), (x, weight))
        )


def test_functorch(device):
    x, weight = torch.randn(6, 4, 8, device=device), torch.randn(6, 8, device=device)
    torch.testing.assert_close(
        torch.vmap(tfl.rms_norm)(x, weight), torch.stack([tfl.rms_norm(a, b) for a, b in zip(x, weight, strict=True)])
    )
    loss = lambda w: tfl.rms_norm(x, w).sin().sum()  # noqa: E731
    w = weight[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(w), torch.autograd.grad(loss(w), w)[0])
    tangents = torch.randn(8, device=device)
    _, tangent = torch.func.jvp(lambda w: tfl.rms_norm(x, w), (w.detach(),), (tangents,))
    torch.testing.assert_close(tangent, tfl.rms_norm(x, tangents))  # linear in the weight


def test_autocast_is_torchs_own(device):
    """float32 where F.rms_norm is cast, otherwise as it is."""
    x, weight = torch.randn(3, 8, device=device).bfloat16(), torch.randn(8, device=device).bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="x: expected float16"):
            tfl.rms_norm(x.int())
        assert tfl.rms_norm(x, weight).dtype == F.rms_norm(x, (8,), weight).dtype


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(3, 4), torch.ones(5), r"weight: expected shape \(4,\)"),
        (torch.ones(3, 4), torch.ones(4, 1), r"weight: expected shape \(4,\)"),
        (torch.ones(3, 4), torch.ones(4).half(), r"weight: expected x's dtype torch.float32"),
        (torch.ones(3, 4).int(), None, "x: expected float16"),
        (torch.ones(()), None, r"x: expected shape \(..., H\)"),
        (torch.ones(3, 0), None, r"x: expected shape \(..., H\)"),
    ],
)
def test_errors(device, x, weight, message):
    x, weight = x.to(device), weight.to(device) if weight is not None else None
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        tfl.rms_norm(x, weight)


@pytest.mark.parametrize("needs", [[True, False], [True, True], [True]])
def test_errors_of_the_backward_operator(device, needs):
    x, grad = (torch.randn(2, 3, 8, device=device) for _ in range(2))
    rstd = ops.rms_norm_forward(x, None, EPS)[1]
    if needs != [True, False]:
        with pytest.raises((ValueError, RuntimeError), match="needs"):
            ops.rms_norm_backward(grad, x, None, rstd, needs)
        return
    for message, arguments in {
        "grad: expected": (grad.transpose(0, 1), x, None, rstd),
        r"grad: expected .*torch.float32": (grad.half(), x, None, rstd),
        r"rstd: expected shape \(2, 3, 1\)": (grad, x, None, rstd.reshape(3, 2, 1)),
        r"rstd: expected .*torch.float32": (grad, x, None, rstd.half()),
    }.items():
        with pytest.raises(ValueError, match=f"rms_norm_backward: {message}"):
            ops.rms_norm_backward(*arguments, needs)


def test_the_same_bits_with_and_without_a_gradient(device):
    """So that a checkpointed layer recomputes what it computed."""
    for shape in ((64, 300), (600, 1024)):
        x, weight = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
        plain = tfl.rms_norm(x, weight)
        assert torch.equal(tfl.rms_norm(x.requires_grad_(), weight), plain)
        assert torch.equal(ops.rms_norm(x.detach(), weight), plain)


def test_type_errors():
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        tfl.rms_norm([1.0])
    with pytest.raises(TypeError, match="weight: expected a Tensor or None, got float"):
        tfl.rms_norm(torch.ones(3), 1.0)
    for eps in (None, torch.tensor(1e-6)):
        with pytest.raises(TypeError, match="eps: expected a number, got"):
            tfl.rms_norm(torch.ones(3), None, eps)
