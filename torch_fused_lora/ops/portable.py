"""The portable kernels of lora_linear: plain aten calls, for any device that has no kernels of its own.

The cost of a LoRA layer is not its arithmetic but touching the full-width output again and again. So the base
product comes first, by torch's own GEMM, and the rank-r product is added to it in place. Where operands have to be
converted (float32 adapters over a half base) or masked (dropout), that happens by blocks of rows; no temporary
grows with the width and the number of rows.

`differentiable_forward` and `differentiable_backward` are the same formulas out of place, in calls that autograd
can follow: for torch.func, forward-mode AD and double backward.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import keep_mask

HALF = (torch.float16, torch.bfloat16)


def forward(x, weight, bias, lora_A, lora_B, scaling, seed=None, dropout_p=(), ranks=(), save_h=False):
    """The base product, then y += s h Bᵀ in place with h = x̃ Aᵀ: the full-width output is touched once more."""
    x_rows = flat(x)
    y = F.linear(x_rows, weight, bias)
    # A number where reading it does not synchronise with the device.
    scale = scaling.item() if scaling.is_cpu else scaling
    dtype = _operand_dtype(x_rows, lora_A, seed)
    if seed is None and _in_one_piece(x_rows, lora_A, lora_B, dtype):
        wide, A = _cast(x_rows, dtype), _narrow(lora_A, dtype)
        h = F.linear(wide, A) if wide.dtype == A.dtype else _matmul(wide, A.t())
        _add_product_(y, h, _narrow(lora_B, dtype).t(), scale)
        h = _cast(h, lora_A.dtype)
    else:
        h = _add_delta_by_blocks_(y, x_rows, lora_A, lora_B, scale, seed, dropout_p, ranks, dtype, save_h)
    return _unflat(y, x), h if save_h else lora_A.new_empty(0)


def backward(grad, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs):
    """z = s dY B; dx = dY W + mask ⊙ (z A); dA = zᵀ x̃; dB = s dYᵀ h; ds = Σ (dYᵀ h) ⊙ B."""
    need_x, need_weight, need_bias, need_A, need_B, need_scaling = needs
    grad_rows = flat(grad)
    x_rows = flat(x) if x is not None else None
    grad_x = grad_rows.mm(weight) if need_x else None
    # grad_h is dB, except where ds needs it unscaled: the scale goes to h, which is smaller, where it can.
    grad_A = grad_h = None
    dtype = _operand_dtype(grad_rows, lora_A, seed)
    if seed is None and _in_one_piece(grad_rows, lora_A, lora_B, dtype):
        wide = _cast(grad_rows, dtype)
        if need_x or need_A:
            z = _matmul(wide, _narrow(lora_B, dtype)).mul_(scaling)
        if need_x:
            _add_product_(grad_x, z, _narrow(lora_A, dtype))
        if need_A:
            grad_A = _matmul(z.t(), _cast(x_rows, dtype))
        if need_B or need_scaling:
            h = _narrow(h, dtype)
            grad_h = _matmul(wide.t(), h if need_scaling else h * scaling)
    elif need_x or need_A or need_B or need_scaling:
        x_side = x_rows if need_A else None
        grad_A, grad_h = _backward_by_blocks(
            grad_rows, grad_x, x_side, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, dtype, need_scaling
        )
    grads = []
    if need_x:
        grads.append(_unflat(grad_x, grad))
    if need_weight:
        grads.append(grad_rows.t().mm(x_rows))
    if need_bias:
        grads.append(grad_rows.sum(0))
    if need_A:
        grads.append(_cast(grad_A, lora_A.dtype))
    if need_B:
        grads.append(_cast(grad_h * scaling if need_scaling else grad_h, lora_B.dtype))
    if need_scaling:
        grads.append((grad_h * lora_B).sum().to(scaling.device, scaling.dtype))
    return grads


def _add_delta_by_blocks_(y, x_rows, lora_A, lora_B, scale, seed, dropout_p, ranks, dtype, save_h):
    """``y += s h Bᵀ`` over blocks of rows, converted and masked a block at a time; returns h if asked."""
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    groups = adapters(seed, dropout_p, ranks, A.shape[0])
    size = block_rows(A, B)
    saved = []
    for start in range(0, max(y.shape[0], 1), size):
        rows = slice(start, start + size)
        x_block = x_rows[rows].to(dtype)
        masks = _masks(groups, seed, start, x_block.shape[0], A)
        parts = [F.linear(dropped(x_block, mask), A[rank]) for (rank, _), mask in zip(groups, masks, strict=True)]
        h = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        _add_product_(y[rows], h, B.t(), scale)
        if save_h:
            saved.append(h.to(lora_A.dtype))
    return torch.cat(saved) if save_h else None


def _backward_by_blocks(
    grad_rows, grad_x, x_rows, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, dtype, need_scaling
):
    """Over blocks of rows: ``grad_x += mask ⊙ (z A)`` in place; returns zᵀ x̃ and dYᵀ h, None where not asked for."""
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    grad_A = A.new_zeros(A.shape) if x_rows is not None else None
    grad_h = B.new_zeros(B.shape) if h is not None else None
    groups = adapters(seed, dropout_p, ranks, A.shape[0])
    size = block_rows(A, B)
    for start in range(0, grad_rows.shape[0], size):
        rows = slice(start, start + size)
        grad_block = grad_rows[rows].to(dtype)
        if grad_h is not None:
            h_block = h[rows].to(dtype)
            grad_h.addmm_(grad_block.t(), h_block if need_scaling else h_block * scaling)
        if grad_A is None and grad_x is None:
            continue
        z = grad_block.mm(B).mul_(scaling)
        masks = _masks(groups, seed, start, z.shape[0], A)
        if grad_A is not None:
            x_block = x_rows[rows].to(dtype)
            for (rank, _), mask in zip(groups, masks, strict=True):
                grad_A[rank].addmm_(z[:, rank].t(), dropped(x_block, mask))
        if grad_x is None:
            continue
        if seed is None:
            _add_product_(grad_x[rows], z, A)
        else:
            parts = [dropped(z[:, rank] @ A[rank], mask) for (rank, _), mask in zip(groups, masks, strict=True)]
            grad_x[rows] += functools.reduce(torch.add, parts)
    return grad_A, grad_h


def _operand_dtype(rows: Tensor, lora_A: Tensor, seed: Tensor | None) -> torch.dtype:
    """In which dtype the rows of a full-width operand are multiplied: their own, or float32 for half rows.

    Half rows stay as they are where the device multiplies them with float32 sums in hardware, and the adapters are
    half too or can be split (`_matmul`). A CPU without such hardware is two to four times faster through float32.
    """
    if rows.dtype not in HALF:
        return rows.dtype
    native = not rows.is_cpu and seed is None and (lora_A.dtype == rows.dtype or _splits(rows))
    return rows.dtype if native else torch.float32


def _splits(rows: Tensor) -> bool:
    """Whether float32 adapters meet these rows as two bfloat16 halves. Few rows are not worth the extra launches."""
    return rows.dtype == torch.bfloat16 and rows.is_cuda and rows.shape[0] > 512 and torch.version.hip is None


def _narrow(lora: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter, h or z as it meets rows of ``dtype``: float32 stays float32."""
    return lora if lora.dtype == torch.float32 else _cast(lora, dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in the wider of the two dtypes.

    Where one is bfloat16 and the other float32, the float32 one is split into a high and a low bfloat16 half: two
    products with float32 sums on the matrix units instead of a float32 copy of the full-width operand. The halves
    hold 16 bits, so the result is within 2**-17 of its magnitude, a hundredth of a bfloat16 rounding.
    """
    if a.dtype == b.dtype:
        return a.mm(b) if a.shape[1] != 1 else a * b  # an outer product is slow as a GEMM
    if b.dtype == torch.float32:
        high, low = _halves(b)
        return _mm_float32(a, torch.cat([high, low], 1)).view(a.shape[0], 2, b.shape[1]).sum(1)
    high, low = _halves(a)
    return _mm_float32(torch.cat([high, low]), b).view(2, a.shape[0], b.shape[1]).sum(0)


def _mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """The product of two bfloat16 matrices as float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float().mm(b.float())


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def _in_one_piece(rows: Tensor, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> bool:
    """Whether all rows fit a block, or need no block since nothing is converted."""
    return rows.dtype == dtype or rows.shape[0] <= block_rows(lora_A, lora_B)


def block_rows(A: Tensor, B: Tensor) -> int:
    """Rows that are converted or masked at a time: 8 MiB of float32 on a CPU, 64 MiB elsewhere.

    Smaller blocks would stay in L2, and are no faster on a quiet CPU; on a busy one each parallel aten call may
    wait a scheduler's time slice for its threads, so that few large blocks win by far.
    """
    elements = 1 << (21 if A.is_cpu else 24)
    return max(elements // max(A.shape[1], B.shape[0], 1), 16)


def adapters(
    seed: Tensor | None, dropout_p: Sequence[float], ranks: Sequence[int], r: int
) -> list[tuple[slice, float]]:
    """(rank slice, drop probability) of each adapter; without dropout one slice serves them all."""
    if seed is None:
        return [(slice(None), 0.0)]
    ranks = ranks or (r,)
    ends = itertools.accumulate(ranks)
    return [(slice(end - rank, end), p) for end, rank, p in zip(ends, ranks, dropout_p, strict=True)]


def _masks(groups, seed, start, rows, A):
    """What each adapter's dropout multiplies rows ``start`` onwards of x with: 0 or 1 / (1 - p); None for 1."""

    def mask(stream, p):
        return keep_mask(int(seed), stream, start, rows, A.shape[1], p, A.device).to(A.dtype).mul_(1.0 / (1.0 - p))

    return [mask(stream, p) if p else None for stream, (_, p) in enumerate(groups)]


def dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _add_product_(out: Tensor, a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> None:
    """``out += scale · a b``, summed in float32 (float64 for float64) and rounded once to out's dtype."""
    if isinstance(scale, Tensor):
        a, scale = a * scale, 1.0
    if out.dtype == a.dtype:
        out.addmm_(a, b, alpha=scale)
    elif _splits(out):  # as in `_matmul`; the product of the two low halves is below the rounding of float32
        (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
        out.addmm_(torch.cat([a_high, a_low, a_high], 1), torch.cat([b_high, b_high, b_low]), alpha=scale)
    else:
        out.copy_(out.to(a.dtype).addmm_(a, b, alpha=scale))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a `to` that does nothing still takes a microsecond


def flat(x: Tensor) -> Tensor:
    """x as a matrix (M, last dimension): a view wherever one exists."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _unflat(rows: Tensor, like: Tensor) -> Tensor:
    """The fresh matrix (M, C) in the leading shape of ``like``, not as a view: autograd forbids in-place use of an
    operator's output that is one."""
    return rows if like.dim() == 2 else torch.ops.aten._unsafe_view.default(rows, (*like.shape[:-1], rows.shape[1]))


# ------------------------------------------------------------------------------ the same in differentiable calls


def _whole_masks(x, lora_A, seed, dropout_p, ranks):
    """(rank slice, what its dropout multiplies all of x with) of each adapter."""

    def mask(stream, p):
        keep = torch.ops.torch_fused_lora.dropout_mask(seed, stream, *x.shape, p, x.device)
        return keep.to(lora_A.dtype) / (1.0 - p)

    groups = adapters(seed, dropout_p, ranks, lora_A.shape[0])
    return [(rank, mask(stream, p) if p else None) for stream, (rank, p) in enumerate(groups)]


def differentiable_forward(x, weight, bias, lora_A, lora_B, scaling, seed=None, dropout_p=(), ranks=(), save_h=False):
    """The forward in differentiable aten calls, for functorch transforms (vmap included) and forward-mode AD."""
    x_rows = flat(x)
    wide = x_rows.to(lora_A.dtype)
    masks = _whole_masks(x_rows, lora_A, seed, dropout_p, ranks)
    h = torch.cat([dropped(wide, mask) @ lora_A[rank].t() for rank, mask in masks], 1)
    base = F.linear(x_rows, weight, bias)
    y = (base + (h @ lora_B.t()) * scaling).to(base.dtype)
    return y.view(*x.shape[:-1], weight.shape[0]), h if save_h else lora_A.new_empty(0)


def differentiable_backward(grad, grad_h, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs):
    """The backward in differentiable aten calls, for double backward; grad_h is the gradient of the saved h."""
    need_x, need_weight, need_bias, need_A, need_B, need_scaling = needs
    grad_rows = flat(grad)
    wide_grad = grad_rows.to(lora_A.dtype)
    z = (wide_grad @ lora_B) * scaling
    if grad_h is not None:
        z = z + grad_h
    x_rows = flat(x) if x is not None else None
    grads = []
    if need_x or need_A:
        masks = _whole_masks(grad.new_empty(len(grad_rows), lora_A.shape[1]), lora_A, seed, dropout_p, ranks)
    if need_x:
        delta = functools.reduce(torch.add, [dropped(z[:, rank] @ lora_A[rank], mask) for rank, mask in masks])
        grads.append((grad_rows @ weight + delta).to(grad.dtype).view(*grad.shape[:-1], lora_A.shape[1]))
    if need_weight:
        grads.append(grad_rows.t() @ x_rows)
    if need_bias:
        grads.append(grad_rows.sum(0))
    if need_A:
        wide = x_rows.to(lora_A.dtype)
        grads.append(torch.cat([z[:, rank].t() @ dropped(wide, mask) for rank, mask in masks]))
    if need_B:
        grads.append((wide_grad.t() @ h) * scaling)
    if need_scaling:
        grads.append(((wide_grad.t() @ h) * lora_B).sum().to(scaling.device, scaling.dtype))
    return grads
