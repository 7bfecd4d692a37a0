"""The low-rank term as Triton kernels: many half rows that meet float32 adapters, on an NVIDIA GPU.

Plain aten calls would convert the full-width operands to float32 first. These read each of them once, as they are.
Sums are in float32, in a fixed order; products are within 3 * 2**-16 of their magnitude (`_dot`), a hundredth of a
bfloat16 rounding. Block sizes are the best of a sweep on an H100, at ranks 16 and 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_delta_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """``y += scale · h Bᵀ`` in place, y (M, N) and x (M, K) half; returns h = x Aᵀ (M, r) in float32."""
    h = _product(x, A.t())
    if isinstance(scale, Tensor):
        _accumulate_(y, h * scale, B.t(), 1.0)
    else:
        _accumulate_(y, h, B.t(), scale)
    return h


def backward(
    grad: Tensor, grad_x: Tensor | None, x: Tensor | None, A: Tensor, B: Tensor, scaling: Tensor, h: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``grad_x += z A`` in place with z = s dY B; returns zᵀ x and dYᵀ h. None where a tensor is not given."""
    grad_A = grad_h = None
    if grad_x is not None or x is not None:
        z = _product(grad, B).mul_(scaling)
        if grad_x is not None:
            _accumulate_(grad_x, z, A, 1.0)
        if x is not None:
            grad_A = _reduce(z, x).sum(0)
    if h is not None:
        grad_h = _reduce(h, grad, transposed=True).sum(0)
    return grad_A, grad_h


def _product(rows: Tensor, small: Tensor) -> Tensor:
    """rows (M, K) times small (K, C), C of the order of the rank, in float32."""
    (M, K), C = rows.shape, small.shape[1]
    out = torch.empty(M, C, dtype=torch.float32, device=rows.device)
    block_M, block_K, block_C = 64, 128, _rank_block(C)
    with torch.cuda.device_of(rows):
        _product_kernel[triton.cdiv(M, block_M), triton.cdiv(C, block_C)](
            out, rows, small, M, K, C, *rows.stride(), *small.stride(), block_M, block_K, block_C
        )
    return out


def _accumulate_(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``out += scale · a b`` for half out (M, C), float32 a (M, r) and b (r, C); one rounding."""
    (M, C), r = out.shape, a.shape[1]
    block_M, block_C, block_r = 64, 128, 16
    with torch.cuda.device_of(out):
        _accumulate_kernel[triton.cdiv(M, block_M), triton.cdiv(C, block_C)](
            out, a, b, scale, M, C, r, *out.stride(), *a.stride(), *b.stride(), block_M, block_C, block_r, num_stages=2
        )


def _reduce(small: Tensor, rows: Tensor, transposed: bool = False) -> Tensor:
    """The transpose of small (M, r) times half rows (M, C), in float32, in up to 8 parts of the sum over M: (parts, r,
    C), or (parts, C, r) if ``transposed``."""
    (M, r), C = small.shape, rows.shape[1]
    block_M, block_C, block_r = 64, 128, _rank_block(r)
    part = triton.cdiv(triton.cdiv(M, 8), block_M) * block_M
    parts = triton.cdiv(M, part)
    out = torch.empty((parts, C, r) if transposed else (parts, r, C), dtype=torch.float32, device=rows.device)
    out_r, out_c = (1, r) if transposed else (C, 1)
    with torch.cuda.device_of(rows):
        _reduce_kernel[triton.cdiv(C, block_C), triton.cdiv(r, block_r), parts](
            out, small, rows, M, r, C, out_r, out_c, *small.stride(), *rows.stride(), part, block_M, block_r, block_C
        )
    return out


def _rank_block(r: int) -> int:
    return min(max(triton.next_power_of_2(r), 16), 64)  # 16 is the least that the matrix units take


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


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    out, rows, small, M, K, C, rows_m, rows_k, small_k, small_c,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(rows + m * rows_m + k[None, :] * rows_k, mask=(m < M) & (k[None, :] < K), other=0.0)
        b = tl.load(small + k[:, None] * small_k + c * small_c, mask=(k[:, None] < K) & (c < C), other=0.0)
        total = _dot(a, b, total)
    tl.store(out + m * C + c, total, mask=(m < M) & (c < C))


@triton.jit
def _accumulate_kernel(  # type: ignore[no-untyped-def]
    out, a, b, scale, M, C, R, out_m, out_c, a_m, a_r, b_r, b_c,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        a_block = tl.load(a + m * a_m + r[None, :] * a_r, mask=(m < M) & (r[None, :] < R), other=0.0)
        b_block = tl.load(b + r[:, None] * b_r + c * b_c, mask=(r[:, None] < R) & (c < C), other=0.0)
        total = _dot(a_block, b_block, total)
    inside = (m < M) & (c < C)
    where = out + m * out_m + c * out_c
    total = tl.load(where, mask=inside, other=0.0).to(tl.float32) + scale * total
    tl.store(where, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_kernel(  # type: ignore[no-untyped-def]
    out, small, rows, M, R, C, out_r, out_c, small_m, small_r, rows_m, rows_c, part,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    first = tl.program_id(2).to(tl.int64) * part
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, part, BLOCK_M):
        m = first + start + tl.arange(0, BLOCK_M)
        a = tl.load(small + m[None, :] * small_m + r * small_r, mask=(m[None, :] < M) & (r < R), other=0.0)
        b = tl.load(rows + m[:, None] * rows_m + c * rows_c, mask=(m[:, None] < M) & (c < C), other=0.0)
        total = _dot(a, b, total)
    tl.store(out + tl.program_id(2) * R * C + r * out_r + c * out_c, total, mask=(r < R) & (c < C))
