"""Packed words on an NVIDIA GPU, as Triton kernels: a product of few half rows in one pass over them, and their
dequantisation for torch's own products of many.

Least traffic of the product: the packed bytes, once; a tile of the weight exists in registers only. It and the weight
that `dequantize` writes are formed in float32 and rounded once to x's dtype, but where one row is multiplied in
float32, past the matrix units. With an adapter a launch of lora_linear's makes h in parts, which the product adds up.
Block sizes are the best of sweeps on an H200.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...affine import Packed
from ..dispatch import Maybe
from ..launcher import Launcher, kind, prepared
from ..lora_linear import triton as low_rank
from ..lora_linear.triton import as_scale, ceil_div

ROWS = 16  # of the product: what one tile of the matrix units takes


def product(
    rows: Tensor,
    packed: Packed,
    bias: Maybe,
    lora_A: Maybe,
    lora_B: Maybe,
    scaling: float | Tensor,
    save_h: bool,
) -> tuple[Tensor, Maybe]:
    """``rows Wᵀ + bias + scaling · h Bᵀ``, rounded once, for half rows (M, K), M up to `ROWS`; and h = rows Aᵀ (M, r)
    in the adapter's dtype, if there is one and it is to be saved."""
    words, scales, biases, bits, group_size = _contiguous(packed)
    bias = None if bias is None else bias.contiguous()  # the kernel takes no stride of it
    number, factor = as_scale(scaling, rows)
    given = rows, words, scales, biases, bias, lora_A, lora_B, factor
    key = product, save_h, bits, group_size, *map(kind, given)
    launches = prepared.get(key)
    if launches is None:
        low_rank.check_fit(rows, lora_A, lora_B, (scales.shape[0], scales.shape[1] * group_size), words)
        launches = prepared.keep(key, {})
    out = rows.new_empty((rows.shape[0], scales.shape[0]))
    found, parts, h, saved = None, 1, None, None
    if lora_A is not None:
        parts = low_rank.parts_of(*rows.shape, lora_A.shape[0])
        found, h, saved = low_rank.low_rank(launches, parts, rows, lora_A, save_h)
    tensors = out, rows, words, scales, biases, bias, found, lora_B, h, factor
    _launch_product(tensors, (number, rows.shape[0]), (parts, bits, group_size), launches)
    return out, saved


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`Packed.dequantize`, to no float64."""
    words, scales, biases, bits, group_size = _contiguous(packed)
    N, K = scales.shape[0], scales.shape[1] * group_size
    out = scales.new_empty((N, K), dtype=dtype)
    key = dequantize, dtype, bits, group_size, kind(words), kind(scales), kind(biases)
    launches = prepared.get(key) or prepared.keep(key, {})
    _launch_dequantize((out, words, scales, biases), (), (bits, group_size), launches)
    return out


def _contiguous(packed: Packed) -> Packed:
    """With words as bytes."""
    words = packed.words.view(torch.int32).contiguous().view(torch.uint8)
    return packed._replace(words=words, scales=packed.scales.contiguous(), biases=packed.biases.contiguous())


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    words, scales, biases, n, start, K, N,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows n of the weight, columns ``start`` onwards, (BLOCK_N, BLOCK_K) in float32; beyond its edges 0."""
    row = n.to(tl.int64)[:, None]
    byte = start * BITS // 8 + tl.arange(0, BLOCK_K * BITS // 8)[None, :]
    held = tl.load(words + row * (K * BITS // 8) + byte, mask=(row < N) & (byte < K * BITS // 8), other=0)
    codes = tl.interleave(held & 15, held >> 4) if BITS == 4 else held
    group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
    inside = (row < N) & (group < K // GROUP)
    scale = tl.load(scales + row * (K // GROUP) + group, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(biases + row * (K // GROUP) + group, mask=inside, other=0.0).to(tl.float32)
    groups = tl.reshape(codes.to(tl.float32), (BLOCK_N, BLOCK_K // GROUP, GROUP))
    return tl.reshape(groups * scale[:, :, None] + offset[:, :, None], (BLOCK_N, BLOCK_K))


@triton.jit(do_not_specialize=["number", "M"])
def _product_kernel(  # type: ignore[no-untyped-def]
    out, rows, words, scales, biases, bias, parts, lora_B, h, factor, number, M, K, N, R, rows_m, rows_k, B_n, B_r,
    PARTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row is summed up where its products are, in the layout that words are unpacked in; more, by matrix units."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ONE: tl.constexpr = BLOCK_M == 1
    total = tl.zeros([BLOCK_N, BLOCK_K] if ONE else [BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(rows + m * rows_m + k * rows_k, mask=(m < M) & (k < K), other=0.0)
        tile = _tile(words, scales, biases, n, start, K, N, BITS, GROUP, BLOCK_N, BLOCK_K)
        total = total + x.to(tl.float32) * tile if ONE else tl.dot(x, tl.trans(tile.to(x.dtype)), total)
    if ONE:
        total = tl.sum(total, 1)[None, :]
    column = n[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    if parts is not None:
        term = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, R, 16):
            r = start + tl.arange(0, 16)
            inside = (m < M) & (r[None, :] < R)
            a = low_rank.sum_of_parts(parts + m * R + r[None, :], M * R, inside, PARTS)
            if h is not None and tl.program_id(0) == 0:
                tl.store(h + m * R + r[None, :], a.to(h.dtype.element_ty), mask=inside)
            b = tl.load(lora_B + r[:, None] * B_r + column * B_n, mask=(r[:, None] < R) & (column < N), other=0.0)
            if ONE:
                term += tl.sum(tl.trans(a) * b.to(tl.float32), 0)[None, :]
            else:
                term = low_rank._dot(a, b, term)
        total += low_rank.times(number, factor) * term
    where = out + m * N + column
    tl.store(where, total.to(out.dtype.element_ty), mask=(m < M) & (column < N))


def _prepare_product(  # type: ignore[no-untyped-def]
    out, rows, words, scales, biases, bias, found, lora_B, h, factor, parts, bits, group_size
):  # fmt: skip
    (M, N), K, R = out.shape, rows.shape[1], 0 if lora_B is None else lora_B.shape[1]
    strides = *rows.stride(), *((0, 0) if lora_B is None else lora_B.stride())
    blocks = (1, 8, 512) if M == 1 else (ROWS, 32, 256)
    return (ceil_div(N, blocks[1]), 1, 1), (K, N, R, *strides, parts, bits, group_size, *blocks), {}


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    out, words, scales, biases, K, N,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, start = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    tile = _tile(words, scales, biases, n, start, K, N, BITS, GROUP, BLOCK_N, BLOCK_K)
    row, k = n.to(tl.int64)[:, None], start + tl.arange(0, BLOCK_K)[None, :]
    tl.store(out + row * K + k, tile.to(out.dtype.element_ty), mask=(row < N) & (k < K))


def _prepare_dequantize(out, words, scales, biases, bits, group_size):  # type: ignore[no-untyped-def]
    N, K = out.shape
    return (ceil_div(N, 16), ceil_div(K, 256), 1), (K, N, bits, group_size, 16, 256), {}


_launch_product = Launcher(_product_kernel, _prepare_product)
_launch_dequantize = Launcher(_dequantize_kernel, _prepare_dequantize)
