"""Which way a portable kernel of lora_linear takes: one function, from one table."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tuned import Layer, Table, bucket, numbers_of
from ..dispatch import device_type_of
from ..rows import HALF, count_rows

FEW = 16  # rows that are never split into blocks


class Way(enum.Enum):
    """How the rows meet the adapters."""

    WHOLE = "all rows at once"
    BLOCKS = "by blocks of rows, which are converted or masked one after the other"
    TRITON = "by Triton kernels, which convert what they read"


WHOLE, BLOCKS, BY_TRITON = Way  # read faster than an enumeration's members


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one device type. ``block``: elements that are converted or masked at a time. ``triton``: whether half rows
    meet adapters in Triton kernels. ``carrying``: from how many bfloat16 rows on the base product carries the rank, on
    Hopper. ``follows``: whether a layer that is torch's own calls as they are is left to autograd: that takes less of
    the host's time than a node of ours."""

    block: int
    triton: bool = False
    carrying: int = 0
    follows: bool = False

    def __str__(self) -> str:
        text = f"converts {self.block} elements at a time, or {FEW} rows"
        if self.triton:
            text += "; half rows by Triton"
        if self.carrying:
            text += f", from {self.carrying} on in the base product on Hopper"
        return f"{text}; leaves layers of torch's own calls to autograd" if self.follows else text


# 8 MiB of float32 on a CPU: smaller blocks would stay in L2, and are no faster on a quiet CPU; on a busy one each
# parallel aten call may wait a scheduler's time slice for its threads, so that few large blocks win by far.
TABLE = {
    "cpu": Limits(block=1 << 21),
    "cuda": Limits(block=1 << 24, triton=True, carrying=512, follows=True),
    "xpu": Limits(block=1 << 24),
}


def limits_of(device_type: str) -> Limits:
    return TABLE.get(device_type, TABLE["xpu"])


def block_rows(A: Tensor, B: Tensor) -> int:
    """Rows of a block, for adapters of these widths."""
    limits = limits_of(A.device.type)
    return max(limits.block // max(A.shape[1], B.shape[0], 1), FEW)


class Tuned(NamedTuple):
    """Of a layer: by Triton's kernels beside torch's product (1), by torch's own calls (2), or with a base product that
    carries the rank (3), and the tiles of Triton's kernels; 0 and None: as chosen."""

    way: int = 0
    tiles: Any = None


class TunedLayers:
    """What is tuned for a card, in force as long as torch is not to be deterministic."""

    def __init__(self, device: int):
        self._found: dict[tuple[Any, ...], Tuned] = {}
        name, cores = "cpu", 0
        if device >= 0:
            properties = torch.cuda.get_device_properties(device)
            name, cores = properties.name, properties.multi_processor_count
        self.table = Table.load(name, cores, self.tune)

    def tune(self, layer: Layer, overrides: str) -> str | None:
        """Take a layer so from now on, as chosen for an empty text; or what is wrong with it."""
        dtypes = [getattr(torch, name, None) for name in layer[5:]]
        if dtypes[0] not in HALF or dtypes[1] not in (dtypes[0], torch.float32):
            return "expected half rows, and adapters of their dtype or float32"
        self._found.pop(key := (*layer.bucket[:5], *dtypes), None)
        if not overrides:
            return None
        try:
            numbers = numbers_of(overrides)
            way = numbers.pop("lora_linear.way", 0)
            tiles = triton_kernels().tiles_of(numbers)
        except ValueError as error:
            return str(error)
        if not 0 <= way <= 3:
            return f"lora_linear.way={way}: expected one of 1, 2, 3"
        self._found[key] = Tuned(way, tiles)
        return None

    def of(self, backward: bool, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tuned:
        if not self._found or torch.are_deterministic_algorithms_enabled():
            return _UNTUNED
        (r, K), N = lora_A.shape, lora_B.shape[0]
        key = backward, bucket(count_rows(x)), K, N, r, x.dtype, lora_A.dtype
        return self._found.get(key, _UNTUNED)


_UNTUNED = Tuned()
tuned_layers = functools.cache(TunedLayers)


def choose(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, drops: int, backward: bool = False, sum_dtype: Any = None
) -> tuple[Way, Tensor, Tensor]:
    """The way for the rows of x, and the adapters in the dtype in which rows meet them: their own, but float32 for half
    adapters where aten calls drop, and on a CPU that does not multiply halves, or adds them to a wider sum. ``drops``:
    how many adapters drop, each with a mask of its own. ``sum_dtype``: what is added to, unless it is as the rows."""
    x_dtype, dtype = x.dtype, lora_A.dtype
    if x_dtype not in HALF:
        if dtype is x_dtype and not drops:
            return WHOLE, lora_A, lora_B
    elif limits_of(device_type_of(x)).triton and _is_triton_s(x, lora_A, lora_B, drops, backward):
        return BY_TRITON, lora_A, lora_B
    count = count_rows(x)
    is_block = drops <= 1 and (count <= FEW or count <= block_rows(lora_A, lora_B))
    if dtype in HALF:
        stays = dtype is x_dtype and not drops
        if lora_A.is_cpu:
            alike = x_dtype is dtype is (sum_dtype or dtype) and (is_block or not drops)
            stays = alike and _multiplies(dtype) and _are_packed(lora_A, lora_B)
        if not stays:
            lora_A, lora_B = lora_A.float(), lora_B.float()
    if is_block or (not drops and x_dtype is lora_A.dtype):
        return WHOLE, lora_A, lora_B
    return BLOCKS, lora_A, lora_B


def _is_triton_s(x: Tensor, lora_A: Tensor, lora_B: Tensor, drops: int, backward: bool) -> bool:
    """Whether Triton's kernels take half rows, on a device where they do: no grid is empty, masks begin at whole
    counters of 8 elements, and another way may be tuned."""
    K = lora_A.shape[1]
    if not (x.numel() and K and lora_B.shape[0] and has_kernels(index := x.get_device())):
        return False
    return K % 8 == 0 if drops else tuned_layers(index).of(backward, x, lora_A, lora_B).way != 2


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor, by what torch says of it, has instructions that multiply halves of a dtype."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.13
    return dtype is torch.bfloat16 and bool(capabilities.get("avx512_bf16"))


def _are_packed(lora_A: Tensor, lora_B: Tensor) -> bool:
    return lora_A.is_contiguous() and lora_B.is_contiguous()


def autograd_follows(x: Tensor) -> bool:
    """Whether autograd is left to follow a layer on x's device that `choose` makes of torch's own calls, as it is."""
    return limits_of(device_type_of(x)).follows


@functools.cache
def has_kernels(device: int) -> bool:
    """Whether there are Triton kernels for a card: its matrix units have to multiply bfloat16, as they do from Ampere
    on. The CPU is -1, where kernels are interpreted."""
    return triton_kernels() is not None and (device < 0 or torch.cuda.get_device_capability(device) >= (8, 0))


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


def carrying_rank(rows: Tensor, weight: Tensor | None, columns: int, tuned: int = 0) -> Any:
    """The module of Gluon kernels where ``rows``' product with a weight, of so many columns, is to carry the rank; else
    None: torch's own product comes first. The tensor copy engine wants addresses and rows at multiples of 16 bytes.
    ``tuned``: the way that is, 0 for none."""
    if weight is None or tuned == 1 or not _carries(rows, tuned == 3) or any(count % 8 for count in weight.shape):
        return None
    kernels = _gluon_kernels(rows.get_device())
    fits = tuned == 3 or kernels.fills(rows.shape[0], columns, rows.get_device())
    return kernels if fits and _is_tileable(rows) and _is_tileable(weight) else None


def _carries(x: Tensor, few: bool = False) -> bool:
    if not x.is_cuda or (count_rows(x) < TABLE["cuda"].carrying and not few) or x.dtype is not torch.bfloat16:
        return False
    return _gluon_kernels(x.get_device()) is not None


def _is_tileable(matrix: Tensor) -> bool:
    row, column = matrix.stride()
    return column == 1 and row % 8 == 0 and row >= matrix.shape[1] and matrix.data_ptr() % 16 == 0


@functools.cache
def _gluon_kernels(device: int) -> Any:
    """The module, for a Hopper card and a release of Triton with which it has run."""
    if triton_kernels() is None or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    from ..launcher import is_tested

    if not is_tested():
        return None
    from . import gluon

    return gluon
