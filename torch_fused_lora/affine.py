"""MLX's affine format: a weight as whole numbers of 4 or 8 bits, with a scale and a bias for each group of a row.

A weight (N, K) is held as ``words``, uint32 (N, K · bits / 32), the first element of a word in its lowest bits, with
``scales`` and ``biases`` (N, K / group_size) of the weight's own half dtype or float32: w = scale · q + bias.

And, to be read alone, bitsandbytes' NF4 and FP4: ``words`` are uint8 (N, K / 2), the first element of a byte in its
high bits, ``scales`` are float32, and in the biases' place is a table of 16 float32: w = scale · table[q].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops.rows import wide_dtype

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ENTRIES = 16  # of a table
_LEAST_SCALE = 1e-7


def why_not(bits: int, group_size: int) -> tuple[str, int, str] | None:
    """What of a format is not supported: its name, its value and what was expected."""
    if bits not in BITS:
        return "bits", bits, "4 or 8 (2, 3, 5 and 6 are not supported)"
    if group_size not in GROUP_SIZES:
        return "group_size", group_size, "32, 64 or 128"
    return None


def has_table(words: Tensor) -> bool:
    """Whether these are of the format whose codes are looked up in a table."""
    return words.dtype is torch.uint8


class Packed(NamedTuple):
    """A weight (N, K) in one of the formats."""

    words: Tensor
    scales: Tensor
    biases: Tensor  # or the table
    bits: int
    group_size: int

    @property
    def has_table(self) -> bool:
        return has_table(self.words)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, formed in float32 (float64 for float64), then rounded to ``dtype``."""
        wide = wide_dtype(dtype)
        held = self.words if self.has_table else self.words.view(torch.int32)  # few operators take uint32
        held = held.contiguous().view(torch.uint8)
        if self.has_table:
            table = self.biases.to(wide)
            codes = torch.stack((table[held.int() >> 4], table[held.int() & 15]), -1)
        elif self.bits == 8:
            codes = held.to(wide)
        else:  # on a CPU in an eighth of the time that it takes to stack the two
            codes = held.new_empty((*held.shape, 2), dtype=wide)
            codes[..., 0] = held & 15
            codes[..., 1] = held >> 4
        groups = codes.view(*self.scales.shape, self.group_size)
        groups.mul_(self.scales.to(wide)[..., None])
        if not self.has_table:
            groups.add_(self.biases.to(wide)[..., None])
        return groups.flatten(-2).to(dtype)

    def part(self, rows: slice, groups: slice) -> Packed:
        """Of these rows, and of these groups of each, both slices with an end."""
        in_word = 8 * self.words.element_size() // self.bits
        words = slice(*(group * self.group_size // in_word for group in (groups.start, groups.stop)))
        biases = self.biases if self.has_table else self.biases[rows, groups]
        return self._replace(words=self.words[rows, words], scales=self.scales[rows, groups], biases=biases)


def quantize(weight: Tensor, bits: int, group_size: int) -> Packed:
    """A finite weight (N, K) of one of `SCALE_DTYPES`, the same bits as `mlx.core.quantize` gives on a CPU.

    The end of a group's range that is larger in magnitude is a whole number of scales, and so is zero.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    low, high, most = groups.amin(-1), groups.amax(-1), (1 << bits) - 1
    edge = torch.where(low.abs() > high.abs(), low, high)
    scales = ((high - low) / most).clamp_min(_LEAST_SCALE)
    scales = torch.where(low.abs() > high.abs(), scales, -scales)
    steps = (edge / scales).round()
    scales = torch.where(steps == 0, scales, edge / steps)
    biases = torch.where(steps == 0, 0.0, edge)
    codes = ((groups - biases[..., None]) / scales[..., None]).round().clamp(0, most).flatten(-2).to(torch.uint8)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    words = codes.contiguous().view(torch.uint32)
    return Packed(words, scales.to(weight.dtype), biases.to(weight.dtype), bits, group_size)
