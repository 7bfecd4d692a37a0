"""``softmax`` with its own backward.

``softmax(x, dim) -> y``
    The public operator; ``softmax_forward`` is the same, as every public operator has one of that name.
``softmax_backward(grad, y, dim) -> dx``
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import torch_private
from .. import dispatch
from ..dispatch import NAMESPACE, Flags, casting, define, implement, refuse, route, to_float
from ..rows import DTYPES, DTYPES_TEXT, wide_dtype


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """``exp(x) / sum(exp(x))`` along a dimension, in x's dtype, contiguous; as torch.softmax, special values included.

    The largest element of a row is subtracted first; -inf gives 0, a row of nothing but -inf, or with NaN or +inf in
    it, NaN. Along the last dimension all is computed in float32 (float64 for float64) and rounded once, on mps by this
    package's Metal kernels; otherwise it is torch's own kernel. Differentiable twice; saves y. Under autocast as
    torch.softmax: cast to float32 on CUDA, XPU and mps, as it is on the CPU.

    Args:
        x: any shape and strides; half, float32 or float64.
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
    way = route(x)
    if way is dispatch.BY_TORCH or way is dispatch.BY_PORTABLE:
        _Softmax.check(x, dim)
        return torch.softmax(x, dim).contiguous()
    return _operator.call(way, None, (x,), dim)


def _check(x: Tensor, dim: int, operator: str, name: str) -> None:
    if x.dtype not in DTYPES:
        refuse(operator, name, x, DTYPES_TEXT)
    most = max(x.dim(), 1)
    if not -most <= dim < most:
        raise IndexError(
            f"{operator}: dim: expected {-most} to {most - 1}, since {name} has {x.dim()} dimensions; got {dim}"
        )


class _Softmax(dispatch.Operator):
    name = "softmax"
    schemas = "(Tensor x, int dim) -> Tensor", "(Tensor grad, Tensor y, int dim) -> Tensor"
    inputs = 1
    instead = "use torch.softmax"

    @staticmethod
    def check(x: Tensor, dim: int) -> None:
        _check(x, dim, "softmax", "x")

    @staticmethod
    def check_backward(grad: Tensor, y: Tensor, dim: int) -> None:
        _check(y, dim, "softmax_backward", "y")
        if grad.shape != y.shape or grad.dtype != y.dtype or grad.device != y.device:
            refuse("softmax_backward", "grad", grad, f"shape {tuple(y.shape)}, {y.dtype}, on {y.device}, as y")

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return torch_private.softmax(x, dim, False).contiguous()

    @staticmethod
    def backward(grad: Tensor, y: Tensor, dim: int) -> tuple[Tensor]:
        return (torch_private.softmax_backward(grad, y, dim, y.dtype).contiguous(),)

    @staticmethod
    def shapes(x: Tensor, dim: int) -> Tensor:
        return x.new_empty(x.shape)

    @staticmethod
    def shapes_backward(grad: Tensor, y: Tensor, dim: int) -> tuple[Tensor]:
        return (y.new_empty(y.shape),)

    @staticmethod
    def twin(x: Tensor, dim: int) -> Tensor:
        return torch.softmax(x, dim).contiguous()

    @staticmethod
    def twin_backward(grad: Tensor, _: None, y: Tensor, dim: int) -> tuple[Tensor]:
        """dx = y (grad - Σ y grad)."""
        wide = y.to(wide_dtype(y.dtype))
        return ((wide * (grad - (wide * grad).sum(dim, keepdim=True))).to(y.dtype).contiguous(),)

    @staticmethod
    def cast(device_type: str, x: Tensor, dim: int) -> tuple[Tensor, int]:
        return to_float(x) if device_type in _CASTING else x, dim

    @staticmethod
    def record(kernel: Callable[..., Tensor], needs: Flags, x: Tensor, dim: int) -> tuple[Tensor, tuple[Tensor], int]:
        y = kernel(x, dim)
        return y, (y,), dim

    @staticmethod
    def restore(saved: tuple[Tensor], dim: int, needs: Flags, anew: bool) -> tuple[Tensor, int]:
        return *saved, dim


_CASTING = casting(torch.ops.aten.softmax.int)
_operator = _Softmax()
define("softmax", "(Tensor x, int dim=-1) -> Tensor")


def _public(x: Tensor, dim: int = -1) -> Tensor:
    return getattr(torch.ops, NAMESPACE).softmax_forward(x, dim)


implement("softmax", _public, "CompositeImplicitAutograd", "FuncTorchBatched")
