"""softmax: values and gradients against float64 and torch, and everything that PyTorch asks of an operator."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_fused_lora as tfl
from tests.budget import examples
from tests.operators.test_compile import OPCHECKS
from tests.operators.test_lora_linear import LAYOUTS, laid_out
from tests.reference import NARROW, Exact

ops = torch.ops.torch_fused_lora
DTYPES = (torch.float64, *NARROW)


def test_output_and_gradient(device):
    on_cpu = device.type == "cpu"

    @settings(max_examples=examples(150 if on_cpu else 40))
    @given(
        shape=st.sampled_from([(), (1,), (9,), (7, 5), (33, 130), (0, 4), (3, 0), (2, 3, 64), (2, 1, 2, 300)]),
        dtype=st.sampled_from(DTYPES if on_cpu else DTYPES[1:]),
        layout=st.sampled_from(LAYOUTS),
        scale=st.sampled_from([1e-2, 1.0, 20.0]),
        dim=st.integers(-4, 3),
        softmax=st.sampled_from([tfl.softmax, ops.softmax]),
    )
    def check(shape, dtype, layout, scale, dim, softmax):
        x = laid_out(shape, dtype, layout, scale, device).requires_grad_()
        if not -max(len(shape), 1) <= dim < max(len(shape), 1):
            with pytest.raises(IndexError, match="softmax: dim: expected"):
                softmax(x, dim)
            return
        y = softmax(x, dim)
        assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, shape, True)
        grad = laid_out(shape, dtype, layout, device=device)
        (dx,) = torch.autograd.grad(y, x, grad)
        wide, y, g = x.detach().cpu().double(), y.detach(), grad.cpu().double()
        if y.numel() == 0:
            return
        terms = shape[dim] if shape else 1
        exact = torch.softmax(wide, dim)
        # exp's argument x - max is rounded, which weighs by its size.
        distance = wide.amax(dim, keepdim=True) - wide
        # Along another dimension than the last it is torch's kernel, which on a CPU rounds half numbers twice.
        rounded = 0.0 if dim in (-1, x.dim() - 1) else 2 * exact
        Exact(exact, exact * (1 + distance), terms + 8, rounded).check(y)
        # The gradient from y as it was rounded.
        y = y.cpu().double()
        value = y * (g - (y * g).sum(dim, keepdim=True))
        magnitude = y * (g.abs() + (y * g.abs()).sum(dim, keepdim=True))
        Exact(value, magnitude, terms + 4, magnitude if isinstance(rounded, torch.Tensor) else 0.0).check(dx, "dx")

    check()


@pytest.mark.parametrize("H", [3, 300, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_values_are_torchs(device, dtype, H):
    inf, nan = float("inf"), float("nan")
    x = torch.randn(9, H)
    x[0], x[1, 1:], x[2, 0], x[3, 1], x[4, -1] = -inf, -inf, -inf, nan, inf
    x[5] *= 1e4
    x[6] = -1e4
    x[7, 1] = 1e4
    x[8, 1] = -1e4
    x = x.to(dtype)
    expected = torch.softmax(x.float(), -1).to(dtype)
    actual = tfl.softmax(x.to(device)).cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual == 0, expected == 0)
    if dtype == torch.float32:
        assert (actual - expected).nan_to_num().abs().max() <= 1e-6
    else:
        bits = (actual.view(torch.int16).int() - expected.view(torch.int16).int())[~expected.isnan()]
        assert bits.abs().max() <= 1


def test_gradcheck():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    for dim in (-1, 0, 1):
        assert torch.autograd.gradcheck(lambda x, dim=dim: ops.softmax(x, dim), (x,), check_forward_ad=True)
        assert torch.autograd.gradcheck(lambda x, dim=dim: ops.softmax(x, dim), (x,), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x, dim=dim: ops.softmax(x, dim), (x,))
    grad, y = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, y: ops.softmax_backward(g, y, -1), (grad, y))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim", [-1, 0])
def test_opcheck(device, dtype, dim):
    opcheck = partial(torch.library.opcheck, test_utils=OPCHECKS[device.type])
    x = torch.randn(4, 3, 8).to(device, dtype).requires_grad_()
    opcheck(ops.softmax, (x, dim))
    opcheck(ops.softmax_backward, (x.detach(), torch.softmax(x.detach(), dim), dim))


def test_compile(device):
    x = torch.randn(4, 8, device=device, requires_grad=True)
    for backend in ("aot_eager", "inductor") if device.type == "cpu" else ("aot_eager",):
        compiled = torch.compile(lambda x: tfl.softmax(x) * 2, fullgraph=True, backend=backend)
        actual, expected = compiled(x), torch.softmax(x, -1) * 2
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x)
        )


def test_functorch(device):
    x = torch.randn(6, 4, 8, device=device)
    torch.testing.assert_close(torch.vmap(tfl.softmax)(x), torch.softmax(x, -1))
    loss = lambda x: tfl.softmax(x).sin().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(lambda x: torch.softmax(x, -1).sin().sum())(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_torchs_own(device, dtype):
    """float32 where torch.softmax is cast, otherwise as it is."""
    x = torch.randn(3, 8, device=device).to(dtype)
    with torch.autocast(device.type, dtype=dtype):
        with pytest.raises(ValueError, match="x: expected float16"):
            tfl.softmax(x.int())
        assert tfl.softmax(x).dtype == torch.softmax(x, -1).dtype


def test_errors(device):
    with pytest.raises(ValueError, match="softmax: x: expected float16"):
        tfl.softmax(torch.ones(3, dtype=torch.int32, device=device))
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        tfl.softmax([1.0])
    x = torch.randn(2, 3, device=device)
    for message, arguments in {
        "grad: expected": (x.t(), x, -1),
        r"grad: expected .*torch.float32": (x.half(), x, -1),
        "y: expected float16": (x.int(), x.int(), -1),
    }.items():
        with pytest.raises(ValueError, match=f"softmax_backward: {message}"):
            ops.softmax_backward(*arguments)
    with pytest.raises(IndexError, match="softmax_backward: dim: expected -2 to 1"):
        ops.softmax_backward(x, x, 2)
