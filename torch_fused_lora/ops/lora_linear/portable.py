"""The portable kernels of lora_linear: plain aten calls, for any device that has no kernels of its own.

The cost of a LoRA layer is not its arithmetic but touching the full-width output again and again. So the base
product comes first, by torch's own GEMM, and the rank-r product is added to it in place. Where operands have to be
converted (float32 adapters over a half base) or masked (dropout), that happens by blocks of rows; no temporary
grows with the width and the number of rows. Half rows on an NVIDIA GPU are left to `triton.py`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Flags, Floats, Ints, Maybe, Saved, Seed
from ..dropout import keep_mask
from ..rows import HALF, by_rows, cast, flat, packed, unflat
from .ways import BY_TRITON, WHOLE, Way, autograd_follows, block_rows, choose, triton_kernels


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    save_h: bool,
) -> tuple[Tensor, Maybe]:
    """The base product, then y += s h Bᵀ in place with h = x̃ Aᵀ: the full-width output is touched once more.

    Returns (y, h), h None unless it is to be saved.
    """
    chosen = way, A, B = choose(x, lora_A, lora_B, _drops(seed, dropout_p))
    if way is BY_TRITON:
        dropouts = _dropouts(seed, dropout_p, ranks, A)
        y, h = triton_kernels().forward(by_rows(x), weight, bias, A, B, _number(scaling), dropouts, save_h)
        return unflat(y, x), h
    rows = flat(x)
    if x.is_cpu and x.dtype in HALF:
        rows, weight = packed(rows, weight)
    y = F.linear(rows, weight, bias)
    h = _add_delta_(chosen, y, rows, scaling, seed, dropout_p, ranks, save_h)
    return unflat(y, x), cast(h, lora_A.dtype) if save_h else None


def followed(x: Tensor, weight: Tensor, bias: Maybe, lora_A: Tensor, lora_B: Tensor, *options: Any) -> Maybe:
    """`forward`'s output where that is torch's own calls on the operands as they are, and autograd is to follow these;
    else None. They keep what the operator would, x and h; of half operands backward rounds where PEFT's does."""
    scaling, seed, *_ = options
    if seed is not None or lora_A.dtype is not x.dtype or not autograd_follows(x) or x.is_inference():
        return None
    if type(scaling) is not float or not math.isfinite(scaling):
        return None
    way, A, _ = choose(x, lora_A, lora_B, 0)
    if way is not WHOLE or A is not lora_A:
        return None
    rows = flat(x)
    y = F.linear(rows, weight, bias)
    y.addmm_(F.linear(rows, lora_A), lora_B.t(), alpha=scaling)
    return unflat(y, x)


def add_delta_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    save_h: bool,
) -> Maybe:
    """``y += s h Bᵀ`` in place, y contiguous; returns h, None unless it is to be saved."""
    chosen = way, A, B = choose(x, lora_A, lora_B, _drops(seed, dropout_p), sum_dtype=y.dtype)
    if way is BY_TRITON:
        dropouts = _dropouts(seed, dropout_p, ranks, A)
        h = triton_kernels().add_delta_(y, by_rows(x), A, B, _number(scaling), dropouts, save_h)
    else:
        h = _add_delta_(chosen, flat(y), flat(x), scaling, seed, dropout_p, ranks, save_h)
    return cast(h, lora_A.dtype) if save_h else None


def _add_delta_(
    chosen: tuple[Way, Tensor, Tensor],
    y: Tensor,
    x: Tensor,
    scaling: float | Tensor,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    save_h: bool,
) -> Saved:
    """`add_delta_` of matrices by torch's own calls; h in the dtype in which rows met the adapters."""
    way, A, B = chosen
    scale = _number(scaling)
    if way is not WHOLE:
        return _add_delta_by_blocks_(y, x, A, B, scale, seed, dropout_p, ranks, save_h)
    mask, kept = _whole_mask(seed, dropout_p, x.shape[0], A)
    h = F.linear(_met(x, mask, A), A)
    _add_product_(y, h, B.t(), scale * kept)
    if save_h and mask is not None:
        h.mul_(kept)
    return h


def backward(
    grad: Tensor,
    x: Saved,
    weight: Saved,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Any,
    h: Saved,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    needs: Flags,
) -> tuple[Maybe, ...]:
    """z = s dY B; dx = dY W + mask ⊙ (z A); dA = zᵀ x̃; dB = s dYᵀ h; ds = Σ (dYᵀ h) ⊙ B.

    Returns them in the order of ``needs`` (x, weight, bias, lora_A, lora_B, scaling), None where not needed.
    """
    need_x, need_weight, need_bias, need_A, need_B, need_scaling = needs
    rows, x_rows = grad, x
    if grad.is_cpu and grad.dtype in HALF:
        rows, x_rows, weight = packed(flat(grad), None if x is None else flat(x), weight)

    def base(rows: Tensor) -> Tensor:
        return rows.mm(weight) if rows.dim() == 2 else rows.matmul(weight)

    operands = rows, x_rows, weight, base if need_x else None, lora_A, lora_B, scaling, h
    low_rank_needs = need_x, need_A, need_B, need_scaling
    grad_x, grad_A, grad_B, grad_scaling = low_rank_backward(*operands, seed, dropout_p, ranks, low_rank_needs)
    return (
        unflat(grad_x, grad) if need_x else None,
        flat(rows).t().mm(flat(x_rows)) if need_weight else None,
        flat(rows).sum(0) if need_bias else None,
        grad_A,
        grad_B,
        grad_scaling,
    )


def low_rank_backward(
    grad: Tensor,
    x: Saved,
    weight: Saved,
    base: Callable[[Tensor], Tensor] | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Any,
    h: Saved,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    needs: Flags,
) -> tuple[Saved, Maybe, Maybe, Maybe]:
    """As `backward`, without the gradients of weight and bias: x's, of grad's dtype and maybe flat, lora_A's, lora_B's
    and scaling's. ``base`` makes the base's part of x's, of grad or of that flat; where it is None, there is none. It
    is a product with ``weight``, where one is given, which a kernel may make instead."""
    need_x, need_A, need_B, need_scaling = needs
    # grad_h is dB, except where ds needs it unscaled.
    grad_x: Saved = None
    grad_A: Saved = None
    grad_h: Saved = None
    way, A, B = choose(grad, lora_A, lora_B, _drops(seed, dropout_p), backward=True)
    scale, turn = _number(scaling), by_rows if way is BY_TRITON else flat
    grad, x = turn(grad), turn(x) if need_A else None
    if way is WHOLE:
        wide = _widened(grad, A)
        mask, kept = _whole_mask(seed, dropout_p, grad.shape[0], A) if need_x or need_A else (None, 1.0)
        if need_x or need_A:
            z = wide.mm(B)
        if need_A:
            grad_A = _product(z.t(), _met(x, mask, A), scale * kept, A)
        if need_B or need_scaling:
            grad_h = _product(wide.t(), cast(h, A.dtype), 1.0 if need_scaling else scale, B)
        if need_x and base is None:
            grad_x = cast(dropped((z * (scale * kept)).mm(A), mask), grad.dtype)
        elif base is not None:  # after what is small: the weight drives all else out of a CPU's caches
            grad_x = base(grad)
            if mask is None:
                _add_product_(grad_x, z, A, scale)
            else:
                out = _widened(grad_x, A)
                grad_x = cast(out.addcmul_(_product(z, A, scale * kept, out), mask), grad.dtype)
    elif need_x or need_A or need_B or need_scaling:
        if way is BY_TRITON:
            dropouts, by_triton = _dropouts(seed, dropout_p, ranks, A), triton_kernels().backward
            grad_x, grad_A, grad_h = by_triton(
                grad, weight, base, x, A, B, scale, h, need_x, not need_scaling, dropouts
            )
        else:
            if need_x:
                grad_x = grad.new_zeros(grad.shape[0], A.shape[1]) if base is None else base(grad)
            if h is not None and not need_scaling:
                h = _widened(h, A) * scaling
            grad_A, grad_h = _backward_by_blocks(grad, grad_x, x, A, B, scaling, h, seed, dropout_p, ranks)
    return (
        grad_x,
        cast(grad_A, lora_A.dtype) if need_A else None,
        cast(grad_h * scaling if need_scaling else grad_h, lora_B.dtype) if need_B else None,
        (grad_h * lora_B).sum().to(scaling.device, scaling.dtype) if need_scaling else None,
    )


def _add_delta_by_blocks_(
    y: Tensor,
    x_rows: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    save_h: bool,
) -> Saved:
    """``y += s h Bᵀ`` over blocks of rows, converted and masked a block at a time; returns h if asked."""
    groups = adapters(seed, dropout_p, ranks, A.shape[0])
    size = block_rows(A, B)
    saved = []
    for start in range(0, max(y.shape[0], 1), size):
        rows = slice(start, start + size)
        x_block = _widened(x_rows[rows], A)
        masks = _masks(groups, seed, start, x_block.shape[0], A)
        parts = []
        for (rank, p), mask in zip(groups, masks, strict=True):
            if mask is None:
                parts.append(F.linear(x_block, A[rank]))
            else:
                parts.append(F.linear(x_block * mask, A[rank]).mul_(1.0 / (1.0 - p)))
        h = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        _add_product_(y[rows], h, B.t(), scale)
        if save_h:
            saved.append(h)
    return torch.cat(saved) if save_h else None


def _backward_by_blocks(
    grad_rows: Tensor,
    grad_x: Maybe,
    x_rows: Saved,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    h: Saved,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
) -> tuple[Maybe, Maybe]:
    """Over blocks of rows: ``grad_x += mask ⊙ (z A)`` in place; returns zᵀ x̃ and dYᵀ h, None where not asked for."""
    grad_A = A.new_zeros(A.shape) if x_rows is not None else None
    grad_h = B.new_zeros(B.shape) if h is not None else None
    groups = adapters(seed, dropout_p, ranks, A.shape[0])
    size = block_rows(A, B)
    for start in range(0, grad_rows.shape[0], size):
        rows = slice(start, start + size)
        grad_block = _widened(grad_rows[rows], A)
        if grad_h is not None:
            grad_h.addmm_(grad_block.t(), _widened(h[rows], A))
        if grad_A is None and grad_x is None:
            continue
        z = grad_block.mm(B).mul_(scaling)
        masks = _masks(groups, seed, start, z.shape[0], A)
        x_block: Saved = None if grad_A is None else _widened(x_rows[rows], A)
        out: Saved = None if grad_x is None else _widened(grad_x[rows], A)
        for (rank, p), mask in zip(groups, masks, strict=True):
            z_rank = z[:, rank]
            if mask is not None:
                z_rank = z_rank * (1.0 / (1.0 - p))
            if grad_A is not None:
                grad_A[rank].addmm_(z_rank.t(), dropped(x_block, mask))
            if out is not None and mask is None:
                out.addmm_(z_rank, A[rank])
            elif out is not None:
                out.addcmul_(z_rank.mm(A[rank]), mask)
        if grad_x is not None and out.dtype is not grad_x.dtype:
            grad_x[rows] = out
    return grad_A, grad_h


def adapters(seed: Any, dropout_p: Sequence[float], ranks: Sequence[int], r: int) -> list[tuple[slice, float]]:
    """(rank slice, drop probability) of each adapter; without dropout one slice serves them all."""
    if seed is None:
        return [(slice(0, r), 0.0)]
    if len(dropout_p) == 1:
        return [(slice(0, r), dropout_p[0])]
    ends = itertools.accumulate(ranks)
    return [(slice(end - rank, end), p) for end, rank, p in zip(ends, ranks, dropout_p, strict=True)]


def _dropouts(seed: Seed, dropout_p: Floats, ranks: Ints, A: Tensor) -> Any:
    kernels = triton_kernels()
    if seed is None:
        return kernels.NO_DROPOUTS
    return kernels.Dropouts.of(_each_dropout(tuple(dropout_p), tuple(ranks), A.shape[0]), seed)


@functools.lru_cache(1024)
def _each_dropout(dropout_p: Floats, ranks: Ints, r: int) -> tuple[Any, ...]:
    of, each = triton_kernels().Dropout.of, adapters(True, dropout_p, ranks, r)
    return tuple(of(rank, p, stream) for stream, (rank, p) in enumerate(each))


def _masks(groups: list[tuple[slice, float]], seed: Any, start: int, rows: int, A: Tensor) -> list[Maybe]:
    """Which elements of x, in rows ``start`` onwards, each adapter's dropout keeps: 1, or 0; None for all."""
    return [_mask(seed, stream, start, rows, p, A) if p else None for stream, (_, p) in enumerate(groups)]


def _whole_mask(seed: Seed, dropout_p: Floats, rows: int, A: Tensor) -> tuple[Maybe, float]:
    """The mask of an adapter that is alone, and by what its products are multiplied."""
    if seed is None or not dropout_p[0]:
        return None, 1.0
    return _mask(seed, 0, 0, rows, dropout_p[0], A), 1.0 / (1.0 - dropout_p[0])


def _mask(seed: Any, stream: int, start: int, rows: int, p: float, A: Tensor) -> Tensor:
    return keep_mask(seed, stream, start, rows, A.shape[1], p, A.device, A.dtype)


def _drops(seed: Seed, dropout_p: Floats) -> int:
    return 0 if seed is None else len(dropout_p)


def _met(x: Tensor, mask: Maybe, A: Tensor) -> Tensor:
    """x as it meets one adapter."""
    return _widened(x, A) if mask is None else x * mask  # of two dtypes the product has the mask's, which is A's


def dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _add_product_(out: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> None:
    """``out += scale · a b``, summed in float32 (float64 for float64) and rounded once to out's dtype."""
    if type(scale) is not float:
        a, scale = a * scale, 1.0
    if out.dtype is a.dtype:
        out.addmm_(a, b, alpha=scale)
    else:
        if a.dtype is not torch.float32:
            a, b = a.float(), b.float()
        out.copy_(out.float().addmm_(a, b, alpha=scale))


def _product(a: Tensor, b: Tensor, scale: float | Tensor, like: Tensor) -> Tensor:
    """``scale · a b``, of the shape and dtype of ``like``."""
    if type(scale) is not float:
        return a.mm(b).mul_(scale)
    return torch.addmm(like, a, b, beta=0, alpha=scale)


def _number(scaling: float | Tensor) -> float | Tensor:
    """A number where reading it does not synchronise with the device, and it is finite: BLAS may take an alpha of NaN
    for 0."""
    if isinstance(scaling, Tensor):
        if not scaling.is_cpu:
            return scaling
        scaling = scaling.item()
    return scaling if math.isfinite(scaling) else torch.tensor(scaling)


def _widened(rows: Saved, A: Tensor) -> Saved:
    """Rows as they meet the adapters: in float32 where the dtypes differ."""
    return rows if rows is None or rows.dtype is A.dtype else rows.float()
