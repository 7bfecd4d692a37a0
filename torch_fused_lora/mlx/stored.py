"""Reading safetensors, a tensor at a time and each once into memory of its own: the library's reader maps whole files,
whose pages count beside the copies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {"U32": torch.uint32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class Stored(NamedTuple):
    """A tensor in a file. ``dtype`` is the file's word for it, where that is none of those above."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]
    path: Path
    start: int

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        assert isinstance(self.dtype, torch.dtype)
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise ValueError(f"{self.path}: it has become shorter")
        return tensor


def header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        ValueError: no header, or one that does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise ValueError(f"{path}: expected a safetensors file, got a header of {start - 8} bytes in {size}")
        try:
            entries = json.loads(file.read(start - 8))
            entries.pop("__metadata__", None)
            parts = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in entries.items()}
            for _, shape, begin, end in parts.values():
                if any(type(number) is not int for number in (*shape, begin, end)):  # a bool is one to isinstance
                    raise TypeError("sizes and offsets are integers")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a safetensors file, got another header") from error
    found = {}
    for name, (word, shape, begin, end) in parts.items():
        dtype = _DTYPES.get(word, word)
        wanted = math.prod(shape) * dtype.itemsize if isinstance(dtype, torch.dtype) else end - begin
        if min((begin, *shape)) < 0 or end - begin != wanted or start + end > size:
            raise ValueError(f"{path}: {name}: {entries[name]} does not fit a file of {size} bytes")
        found[name] = Stored(dtype, shape, path, start + begin)
    return found
