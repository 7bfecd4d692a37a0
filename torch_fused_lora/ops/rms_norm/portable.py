"""The portable kernels of rms_norm: torch's own where it has one each way, else a few calls by blocks of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...torch_private import fused_rms_norm, fused_rms_norm_backward
from ..dispatch import PORTABLE_DEVICES, Flags, Maybe, Pair, Saved
from ..rows import flat, wide_dtype

# Device types on which this torch computes F.rms_norm, forward and backward, in one kernel each.
FUSED_BY_TORCH = frozenset(
    device_type
    for device_type in (*PORTABLE_DEVICES, "mps")
    if all(
        op and op.has_kernel_for_dispatch_key(device_type.upper()) for op in (fused_rms_norm, fused_rms_norm_backward)
    )
)


def by_torch(x: Tensor, weight: Maybe) -> bool:
    """Whether a call is best made of torch.rms_norm, gradients and all."""
    if weight is not None and weight.dtype is not x.dtype:
        return False
    if x.device.type in FUSED_BY_TORCH:
        return True
    records = x.requires_grad or (weight is not None and weight.requires_grad)
    return x.numel() <= _FEW and not (records and torch.is_grad_enabled())


_FEW = 1 << 16  # elements up to which calls cost more than memory does
_BLOCK = 1 << 19  # elements of a half x that are converted at a time on a CPU, whose caches hold them


def _blocks(rows: Tensor, wide: torch.dtype) -> list[slice]:
    """Slices of the rows, all of them in one where nothing is converted or they are few."""
    M, H = rows.shape
    size = max(_BLOCK // H, 1) if rows.is_cpu and rows.dtype is not wide else M
    return [slice(None)] if size >= M else [slice(start, start + size) for start in range(0, M, size)]


def _alike(x: Tensor, weight: Maybe, *others: Tensor) -> tuple[Any, ...]:
    """The operands of torch's own kernels, which take one dtype: the wider."""
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    x_alike, *others_alike = (t.to(dtype).contiguous() for t in (x, *others))
    return x_alike, weight if weight is None else weight.to(dtype), *others_alike


def forward(x: Tensor, weight: Maybe, eps: float) -> Pair:
    if x.device.type in FUSED_BY_TORCH:
        operand, weight = _alike(x, weight)
        y, rstd = fused_rms_norm(operand, x.shape[-1:], weight, eps)
        return y.to(x.dtype), rstd
    wide = wide_dtype(x.dtype)
    # The norm of a row is a pass that writes nothing.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    if x.numel() <= _FEW and (weight is None or weight.dtype is x.dtype):  # the same bits as without a gradient
        return torch.rms_norm(x, x.shape[-1:], weight, eps).contiguous(), rstd

    def normed(x: Tensor, rstd: Tensor) -> Tensor:
        found = x * rstd
        return found if weight is None else found.mul_(weight)

    blocks = _blocks(x_rows := flat(x), wide)
    if len(blocks) == 1:
        return normed(x, rstd).to(x.dtype).contiguous(), rstd
    y, rstd_rows = x.new_empty(x.shape), flat(rstd)
    for block in blocks:
        flat(y)[block] = normed(x_rows[block], rstd_rows[block])
    return y, rstd


def backward(grad: Tensor, x: Tensor, weight: Saved, rstd: Tensor, needs: Flags) -> tuple[Saved, Saved]:
    """dx = rstd (g w - x rstd² mean(g w x)) and dweight = (g x)ᵀ rstd: the sums are products with vectors."""
    if x.device.type in FUSED_BY_TORCH:
        operand, wide_weight, grad = _alike(x, weight, grad)
        dx, dweight = fused_rms_norm_backward(grad, operand, x.shape[-1:], rstd, wide_weight, needs)
        return dx if dx is None else dx.to(x.dtype), dweight if dweight is None else dweight.to(weight.dtype)
    H, wide = x.shape[-1], rstd.dtype
    grad_rows, x_rows, rstd_rows = flat(grad), flat(x), flat(rstd)
    w = x.new_ones(H, dtype=wide) if weight is None else weight.to(wide)
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = x.new_zeros(H, dtype=wide) if needs[1] else None
    for block in _blocks(x_rows, wide):
        g, rows, scale = grad_rows[block].to(wide), x_rows[block].to(wide), rstd_rows[block]
        product = torch.mul(g, rows, out=rows.new_empty(rows.shape))
        if dweight is not None:
            dweight.addmv_(product.t(), scale[:, 0])
        if dx is not None:
            pull = product.mv(w)[:, None].mul_(scale.square()).div_(-H)
            torch.mul(g, w, out=product).addcmul_(rows, pull)
            torch.mul(product, scale, out=flat(dx)[block])
    return dx, dweight if dweight is None else dweight.to(weight.dtype)
