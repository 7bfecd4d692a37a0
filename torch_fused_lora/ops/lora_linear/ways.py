"""Which way a portable kernel of lora_linear takes: one function, from one table."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any

import torch
from torch import Tensor


class Way(enum.Enum):
    """How the rows meet the adapters."""

    WHOLE = "all rows at once"
    BLOCKS = "by blocks of rows, which are converted or masked one after the other"
    TRITON = "by Triton kernels, which convert what they read"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one device type. ``block``: elements that are converted or masked at a time. ``few``: rows that are never
    split into blocks. ``triton``: rows up to which half rows and float32 adapters are left to aten calls."""

    block: int
    few: int = 16
    triton: int | None = None

    def __str__(self) -> str:
        text = f"converts {self.block} elements at a time, or up to {self.few} rows"
        return text if self.triton is None else f"{text}; by Triton where there are more than {self.triton} rows"


# 8 MiB of float32 on a CPU: smaller blocks would stay in L2, and are no faster on a quiet CPU; on a busy one each
# parallel aten call may wait a scheduler's time slice for its threads, so that few large blocks win by far.
TABLE = {"cpu": Limits(block=1 << 21), "cuda": Limits(block=1 << 24, triton=1024), "xpu": Limits(block=1 << 24)}


def limits_of(device_type: str) -> Limits:
    return TABLE.get(device_type, TABLE["xpu"])


def block_rows(A: Tensor, B: Tensor) -> int:
    """Rows of a block, for adapters of these widths."""
    limits = limits_of(A.device.type)
    return max(limits.block // max(A.shape[1], B.shape[0], 1), limits.few)


def choose(rows: Tensor, A: Tensor, B: Tensor, drops: bool) -> Way:
    """The way for these rows and for adapters that are converted already."""
    if drops:
        return Way.BLOCKS
    if rows.dtype is A.dtype:
        return Way.WHOLE
    limits, count = limits_of(rows.device.type), rows.shape[0]
    if count <= limits.few:
        return Way.WHOLE
    if limits.triton is not None and count > limits.triton and triton_kernels():
        return Way.TRITON
    return Way.WHOLE if count <= block_rows(A, B) else Way.BLOCKS


@functools.cache
def triton_kernels() -> Any:
    """The module of Triton kernels, or None where there is no Triton for NVIDIA."""
    if torch.version.hip is not None:
        return None
    try:
        from . import triton
    except ImportError:
        return None
    return triton
