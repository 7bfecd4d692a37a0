"""``rms_norm``: x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv:1910.07467), with its own backward.

Three operators are registered:

``rms_norm(x, weight, eps) -> y``
    The public one: `_rms_norm` without rstd.
``_rms_norm(x, weight, eps) -> (y, rstd)``
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

from ..torch_private import (
    apply_of,
    below_autograd,
    fused_rms_norm,
    fused_rms_norm_backward,
    is_legacy_batched,
)
from . import dispatch
from .dispatch import (
    NAMESPACE,
    PLAIN_OR_NONE,
    PORTABLE,
    Flags,
    Maybe,
    Pair,
    Saved,
    as_given,
    autocast,
    autocast_enabled,
    below_autocast,
    by_torch,
    casting,
    define,
    differentiable_backward,
    differentiable_forward,
    fake,
    kernel,
    refuse_mps,
    refuse_sparse,
    saved_tensors,
    tell_caller,
    to_float,
    unwatched,
)
from .portable import flat

define("rms_norm", "(Tensor x, Tensor? weight, float eps=1e-6) -> Tensor")
define("_rms_norm", "(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)")
define("rms_norm_backward", "(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, bool[2] needs) -> Tensor[]")
_ops = getattr(torch.ops, NAMESPACE)
_forward_op = _ops._rms_norm.default
_backward_op = _ops.rms_norm_backward.default


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension (RMSNorm, arXiv:1910.07467).

    Args:
        x: (..., H), 1-D or more, any strides; float16, bfloat16, float32 or float64.
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
    device_type = x.device.type
    if by_torch(x):
        if autocast_enabled(device_type):
            x, weight, eps = _cast(device_type, x, weight, eps)
        return _by_torch(x, weight, eps)[0]
    if not unwatched(device_type) or not PLAIN_OR_NONE.issuperset(map(type, (x, weight))):
        return tell_caller(_forward_op(x, weight, eps)[0], caller)
    # Nobody wants to see the operator: what the dispatcher would call, without its way through C++ and back.
    if device_type not in PORTABLE:
        return _with_autograd(_device_forward, x, weight, eps, caller)[0]
    if _is_alike(x, weight) and (device_type in FUSED_BY_TORCH or (x.numel() <= _FEW and not _records(x, weight))):
        _check(x, weight)
        return torch.rms_norm(x, x.shape[-1:], weight, eps).contiguous()
    return _with_autograd(_portable_forward, x, weight, eps, caller)[0]


@kernel("rms_norm", "CompositeImplicitAutograd", "FuncTorchBatched")
def _public(x: Tensor, weight: Maybe, eps: float = 1e-6) -> Tensor:
    return _forward_op(x, weight, eps)[0]


def _check(x: Tensor, weight: Maybe) -> None:
    refuse = functools.partial(dispatch.refuse, "rms_norm")
    refuse_sparse("rms_norm", x=x, weight=weight)
    if x.dim() < 1 or x.shape[-1] < 1:
        refuse("x", x, "shape (..., H) with H >= 1")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        refuse("x", x, "float16, bfloat16, float32 or float64")
    if weight is None:
        return
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        refuse("weight", weight, f"shape ({x.shape[-1]},), the last dimension of x, on x's device {x.device}")
    if weight.dtype not in (x.dtype, torch.float32):
        refuse("weight", weight, f"x's dtype {x.dtype} or torch.float32")


def _check_backward(grad: Tensor, x: Tensor, weight: Maybe, rstd: Tensor, needs: Flags) -> None:
    _check(x, weight)
    refuse = functools.partial(dispatch.refuse, "rms_norm_backward")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = (*x.shape[:-1], 1)
    for name, value, shape, dtype in (("grad", grad, x.shape, x.dtype), ("rstd", rstd, rows, wide)):
        if value.shape != shape or value.dtype != dtype or value.device != x.device:
            refuse(name, value, f"shape {tuple(shape)}, {dtype}, on {x.device}")
    if len(needs) != 2 or (needs[1] and weight is None):
        refuse("needs", list(needs), "two flags, the second for a weight")


# ------------------------------------------------------------------------------------------ kernels and shapes

# Device types on which this torch computes F.rms_norm, forward and backward, in one kernel each.
FUSED_BY_TORCH = frozenset(
    device_type
    for device_type in (*PORTABLE, "mps")
    if all(
        op and op.has_kernel_for_dispatch_key(device_type.upper()) for op in (fused_rms_norm, fused_rms_norm_backward)
    )
)


def _is_alike(x: Tensor, weight: Maybe) -> bool:
    return weight is None or weight.dtype is x.dtype


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


_FEW = 1 << 16  # elements up to which calls cost more than memory does
_BLOCK = 1 << 19  # elements of a half x that are converted at a time on a CPU, whose caches hold them


def _blocks(rows: Tensor, wide_dtype: torch.dtype) -> list[slice]:
    """Slices of the rows, all of them in one where nothing is converted or they are few."""
    M, H = rows.shape
    size = max(_BLOCK // H, 1) if rows.is_cpu and rows.dtype is not wide_dtype else M
    return [slice(None)] if size >= M else [slice(start, start + size) for start in range(0, M, size)]


def _alike(x: Tensor, weight: Maybe, *others: Tensor) -> tuple[Any, ...]:
    """The operands of torch's own kernels, which take one dtype: the wider."""
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    x_alike, *others_alike = (t.to(dtype).contiguous() for t in (x, *others))
    return x_alike, weight if weight is None else weight.to(dtype), *others_alike


def _portable_forward(x: Tensor, weight: Maybe, eps: float) -> Pair:
    _check(x, weight)
    if x.device.type in FUSED_BY_TORCH:
        operand, weight = _alike(x, weight)
        y, rstd = fused_rms_norm(operand, x.shape[-1:], weight, eps)
        return y.to(x.dtype), rstd
    wide_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The norm of a row is a pass that writes nothing.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    if x.numel() <= _FEW and _is_alike(x, weight):  # the same bits as without a gradient
        return torch.rms_norm(x, x.shape[-1:], weight, eps).contiguous(), rstd

    def normed(x: Tensor, rstd: Tensor) -> Tensor:
        found = x * rstd
        return found if weight is None else found.mul_(weight)

    blocks = _blocks(x_rows := flat(x), wide_dtype)
    if len(blocks) == 1:
        return normed(x, rstd).to(x.dtype).contiguous(), rstd
    y, rstd_rows = x.new_empty(x.shape), flat(rstd)
    for block in blocks:
        flat(y)[block] = normed(x_rows[block], rstd_rows[block])
    return y, rstd


def _portable_backward(grad: Tensor, x: Tensor, weight: Saved, rstd: Tensor, needs: Flags) -> tuple[Saved, Saved]:
    """dx = rstd (g w - x rstd² mean(g w x)) and dweight = (g x)ᵀ rstd: the sums are products with vectors."""
    _check_backward(grad, x, weight, rstd, needs)
    if x.device.type in FUSED_BY_TORCH:
        operand, wide_weight, grad = _alike(x, weight, grad)
        dx, dweight = fused_rms_norm_backward(grad, operand, x.shape[-1:], rstd, wide_weight, needs)
        return dx if dx is None else dx.to(x.dtype), dweight if dweight is None else dweight.to(weight.dtype)
    H, wide_dtype = x.shape[-1], rstd.dtype
    grad_rows, x_rows, rstd_rows = flat(grad), flat(x), flat(rstd)
    w = x.new_ones(H, dtype=wide_dtype) if weight is None else weight.to(wide_dtype)
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = x.new_zeros(H, dtype=wide_dtype) if needs[1] else None
    for block in _blocks(x_rows, wide_dtype):
        g, rows, scale = grad_rows[block].to(wide_dtype), x_rows[block].to(wide_dtype), rstd_rows[block]
        product = torch.mul(g, rows, out=rows.new_empty(rows.shape))
        if dweight is not None:
            dweight.addmv_(product.t(), scale[:, 0])
        if dx is not None:
            pull = product.mv(w)[:, None].mul_(scale.square()).div_(-H)
            torch.mul(g, w, out=product).addcmul_(rows, pull)
            torch.mul(product, scale, out=flat(dx)[block])
    return dx, dweight if dweight is None else dweight.to(weight.dtype)


@kernel("_rms_norm", "CompositeExplicitAutograd")
def _portable_kernel(x: Tensor, weight: Maybe, eps: float) -> Pair:
    refuse_mps("rms_norm", x, "use torch.nn.functional.rms_norm")
    return _portable_forward(x, weight, eps)


@kernel("rms_norm_backward", "CompositeExplicitAutograd")
def _portable_backward_kernel(grad: Tensor, x: Tensor, weight: Maybe, rstd: Tensor, needs: Flags) -> list[Tensor]:
    found = _portable_backward(grad, x, weight, rstd, needs)
    return [gradient for gradient, need in zip(found, needs, strict=True) if need]


def _gradients(grad: Tensor, x: Tensor, weight: Saved, rstd: Tensor, needs: Flags) -> list[Tensor]:
    """dx = rstd (g w - x̂ mean(g w x̂)) and dweight = Σ g x̂ with x̂ = x rstd, in differentiable aten calls."""
    normed, found = x * rstd, []
    if needs[0]:
        scaled = _wide(grad) if weight is None else grad * weight.to(rstd.dtype)
        mean = (scaled * normed).mean(-1, keepdim=True)
        found.append(((scaled - normed * mean) * rstd).to(x.dtype).contiguous())
    if needs[1]:
        found.append(flat(grad * normed).sum(0).to(weight.dtype))
    return found


def _differentiable(x: Tensor, weight: Maybe, eps: float) -> Pair:
    """The forward in differentiable aten calls, for functorch transforms and forward-mode AD."""
    _check(x, weight)
    return _by_torch(x, weight, eps)


def _by_torch(x: Tensor, weight: Maybe, eps: float) -> Pair:
    rstd = _rstd(x, eps)
    y = x * rstd
    return (y if weight is None else y * weight).to(x.dtype).contiguous(), rstd


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(_wide(x).square().mean(-1, keepdim=True) + eps)


@fake("_rms_norm")
def _fake(x: Tensor, weight: Maybe, eps: float) -> Pair:
    _check(x, weight)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=dtype)


@fake("rms_norm_backward")
def _fake_backward(grad: Tensor, x: Tensor, weight: Saved, rstd: Tensor, needs: Flags) -> list[Tensor]:
    _check_backward(grad, x, weight, rstd, needs)
    gradients: tuple[Saved, Saved] = (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape) if weight is not None else None,
    )
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]


# --------------------------------------------------------------------------------- autograd, functorch, autocast


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], x: Tensor, weight: Maybe, eps: float, caller: str | None) -> Pair:
        with below_autograd():
            y, rstd = kernel(x, weight, eps)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        if x.is_inference():  # autograd refuses to save it
            x = x.clone()
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.caller = eps, caller
        return y, rstd

    @staticmethod
    def backward(ctx: Any, grad: Maybe, _: Any) -> tuple[Maybe, ...]:
        if grad is None:
            return (None,) * 5
        x, weight, rstd = saved_tensors(ctx, "rms_norm", "patch_norms", ctx.caller)
        needs = ctx.needs_input_grad[1:3]
        if torch.is_grad_enabled() or is_legacy_batched(grad):
            with below_autocast():
                found = _gradients(grad, x, weight, _rstd(x, ctx.eps), needs)
        else:
            with below_autograd():
                found = _backward_op(grad, x, weight, rstd, needs)
        each = iter(found)
        return None, *(next(each) if need else None for need in needs), None, None


_apply = apply_of(_RMSNorm)


def _records(x: Tensor, weight: Maybe) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))


def _with_autograd(kernel: Callable[..., Any], x: Tensor, weight: Maybe, eps: float, caller: str | None = None) -> Pair:
    if _records(x, weight):
        return _apply(kernel, x, weight, eps, caller)
    with below_autograd():
        return kernel(x, weight, eps)


_device_forward = differentiable_forward(
    "_rms_norm", lambda x, weight, eps: _check(x, weight), _with_autograd, _differentiable
)
differentiable_backward("rms_norm_backward", _check_backward, _gradients)

_CASTING = casting(torch.ops.aten.rms_norm.default)


def _cast(device_type: str, x: Tensor, weight: Maybe, eps: float) -> tuple[Any, ...]:
    return *(t if t is None or device_type not in _CASTING else to_float(t) for t in (x, weight)), eps


autocast("_rms_norm", _cast)
autocast("rms_norm_backward", as_given)
