"""``softmax`` with its own backward: ``softmax(x, dim) -> y`` and ``softmax_backward(grad, y, dim) -> dx``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import torch_private
from ..torch_private import below_autograd, is_legacy_batched
from .dispatch import (
    NAMESPACE,
    PLAIN_TYPES,
    PORTABLE,
    Maybe,
    as_given,
    autocast,
    below_autocast,
    by_torch,
    casting,
    define,
    differentiable_backward,
    differentiable_forward,
    fake,
    kernel,
    refuse,
    refuse_mps,
    to_float,
    unwatched,
)

define("softmax", "(Tensor x, int dim=-1) -> Tensor")
define("softmax_backward", "(Tensor grad, Tensor y, int dim) -> Tensor")
_ops = getattr(torch.ops, NAMESPACE)
_forward_op = _ops.softmax.default
_backward_op = _ops.softmax_backward.default


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """``exp(x) / sum(exp(x))`` along a dimension, in x's dtype, contiguous; as torch.softmax, special values included.

    The largest element of a row is subtracted first; -inf gives 0, a row of nothing but -inf, or with NaN or +inf in
    it, NaN. Along the last dimension all is computed in float32 (float64 for float64) and rounded once, on mps by this
    package's Metal kernels; otherwise it is torch's own kernel. Differentiable twice; saves y. Under autocast as
    torch.softmax: cast to float32 on CUDA, XPU and mps, as it is on the CPU.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        dim: -x.dim() to x.dim() - 1.

    Raises:
        TypeError: x is not a tensor, or dim not an int.
        ValueError: another dtype, or a sparse x.
        IndexError: a dimension that x does not have.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if not isinstance(dim, (int, torch.SymInt)) or isinstance(dim, bool):
        raise TypeError(f"dim: expected an int, got {dim!r}")
    device_type = x.device.type
    if by_torch(x):
        return _differentiable(x, dim)
    if unwatched(device_type) and type(x) in PLAIN_TYPES:  # nobody wants to see the operator: the shortest way
        if device_type in PORTABLE:
            _check(x, dim)
            return torch.softmax(x, dim).contiguous()
        return _with_autograd(_device_forward, x, dim)
    return _forward_op(x, dim)


def _check(x: Tensor, dim: int, operator: str = "softmax", name: str = "x") -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        refuse(operator, name, x, "float16, bfloat16, float32 or float64")
    if x.layout is not torch.strided and not x.is_nested:
        refuse(operator, name, x, "a dense tensor")
    most = max(x.dim(), 1)
    if not -most <= dim < most:
        raise IndexError(
            f"{operator}: dim: expected {-most} to {most - 1}, since {name} has {x.dim()} dimensions; got {dim}"
        )


def _check_backward(grad: Tensor, y: Tensor, dim: int) -> None:
    _check(y, dim, "softmax_backward", "y")
    if grad.shape != y.shape or grad.dtype != y.dtype or grad.device != y.device:
        refuse("softmax_backward", "grad", grad, f"shape {tuple(y.shape)}, {y.dtype}, on {y.device}, as y")


# ------------------------------------------------------------------------------------------ kernels and shapes


@kernel("softmax", "CompositeExplicitAutograd")
def _portable(x: Tensor, dim: int = -1) -> Tensor:
    _check(x, dim)
    refuse_mps("softmax", x, "use torch.softmax")
    return torch_private.softmax(x, dim, False).contiguous()


@kernel("softmax_backward", "CompositeExplicitAutograd")
def _portable_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    _check_backward(grad, y, dim)
    return torch_private.softmax_backward(grad, y, dim, y.dtype).contiguous()


@fake("softmax")
def _fake(x: Tensor, dim: int = -1) -> Tensor:
    _check(x, dim)
    return x.new_empty(x.shape)


@fake("softmax_backward")
def _fake_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    _check_backward(grad, y, dim)
    return y.new_empty(y.shape)


def _differentiable(x: Tensor, dim: int = -1) -> Tensor:
    _check(x, dim)
    return torch.softmax(x, dim).contiguous()


def _gradient(grad: Tensor, y: Tensor, dim: int) -> Tensor:
    """dx = y (grad - Σ y grad), in differentiable aten calls."""
    wide = y if y.dtype == torch.float64 else y.float()
    return (wide * (grad - (wide * grad).sum(dim, keepdim=True))).to(y.dtype).contiguous()


# --------------------------------------------------------------------------------- autograd, functorch, autocast


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Tensor], x: Tensor, dim: int) -> Tensor:
        with below_autograd():
            y = kernel(x, dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled() or is_legacy_batched(grad):
            with below_autocast():
                return None, _gradient(grad, y, ctx.dim), None
        with below_autograd():
            return None, _backward_op(grad, y, ctx.dim), None


def _with_autograd(kernel: Callable[..., Tensor], x: Tensor, dim: int = -1) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Softmax.apply(kernel, x, dim)
    with below_autograd():
        return kernel(x, dim)


_device_forward = differentiable_forward("softmax", _check, _with_autograd, _differentiable)
differentiable_backward("softmax_backward", _check_backward, _gradient)

_CASTING = casting(torch.ops.aten.softmax.int)


def _cast(device_type: str, x: Tensor, dim: int = -1) -> tuple[Any, ...]:
    return to_float(x) if device_type in _CASTING else x, dim


autocast("softmax", _cast)
autocast("softmax_backward", as_given)
