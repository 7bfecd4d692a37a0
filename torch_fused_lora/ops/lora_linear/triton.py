"""The low-rank term as Triton kernels: half rows that meet adapters, with or without dropout, on an NVIDIA GPU.

Plain aten calls would convert the full-width operands to float32 first, and write dropout's mask and what it leaves.
These read each of them once, as they are, and draw masks in registers. Sums are in float32, in a fixed order;
products are within 3 * 2**-16 of their magnitude (`_dot`), a hundredth of a bfloat16 rounding. Block sizes are the best
of a sweep on an H100, at ranks 16 and 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout.triton import keep_tile
from ..launcher import Launcher


class Dropout(NamedTuple):
    """Of one adapter: its ranks, and which elements of its side of an M x K matrix it keeps, each times 1 / (1 - p)."""

    rank: slice
    p: float
    seed: Tensor  # on the device
    stream: int


def add_delta_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, dropouts: Sequence[Dropout] = ()
) -> Tensor:
    """``y += scale · h Bᵀ`` in place, y (M, N) and x (M, K) half; returns h = dropout(x) Aᵀ (M, r) in float32."""
    if not dropouts:
        h = _product(x, A.t())
    elif len(dropouts) == 1:
        h = _product(x, A.t(), dropout=dropouts[0])
    else:
        h = torch.cat([_product(x, A[d.rank].t(), dropout=d) for d in dropouts], 1)
    if isinstance(scale, Tensor):
        _accumulate_(y, h * scale, B.t())
    else:
        _accumulate_(y, h, B.t(), scale)
    return h


def backward(
    grad: Tensor,
    grad_x: Tensor | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    h: Tensor | None,
    dropouts: Sequence[Dropout],
) -> tuple[Tensor | None, Tensor | None]:
    """``grad_x += dropout(z A)`` in place with z = s dY B; returns zᵀ dropout(x) and dYᵀ h. None where a tensor is not
    given."""
    grad_A = grad_h = None
    if grad_x is not None or x is not None:
        z = _product(grad, B).mul_(scaling) if isinstance(scaling, Tensor) else _product(grad, B, scaling)
        every = slice(0, z.shape[1])
        parts: list[tuple[slice, Dropout | None]] = [(d.rank, d) for d in dropouts] or [(every, None)]
        if grad_x is not None:
            for rank, dropout in parts:
                _accumulate_(grad_x, z[:, rank], A[rank], dropout=dropout)
        if x is not None:
            found = [_reduce(z[:, rank], x, dropout=dropout) for rank, dropout in parts]
            grad_A = found[0] if len(found) == 1 else torch.cat(found)
    if h is not None:
        grad_h = _reduce(h, grad, transposed=True)
    return grad_A, grad_h


_NO_DROPOUT = (None, 0, 0)


def _words(dropout: Dropout | None) -> tuple[object, int, int]:
    """Seed, stream and threshold of the kernels."""
    if dropout is None or dropout.p == 0.0:
        return _NO_DROPOUT
    threshold = min(round(dropout.p * 2**32), 2**32 - 1)
    return dropout.seed, dropout.stream, threshold - 2**32 if threshold >= 2**31 else threshold  # 32 bits, with a sign


def _inverse_keep(dropout: Dropout | None) -> float:
    return 1.0 if dropout is None else 1.0 / (1.0 - dropout.p)


# Not triton.cdiv and triton.next_power_of_2, which take six microseconds a call.
def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _rank_block(r: int) -> int:
    return min(max(1 << (r - 1).bit_length(), 16), 64)  # 16 is the least that the matrix units take


def _product(rows: Tensor, small: Tensor, scale: float = 1.0, dropout: Dropout | None = None) -> Tensor:
    """``scale · dropout(rows) small``: rows (M, K), small (K, C) with C of the order of the rank, in float32."""
    (M, K), C = rows.shape, small.shape[1]
    out = rows.new_empty((M, C), dtype=torch.float32)
    seed, stream, threshold = _words(dropout)
    rows_stride, small_stride, block_C = rows.stride(), small.stride(), _rank_block(C)
    alignments = rows.data_ptr() & 15, small.data_ptr() & 15
    _launch_product(
        (_blocks(M, 64), _blocks(C, block_C), 1),
        (K, C, rows.dtype, small.dtype, rows_stride, small_stride, alignments, seed is None),
        out, rows, small, scale * _inverse_keep(dropout), seed, stream, threshold, M, K, C,
        *rows_stride, *small_stride, 64, 128, block_C,
    )  # fmt: skip
    return out


def _accumulate_(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, dropout: Dropout | None = None) -> None:
    """``out += dropout(scale · a b)`` for half out (M, C), float32 a (M, r) and b (r, C); one rounding."""
    (M, C), r = out.shape, a.shape[1]
    seed, stream, threshold = _words(dropout)
    out_stride, a_stride, b_stride = out.stride(), a.stride(), b.stride()
    alignments = out.data_ptr() & 15, a.data_ptr() & 15, b.data_ptr() & 15
    _launch_accumulate(
        (_blocks(M, 64), _blocks(C, 128), 1),
        (C, r, out.dtype, b.dtype, out_stride, a_stride, b_stride, alignments, seed is None),
        out, a, b, scale * _inverse_keep(dropout), seed, stream, threshold, M, C, r,
        *out_stride, *a_stride, *b_stride, 64, 128, 16,
    )  # fmt: skip


def _reduce(small: Tensor, rows: Tensor, transposed: bool = False, dropout: Dropout | None = None) -> Tensor:
    """The transpose of small (M, r) times half rows (M, C) after dropout, in float32: (r, C), or (C, r) if
    ``transposed``. Many rows are summed in up to 8 parts, one after the other added up."""
    (M, r), C = small.shape, rows.shape[1]
    block_M, block_C, block_r = 64, 128, _rank_block(r)
    part = _blocks(_blocks(M, 8 if M > 512 else 1), block_M) * block_M
    parts = _blocks(M, part)
    out = rows.new_empty((parts, C, r) if transposed else (parts, r, C), dtype=torch.float32)
    out_r, out_c = (1, r) if transposed else (C, 1)
    seed, stream, threshold = _words(dropout)
    small_stride, rows_stride = small.stride(), rows.stride()
    alignments = small.data_ptr() & 15, rows.data_ptr() & 15
    _launch_reduce(
        (_blocks(C, block_C), _blocks(r, block_r), parts),
        (r, C, small.dtype, rows.dtype, small_stride, rows_stride, alignments, transposed, seed is None),
        out, small, rows, _inverse_keep(dropout), seed, stream, threshold, M, r, C,
        out_r, out_c, *small_stride, *rows_stride, part, block_M, block_r, block_C,
    )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]


@triton.jit
def _dot(a, b, total):  # type: ignore[no-untyped-def]
    """total + a b on the matrix units. A float32 or float16 operand is the sum of two bfloat16 numbers, to within
    2**-16 of it (a float16 one exactly); the product of the two low numbers, another 2**-16, is left out."""
    a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
    total = tl.dot(a_high, b_high, total)
    if a.dtype != tl.bfloat16:
        total = tl.dot((a.to(tl.float32) - a_high.to(tl.float32)).to(tl.bfloat16), b_high, total)
    if b.dtype != tl.bfloat16:
        total = tl.dot(a_high, (b.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16), total)
    return total


@triton.jit(do_not_specialize=["stream", "threshold", "M"])
def _product_kernel(  # type: ignore[no-untyped-def]
    out, rows, small, scale, seed, stream, threshold, M, K, C, rows_m, rows_k, small_k, small_c,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = row.to(tl.int64)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(rows + m * rows_m + k[None, :] * rows_k, mask=(m < M) & (k[None, :] < K), other=0.0)
        if seed is not None:
            a = a * keep_tile(tl.load(seed), stream, threshold, row, start, K, BLOCK_K).to(a.dtype)
        b = tl.load(small + k[:, None] * small_k + c * small_c, mask=(k[:, None] < K) & (c < C), other=0.0)
        total = _dot(a, b, total)
    tl.store(out + m * C + c, scale * total, mask=(m < M) & (c < C))


@triton.jit(do_not_specialize=["stream", "threshold", "M"])
def _accumulate_kernel(  # type: ignore[no-untyped-def]
    out, a, b, scale, seed, stream, threshold, M, C, R, out_m, out_c, a_m, a_r, b_r, b_c,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_C
    m, c = row.to(tl.int64)[:, None], first + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        a_block = tl.load(a + m * a_m + r[None, :] * a_r, mask=(m < M) & (r[None, :] < R), other=0.0)
        b_block = tl.load(b + r[:, None] * b_r + c * b_c, mask=(r[:, None] < R) & (c < C), other=0.0)
        total = _dot(a_block, b_block, total)
    if seed is not None:
        total = total * keep_tile(tl.load(seed), stream, threshold, row, first, C, BLOCK_C).to(tl.float32)
    inside = (m < M) & (c < C)
    where = out + m * out_m + c * out_c
    total = tl.load(where, mask=inside, other=0.0).to(tl.float32) + scale * total
    tl.store(where, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stream", "threshold", "M", "part"])
def _reduce_kernel(  # type: ignore[no-untyped-def]
    out, small, rows, scale, seed, stream, threshold, M, R, C, out_r, out_c, small_m, small_r, rows_m, rows_c, part,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first_c = tl.program_id(0) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)[None, :]
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    first = tl.program_id(2) * part
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, part, BLOCK_M):
        row = first + start + tl.arange(0, BLOCK_M)
        m = row.to(tl.int64)
        a = tl.load(small + m[None, :] * small_m + r * small_r, mask=(m[None, :] < M) & (r < R), other=0.0)
        b = tl.load(rows + m[:, None] * rows_m + c * rows_c, mask=(m[:, None] < M) & (c < C), other=0.0)
        if seed is not None:
            b = b * keep_tile(tl.load(seed), stream, threshold, row, first_c, C, BLOCK_C).to(b.dtype)
        total = _dot(a, b, total)
    tl.store(out + tl.program_id(2) * R * C + r * out_r + c * out_c, scale * total, mask=(r < R) & (c < C))


_launch_product = Launcher(_product_kernel)
_launch_accumulate = Launcher(_accumulate_kernel, num_stages=2)
_launch_reduce = Launcher(_reduce_kernel)
