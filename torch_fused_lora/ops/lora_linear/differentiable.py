"""The LoRA layer in calls that autograd can follow: for torch.func, forward-mode AD, double backward and exports."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Flags, Floats, Ints, Maybe, Pair, Saved, Seed
from ..dropout import as_seed
from ..rows import flat, packed
from .portable import adapters, dropped


def by_torch(
    x: Tensor, weight: Tensor, bias: Maybe, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, dropout_p: float
) -> Tensor:
    """The layer in the calls that PEFT makes, for graphs that hold without this package and for nested tensors: none of
    them depends on x's shape, and dropout is torch's."""
    return delta_by_torch(F.linear(x, weight, bias), x, lora_A, lora_B, scaling, dropout_p)


def delta_by_torch(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, dropout_p: float
) -> Tensor:
    """What of `by_torch` comes after the base product. The sum is laid out as its first term, which is contiguous."""
    wide = x.to(lora_A.dtype)
    h = F.linear(F.dropout(wide, dropout_p) if dropout_p else wide, lora_A)
    return (F.linear(h, lora_B) * scaling + y).to(y.dtype)


def _whole_masks(x: Tensor, lora_A: Tensor, seed: Seed, dropout_p: Floats, ranks: Ints) -> list[tuple[slice, Maybe]]:
    """(rank slice, what its dropout multiplies all of x with) of each adapter."""

    def mask(stream: int, p: float) -> Maybe:
        keep = torch.ops.torch_fused_lora.dropout_mask(as_seed(seed), stream, *x.shape, p, x.device)
        return keep.to(lora_A.dtype) / (1.0 - p)

    groups = adapters(seed, dropout_p, ranks, lora_A.shape[0])
    return [(rank, mask(stream, p) if p else None) for stream, (rank, p) in enumerate(groups)]


def low_rank(x: Tensor, lora_A: Tensor, seed: Seed, dropout_p: Floats, ranks: Ints) -> Tensor:
    """h = dropout(x) Aᵀ, M x r."""
    rows, lora_A = packed(flat(x), lora_A)
    masks, wide = _whole_masks(rows, lora_A, seed, dropout_p, ranks), rows.to(lora_A.dtype)
    return torch.cat([dropped(wide, mask) @ lora_A[rank].t() for rank, mask in masks], 1)


def forward(x: Tensor, weight: Tensor, bias: Maybe, *rest: Any) -> Pair:
    """The forward in differentiable aten calls, for functorch transforms (vmap included) and forward-mode AD."""
    x_rows, weight = packed(flat(x), weight)
    base = F.linear(x_rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
    return delta_forward(base, x, *rest)


def delta_forward(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    save_h: bool,
) -> Pair:
    """What of `forward` comes after the base product. The sum is laid out as its first term, which is contiguous."""
    (lora_B,) = packed(lora_B)
    h = low_rank(x, lora_A, seed, dropout_p, ranks)
    delta = (h @ lora_B.t()).view(y.shape)
    return (delta * scaling + y).to(y.dtype), h if save_h else lora_A.new_empty(0)


def backward(grad: Tensor, grad_h: Maybe, x: Saved, weight: Saved, *rest: Any) -> tuple[Maybe, ...]:
    """The backward in differentiable aten calls, for double backward; grad_h is the gradient of the saved h."""
    *operands, (need_x, need_weight, need_bias, *needs) = rest
    rows, x_rows, weight = packed(flat(grad), None if x is None else flat(x), weight)
    low_rank = *operands, (need_x, *needs)
    grad_x, *others = _low_rank_backward(grad, grad_h, x, *low_rank)
    return (
        _as_rows(rows @ weight + grad_x, grad) if need_x else None,
        rows.t() @ x_rows if need_weight else None,
        rows.sum(0) if need_bias else None,
        *others,
    )


def delta_backward(grad: Tensor, grad_h: Maybe, x: Saved, *rest: Any) -> tuple[Maybe, ...]:
    """What of `backward` is not the base's."""
    grad_x, *others = _low_rank_backward(grad, grad_h, x, *rest)
    return grad_x if grad_x is None else _as_rows(grad_x, grad), *others


def _as_rows(grad_x: Tensor, grad: Tensor) -> Tensor:
    """M x K in the leading shape and the dtype of grad."""
    return grad_x.to(grad.dtype).view(*grad.shape[:-1], grad_x.shape[1])


def _low_rank_backward(
    grad: Tensor,
    grad_h: Maybe,
    x: Saved,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Any,
    h: Saved,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    needs: Flags,
) -> tuple[Maybe, ...]:
    """The gradients of x, M x K and not rounded, lora_A, lora_B and scaling."""
    need_x, need_A, need_B, need_scaling = needs
    rows, x_rows, lora_A, lora_B = packed(flat(grad), None if x is None else flat(x), lora_A, lora_B)
    wide = torch.promote_types(grad.dtype, lora_A.dtype)
    wide_grad, wide_B = rows.to(wide), lora_B.to(wide)
    z = (wide_grad @ wide_B) * scaling
    if grad_h is not None:
        z = z + grad_h
    grad_x: Saved = None
    grad_A: Saved = None
    if need_x or need_A:
        masks = _whole_masks(grad.new_empty(len(rows), lora_A.shape[1]), lora_A, seed, dropout_p, ranks)
        # narrow: a slice of all columns is an alias, which the vmap behind is_grads_batched does not know
        all_z = packed(*(z.narrow(1, rank.start, rank.stop - rank.start) for rank, _ in masks))
    if need_x:
        parts = [dropped(z @ lora_A[rank].to(wide), mask) for z, (rank, mask) in zip(all_z, masks, strict=True)]
        grad_x = functools.reduce(torch.add, parts)
    if need_A:
        wide_x = x_rows.to(wide)
        grad_A = torch.cat([z.t() @ dropped(wide_x, mask) for z, (_, mask) in zip(all_z, masks, strict=True)])
        grad_A = grad_A.to(lora_A.dtype)
    if need_B or need_scaling:
        product = wide_grad.t() @ h.to(wide)
    return (
        grad_x,
        grad_A,
        (product * scaling).to(lora_B.dtype) if need_B else None,
        (product * wide_B).sum().to(scaling.device, scaling.dtype) if need_scaling else None,
    )
