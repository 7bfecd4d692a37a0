"""The low-rank term as Triton kernels: half rows that meet adapters, with or without dropout, on an NVIDIA GPU.

Plain aten calls would convert the full-width operands to float32 first, and write dropout's mask and what it leaves.
These read each of them once, as they are, and draw masks in registers. Sums are in float32, in a fixed order;
products are within 3 * 2**-16 of their magnitude (`_dot`), a hundredth of a bfloat16 rounding. Block sizes are the best
of a sweep on an H100, at ranks 16 and 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout.triton import keep_tile, words
from ..launcher import Launcher


class Dropout(NamedTuple):
    """Of one adapter: its ranks, and which elements of its side of an M x K matrix it keeps, each times 1 / (1 - p)."""

    rank: slice
    p: float
    seed: Tensor | int
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
    scale: float | Tensor,
    h: Tensor | None,
    scale_h: bool,
    dropouts: Sequence[Dropout] = (),
) -> tuple[Tensor | None, Tensor | None]:
    """``grad_x += dropout(z A)`` in place with z = s dY B; returns zᵀ dropout(x), and dYᵀ h, times s if ``scale_h``.
    None where a tensor is not given."""
    number = 1.0 if isinstance(scale, Tensor) else scale
    dB = None
    if h is not None:
        if scale_h and isinstance(scale, Tensor):
            h = h * scale
        dB = _Sum(h, grad, number if scale_h else 1.0, transposed=True)
    if grad_x is None and x is None:
        return None, _sums(dB)[0]
    z = _product(grad, B, number)
    if isinstance(scale, Tensor):
        z.mul_(scale)
    parts: list[tuple[slice, Dropout | None]] = [(d.rank, d) for d in dropouts] or [(slice(0, z.shape[1]), None)]
    if grad_x is not None:
        for rank, dropout in parts:
            _accumulate_(grad_x, z[:, rank], A[rank], dropout=dropout)
    if x is None:
        return None, _sums(dB)[0]
    if len(parts) == 1:
        return _sums(_Sum(z, x, dropout=parts[0][1]), dB)
    grad_A: list[Any] = [_sums(_Sum(z[:, rank], x, dropout=dropout))[0] for rank, dropout in parts]
    return torch.cat(grad_A), _sums(dB)[0]


def _words(dropout: Dropout | None) -> tuple[bool, Tensor | None, int, int, int, int]:
    """Whether to drop, and `words`."""
    if dropout is None or dropout.p == 0.0:
        return False, None, 0, 0, 0, 0
    return True, *words(dropout.seed, dropout.stream, dropout.p)


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
    drops, *drop = _words(dropout)
    strides, block_C = (*rows.stride(), *small.stride()), _rank_block(C)
    alignments = rows.data_ptr() & 15, small.data_ptr() & 15
    _launch_product(
        rows.device,
        (_blocks(M, 64), _blocks(C, block_C), 1),
        (K, C, rows.dtype, small.dtype, strides, alignments, drops, drop[0] is None),
        out, rows, small, scale * _inverse_keep(dropout), *drop, M, K, C, *strides, drops, 64, 128, block_C,
    )  # fmt: skip
    return out


def _accumulate_(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, dropout: Dropout | None = None) -> None:
    """``out += dropout(scale · a b)`` for half out (M, C), float32 a (M, r) and b (r, C); one rounding."""
    (M, C), r = out.shape, a.shape[1]
    drops, *drop = _words(dropout)
    strides = *out.stride(), *a.stride(), *b.stride()
    alignments = out.data_ptr() & 15, a.data_ptr() & 15, b.data_ptr() & 15
    _launch_accumulate(
        out.device,
        (_blocks(M, 64), _blocks(C, 128), 1),
        (C, r, out.dtype, b.dtype, strides, alignments, drops, drop[0] is None),
        out, a, b, scale * _inverse_keep(dropout), *drop, M, C, r, *strides, drops, 64, 128, 16,
    )  # fmt: skip


class _Sum(NamedTuple):
    """The transpose of small (M, r) times half rows (M, C) after dropout, times a scale: (r, C), or transposed."""

    small: Tensor
    rows: Tensor
    scale: float = 1.0
    dropout: Dropout | None = None
    transposed: bool = False


def _sums(first: _Sum | None, second: _Sum | None = None) -> tuple[Tensor | None, Tensor | None]:
    """One or two sums over the same M rows, in one launch, in float32; the second has no dropout. Many rows are summed
    in up to 8 parts, which are then added up."""
    if first is None:
        return None, None
    (M, r), C = first.small.shape, first.rows.shape[1]
    more = 0 if second is None else second.rows.shape[1]
    part = _blocks(_blocks(M, 8 if M > 512 else 1), 64) * 64
    parts, blocks, total = _blocks(M, part), _blocks(C, 128), r * (C + more)
    out = first.rows.new_empty((parts, total), dtype=torch.float32)
    drops, *drop = _words(first.dropout)
    tensors = first.small, first.rows, *((None, None) if second is None else second[:2])
    strides = tuple(stride for t in tensors for stride in ((0, 0) if t is None else t.stride()))
    kinds = tuple(None if t is None else (t.dtype, t.data_ptr() & 15) for t in tensors)
    block_r = _rank_block(r)
    _launch_sums(
        out.device,
        (blocks + _blocks(more, 128), _blocks(r, block_r), parts),
        (r, C, more, strides, kinds, first.transposed, drops, drop[0] is None),
        out, *tensors, first.scale * _inverse_keep(first.dropout), 1.0 if second is None else second.scale, *drop,
        M, r, C, more, *strides, total, blocks, part, first.transposed, drops, 64, block_r, 128,
    )  # fmt: skip
    found = out.sum(0) if parts > 1 else out[0]
    shape = (C, r) if first.transposed else (r, C)
    return found[: r * C].view(shape), None if second is None else found[r * C :].view(more, r)


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


_SCALARS = ["low", "high", "stream", "threshold", "M"]  # neither compiled for 1 nor for multiples of 16


@triton.jit(do_not_specialize=_SCALARS)
def _product_kernel(  # type: ignore[no-untyped-def]
    out, rows, small, scale, seed, low, high, stream, threshold, M, K, C, rows_m, rows_k, small_k, small_c,
    DROPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = row.to(tl.int64)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(rows + m * rows_m + k[None, :] * rows_k, mask=(m < M) & (k[None, :] < K), other=0.0)
        if DROPS:
            a = a * keep_tile(seed, low, high, stream, threshold, row, start, K, BLOCK_K).to(a.dtype)
        b = tl.load(small + k[:, None] * small_k + c * small_c, mask=(k[:, None] < K) & (c < C), other=0.0)
        total = _dot(a, b, total)
    tl.store(out + m * C + c, scale * total, mask=(m < M) & (c < C))


@triton.jit(do_not_specialize=_SCALARS)
def _accumulate_kernel(  # type: ignore[no-untyped-def]
    out, a, b, scale, seed, low, high, stream, threshold, M, C, R, out_m, out_c, a_m, a_r, b_r, b_c,
    DROPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_C
    m, c = row.to(tl.int64)[:, None], first + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        a_block = tl.load(a + m * a_m + r[None, :] * a_r, mask=(m < M) & (r[None, :] < R), other=0.0)
        b_block = tl.load(b + r[:, None] * b_r + c * b_c, mask=(r[:, None] < R) & (c < C), other=0.0)
        total = _dot(a_block, b_block, total)
    if DROPS:
        total = total * keep_tile(seed, low, high, stream, threshold, row, first, C, BLOCK_C).to(tl.float32)
    inside = (m < M) & (c < C)
    where = out + m * out_m + c * out_c
    total = tl.load(where, mask=inside, other=0.0).to(tl.float32) + scale * total
    tl.store(where, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_tile(  # type: ignore[no-untyped-def]
    out, small, rows, scale, seed, low, high, stream, threshold, M, R, C, small_m, small_r, rows_m, rows_c, block, part,
    TRANSPOSED: tl.constexpr, DROPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, part, BLOCK_M):
        row = tl.program_id(2) * part + start + tl.arange(0, BLOCK_M)
        m = row.to(tl.int64)
        a = tl.load(small + m[None, :] * small_m + r * small_r, mask=(m[None, :] < M) & (r < R), other=0.0)
        b = tl.load(rows + m[:, None] * rows_m + c * rows_c, mask=(m[:, None] < M) & (c < C), other=0.0)
        if DROPS:
            b = b * keep_tile(seed, low, high, stream, threshold, row, block * BLOCK_C, C, BLOCK_C).to(b.dtype)
        total = _dot(a, b, total)
    where = c * R + r if TRANSPOSED else r * C + c
    tl.store(out + where, scale * total, mask=(r < R) & (c < C))


@triton.jit(do_not_specialize=[*_SCALARS, "total", "blocks", "part"])
def _sums_kernel(  # type: ignore[no-untyped-def]
    out, small, rows, small_2, rows_2, scale, scale_2, seed, low, high, stream, threshold, M, R, C, C_2,
    small_m, small_r, rows_m, rows_c, small_2_m, small_2_r, rows_2_m, rows_2_c, total, blocks, part,
    TRANSPOSED: tl.constexpr, DROPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    out += tl.program_id(2).to(tl.int64) * total
    if block < blocks:
        _sum_tile(
            out, small, rows, scale, seed, low, high, stream, threshold, M, R, C, small_m, small_r, rows_m, rows_c,
            block, part, TRANSPOSED, DROPS, BLOCK_M, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    elif small_2 is not None:
        _sum_tile(
            out + R * C, small_2, rows_2, scale_2, None, 0, 0, 0, 0, M, R, C_2, small_2_m, small_2_r, rows_2_m,
            rows_2_c, block - blocks, part, True, False, BLOCK_M, BLOCK_R, BLOCK_C,
        )  # fmt: skip


_launch_product = Launcher(_product_kernel)
_launch_accumulate = Launcher(_accumulate_kernel, num_stages=2)
_launch_sums = Launcher(_sums_kernel)
