"""The portable kernels: W is dequantised by blocks, never whole, for torch's own products; the low-rank term and its
gradients are lora_linear's."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...affine import dequantize
from ..dispatch import Floats, Ints, Maybe, Saved
from ..lora_linear.portable import add_delta_, low_rank_backward
from ..rows import HALF, flat, packed, unflat

# Elements of W that are dequantised at a time: 4 MiB of float32 on a CPU, 32 MiB of a half dtype elsewhere. In backward,
# where a block is of whole columns, no fewer than one group of each row.
_BLOCK = {"cpu": 1 << 20}
_BLOCK_ELSEWHERE = 1 << 24


def forward(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    bias: Maybe,
    lora_A: Maybe,
    lora_B: Maybe,
    scaling: float | Tensor,
    seed: Maybe,
    dropout_p: Floats,
    ranks: Ints,
    bits: int,
    group_size: int,
    save_h: bool,
) -> tuple[Tensor, Maybe]:
    """The base product, then y += s h Bᵀ in place. Returns (y, h), h None unless it is to be saved."""
    rows = flat(x)
    if x.dtype in HALF:
        (rows,) = packed(rows)
    y = _product(rows, weight, scales, biases, bias, bits)
    h = None
    if lora_A is not None:
        h = add_delta_(y, rows, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)
    return unflat(y, x), h


def backward(
    grad: Tensor,
    x: Saved,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    lora_A: Maybe,
    lora_B: Maybe,
    scaling: Any,
    h: Saved,
    seed: Maybe,
    dropout_p: Floats,
    ranks: Ints,
    bits: int,
    group_size: int,
    needs: tuple[bool, ...],
) -> tuple[Maybe, ...]:
    """As lora_linear's; of x, weight, scales, biases, bias, lora_A, lora_B and scaling, the packed three None."""
    need_x, need_bias, *low_rank_needs = needs
    rows, x_rows = packed(flat(grad), None if x is None else flat(x))
    base = functools.partial(_product_backward, rows, weight, scales, biases, bits) if need_x else None
    if lora_A is None:
        low_rank: tuple[Maybe, ...] = (base() if base else None, None, None, None)
    else:
        low_rank = low_rank_backward(
            rows, x_rows, base, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, (need_x, *low_rank_needs)
        )
    grad_x, *others = low_rank
    if grad_x is not None:
        grad_x = unflat(grad_x, grad)
    return grad_x, None, None, None, rows.sum(0) if need_bias else None, *others


def _block(weight: Tensor) -> int:
    return _BLOCK.get(weight.device.type, _BLOCK_ELSEWHERE)


def _product(rows: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, bias: Maybe, bits: int) -> Tensor:
    """``rows Wᵀ + bias``, a block of W's rows at a time."""
    N, size = weight.shape[0], max(_block(weight) // max(rows.shape[1], 1), 1)
    if size >= N:
        return F.linear(rows, dequantize(weight, scales, biases, bits, rows.dtype), bias)
    y = rows.new_empty(rows.shape[0], N)
    for start in range(0, N, size):
        part = slice(start, start + size)
        block = dequantize(weight[part], scales[part], biases[part], bits, rows.dtype)
        y[:, part] = F.linear(rows, block, None if bias is None else bias[part])
    return y


def _product_backward(grad: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """``grad W``, a block of W's columns at a time, so that each sum is formed at once."""
    (N, groups), words = scales.shape, weight.shape[1]
    K = words * 32 // bits
    size = max(_block(weight) * groups // max(N * K, 1), 1)
    if size >= groups:
        return grad.mm(dequantize(weight, scales, biases, bits, grad.dtype))
    grad_x = grad.new_empty(grad.shape[0], K)
    for start in range(0, groups, size):
        part = slice(start, start + size)
        held, columns = (slice(start * n // groups, (start + size) * n // groups) for n in (words, K))
        block = dequantize(weight[:, held], scales[:, part], biases[:, part], bits, grad.dtype)
        grad_x[:, columns] = grad.mm(block)
    return grad_x
