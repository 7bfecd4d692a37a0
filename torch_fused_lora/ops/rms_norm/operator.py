"""``rms_norm``: x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv:1910.07467), with its own backward.

``rms_norm(x, weight, eps) -> y``
    The public operator: ``rms_norm_forward`` without rstd.
``rms_norm_forward(x, weight, eps) -> (y, rstd)``
    rstd = (mean(x²) + eps)^-½, a number a row, (..., 1), in float32 (float64 for float64): all that backward keeps
    beside x and weight.
``rms_norm_backward(grad, x, weight, rstd, needs) -> Tensor[]``
    Of dx and dweight those asked for.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import (
    NAMESPACE,
    Flags,
    Maybe,
    Pair,
    Saved,
    are_plain,
    autocast_enabled,
    casting,
    define,
    implement,
    route,
    savable,
    to_float,
)
from ..rows import DTYPES, DTYPES_TEXT, wide_dtype
from . import differentiable, portable


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension (RMSNorm, arXiv:1910.07467).

    Args:
        x: (..., H), 1-D or more, any strides; half, float32 or float64.
        weight: (H,), of x's dtype or float32, or None for none.
        eps: added to the mean of squares.

    Returns:
        (..., H) in x's dtype, contiguous. All is computed in float32 (float64 for float64) and rounded once.

    Differentiable twice; saves x, weight and one number a row. Under autocast as torch.nn.functional.rms_norm: cast to
    float32 on CUDA and XPU, as it is elsewhere.

    Raises:
        TypeError: x or weight is not a tensor, or eps not a number.
        ValueError: a shape, dtype or device that does not fit; a sparse x or weight.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor or None, got {type(weight).__name__}")
    if not isinstance(eps, (float, numbers.Real, torch.SymFloat)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    return rms_norm_for(x, weight, eps)


def rms_norm_for(x: Tensor, weight: Maybe, eps: float, caller: str | None = None) -> Tensor:
    """`rms_norm` of operands of the right types. Errors of backward name ``caller``, the module that calls."""
    way = route(x)
    if way is dispatch.BY_TORCH:
        device_type = x.device.type
        if autocast_enabled(device_type):
            x, weight, eps = _RMSNorm.cast(device_type, x, weight, eps)
        return differentiable.forward(x, weight, eps)[0]
    if not are_plain(weight):
        way = dispatch.BY_DISPATCHER
    elif way is dispatch.BY_PORTABLE and portable.by_torch(x, weight):
        _RMSNorm.check(x, weight, eps)
        return torch.rms_norm(x, x.shape[-1:], weight, eps).contiguous()
    return _operator.call(way, caller, (x, weight), eps)


class _RMSNorm(dispatch.Operator):
    name = "rms_norm"
    schemas = (
        "(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, bool[2] needs) -> Tensor[]",
    )
    inputs = 2
    patch = "patch_norms"
    instead = "use torch.nn.functional.rms_norm"

    @staticmethod
    def check(x: Tensor, weight: Maybe, eps: float) -> None:
        refuse = functools.partial(dispatch.refuse, "rms_norm")
        if x.dim() < 1 or x.shape[-1] < 1:
            refuse("x", x, "shape (..., H) with H >= 1")
        if x.dtype not in DTYPES:
            refuse("x", x, DTYPES_TEXT)
        if weight is None:
            return
        if weight.shape != x.shape[-1:] or weight.device != x.device:
            refuse("weight", weight, f"shape ({x.shape[-1]},), the last dimension of x, on x's device {x.device}")
        if weight.dtype not in (x.dtype, torch.float32):
            refuse("weight", weight, f"x's dtype {x.dtype} or torch.float32")

    @staticmethod
    def check_backward(grad: Tensor, x: Tensor, weight: Maybe, rstd: Tensor, needs: Flags) -> None:
        _RMSNorm.check(x, weight, 0.0)
        refuse = functools.partial(dispatch.refuse, "rms_norm_backward")
        rows = (*x.shape[:-1], 1)
        for name, value, shape, dtype in (
            ("grad", grad, x.shape, x.dtype),
            ("rstd", rstd, rows, wide_dtype(x.dtype)),
        ):
            if value.shape != shape or value.dtype != dtype or value.device != x.device:
                refuse(name, value, f"shape {tuple(shape)}, {dtype}, on {x.device}")
        if len(needs) != 2 or (needs[1] and weight is None):
            refuse("needs", list(needs), "two flags, the second for a weight")

    forward = staticmethod(portable.forward)
    backward = staticmethod(portable.backward)
    twin = staticmethod(differentiable.forward)
    twin_backward = staticmethod(differentiable.backward)

    @staticmethod
    def shapes(x: Tensor, weight: Maybe, eps: float) -> Pair:
        return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide_dtype(x.dtype))

    @staticmethod
    def shapes_backward(grad: Tensor, x: Tensor, weight: Saved, rstd: Tensor, needs: Flags) -> tuple[Maybe, Maybe]:
        return x.new_empty(x.shape) if needs[0] else None, weight.new_empty(weight.shape) if needs[1] else None

    @staticmethod
    def cast(device_type: str, x: Tensor, weight: Maybe, eps: float) -> tuple[Any, ...]:
        return *(t if t is None or device_type not in _CASTING else to_float(t) for t in (x, weight)), eps

    @staticmethod
    def record(
        kernel: Callable[..., Pair], needs: Flags, x: Tensor, weight: Maybe, eps: float
    ) -> tuple[Pair, tuple[Maybe, ...], float]:
        results = kernel(x, weight, eps)
        return results, (savable(x), weight, results[1]), eps

    @staticmethod
    def restore(saved: tuple[Any, ...], eps: float, needs: Flags, anew: bool) -> tuple[Any, ...]:
        x, weight, rstd = saved
        return x, weight, differentiable.rstd_of(x, eps) if anew else rstd, needs


_CASTING = casting(torch.ops.aten.rms_norm.default)
_operator = _RMSNorm()
define("rms_norm", "(Tensor x, Tensor? weight, float eps=1e-6) -> Tensor")


def _public(x: Tensor, weight: Maybe, eps: float = 1e-6) -> Tensor:
    return getattr(torch.ops, NAMESPACE).rms_norm_forward(x, weight, eps)[0]


implement("rms_norm", _public, "CompositeImplicitAutograd", "FuncTorchBatched")
