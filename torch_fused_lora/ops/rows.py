"""What the operators' families share: rows of operands, their dtypes and how they are converted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import mps
from .dispatch import Saved

HALF = frozenset((torch.float16, torch.bfloat16))
DTYPES = HALF | {torch.float32, torch.float64}
DTYPES_TEXT = "float16, bfloat16, float32 or float64"
METAL_DTYPES = tuple(getattr(torch, name) for name in mps.DTYPES)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums are formed: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # a `to` that does nothing still takes a microsecond


def flat(x: Tensor) -> Tensor:
    """x as a matrix (M, last dimension): a view wherever one exists."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def by_rows(x: Tensor) -> Tensor:
    """x as kernels read it that know no shapes, only rows: as it is where these lie one after the other, since a view
    costs the host more than to see that; else flat."""
    return x if x.is_contiguous() else flat(x)


def folds(x: Tensor) -> bool:
    """Whether torch's products take x, of three dimensions or more, as one matrix of rows: by all of its strides, those
    of dimensions of one element, too. Else they make a product of each row."""
    sizes, strides = x.shape, x.stride()
    return x.dim() > 2 and all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(x.dim() - 1))


def count_rows(x: Tensor) -> int:
    return x.shape[0] if x.dim() == 2 else x.numel() // max(x.shape[-1], 1)


def unflat(rows: Tensor, like: Tensor) -> Tensor:
    """The fresh contiguous matrix (M, C) in the leading shape of ``like``: itself, resized, since autograd forbids
    in-place use of an operator's output that is a view; a view where autograd has followed what made it. As it is if it
    has that shape."""
    if rows.dim() == like.dim():
        return rows
    shape = *like.shape[:-1], rows.shape[1]
    return rows.view(*shape) if rows.requires_grad else rows.resize_(*shape)


def packed(*matrices: Saved) -> tuple[Saved, ...]:
    """Matrices as torch's products may read them: halves with gaps between rows (or columns) are copied on a CPU, where
    torch's product by AMX reads into the gaps."""
    for matrix in matrices:
        if matrix is not None and matrix.dtype in HALF and not matrix.is_contiguous():
            return tuple(_packed(matrix) for matrix in matrices)
    return matrices


def _packed(matrix: Saved) -> Saved:
    if matrix is None or matrix.dtype not in HALF or not matrix.is_cpu:
        return matrix
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    has_gaps = (column_stride == 1 and row_stride > columns) or (row_stride == 1 and column_stride > rows)
    return matrix.contiguous() if has_gaps else matrix
