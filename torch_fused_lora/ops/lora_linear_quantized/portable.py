"""The portable kernels: W is dequantised by blocks, never whole, for torch's own products; the low-rank term and its
gradients are lora_linear's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...affine import Packed
from ..dispatch import Flags, Floats, Ints, Maybe, Saved, Seed
from ..lora_linear.portable import add_delta_, low_rank_backward
from ..lora_linear.ways import has_kernels, limits_of
from ..rows import HALF, flat, packed, unflat

# Elements of W that are dequantised at a time: 4 MiB of float32 on a CPU, 32 MiB of a half dtype elsewhere. In backward
# a block is of columns, no fewer than one group of each row.
_BLOCK = 1 << 20
_BLOCK_ELSEWHERE = 1 << 24


def forward(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    bias: Maybe,
    lora_A: Saved,
    lora_B: Saved,
    scaling: float | Tensor,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    bits: int,
    group_size: int,
    save_h: bool,
) -> tuple[Tensor, Maybe]:
    """The base product, then y += s h Bᵀ in place; of few half rows on an NVIDIA GPU both in one kernel, rounded once.
    Returns (y, h), h None unless there is one that is to be saved."""
    (rows,) = packed(flat(x))
    base, h = Packed(weight, scales, biases, bits, group_size), None
    kernels = _triton(base, x.dtype)
    if kernels and x.dtype in HALF and seed is None and 0 < rows.shape[0] <= kernels.ROWS and weight.numel():
        y, h = kernels.product(rows, base, bias, lora_A, lora_B, scaling, save_h)
    else:
        y = _product(rows, base, bias)
        if lora_A is not None:
            h = add_delta_(y, rows, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)
    return unflat(y, x), h if save_h else None


def backward(
    grad: Tensor,
    x: Saved,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    lora_A: Saved,
    lora_B: Saved,
    scaling: Any,
    h: Saved,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
    bits: int,
    group_size: int,
    needs: Flags,
) -> tuple[Maybe, ...]:
    """As lora_linear's, in the order of the forward's inputs."""
    need_x, need_bias, *low_rank_needs = needs
    rows, x_rows = packed(flat(grad), None if x is None else flat(x))
    base = functools.partial(_product_backward, Packed(weight, scales, biases, bits, group_size))
    grad_x: Maybe
    others: Sequence[Maybe]
    if lora_A is None:
        grad_x, others = base(rows) if need_x else None, (None, None, None)
    else:
        operands = rows, x_rows, None, base if need_x else None, lora_A, lora_B, scaling, h
        grad_x, *others = low_rank_backward(*operands, seed, dropout_p, ranks, (need_x, *low_rank_needs))
    return with_packed(None if grad_x is None else unflat(grad_x, grad), rows.sum(0) if need_bias else None, *others)


def with_packed(x: Any, *others: Any) -> tuple[Any, ...]:
    """What concerns x, bias, lora_A, lora_B and scaling, and in their places nothing of weight, scales and biases."""
    return x, None, None, None, *others


def _product(rows: Tensor, weight: Packed, bias: Maybe) -> Tensor:
    """``rows Wᵀ + bias``, a block of W's rows at a time."""
    (N, groups), K = weight.scales.shape, rows.shape[1]
    size = max(_block(rows) // max(K, 1), 1)
    if size >= N:
        return F.linear(rows, _dequantized(weight, rows.dtype), bias)
    y = rows.new_empty(rows.shape[0], N)
    for start in range(0, N, size):
        part = slice(start, start + size)
        block = _dequantized(weight.part(part, slice(0, groups)), rows.dtype)
        y[:, part] = F.linear(rows, block, None if bias is None else bias[part])
    return y


def _product_backward(weight: Packed, grad: Tensor) -> Tensor:
    """``grad W``, a block of W's columns at a time, so that no sum is rounded before its end."""
    (N, groups), width = weight.scales.shape, weight.group_size
    size = max(_block(grad) // max(N * width, 1), 1)
    if size >= groups:
        return grad.mm(_dequantized(weight, grad.dtype))
    grad_x = grad.new_empty(grad.shape[0], groups * width)
    for start in range(0, groups, size):
        stop = start + size
        block = _dequantized(weight.part(slice(0, N), slice(start, stop)), grad.dtype)
        grad_x[:, start * width : stop * width] = grad.mm(block)
    return grad_x


def _block(rows: Tensor) -> int:
    return _BLOCK if rows.is_cpu else _BLOCK_ELSEWHERE


def _dequantized(weight: Packed, dtype: torch.dtype) -> Tensor:
    kernels = _triton(weight, dtype)
    return kernels.dequantize(weight, dtype) if kernels and weight.words.numel() else weight.dequantize(dtype)


def _triton(weight: Packed, dtype: torch.dtype) -> Any:
    """The module of Triton kernels where they compute, or None: they know no tables."""
    device = weight.words.device
    index = -1 if device.index is None else device.index
    if weight.has_table or not limits_of(device.type).triton or dtype is torch.float64 or not has_kernels(index):
        return None
    from . import triton

    return triton
