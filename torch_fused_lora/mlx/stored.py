"""Reading safetensors, a tensor at a time and each once into memory of its own: the library's reader maps whole files,
whose pages count beside the copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
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


def read_object(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises:
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {found!r}")
    return found


def header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        ValueError: the library refuses it: no header, or one that does not fit the file.
    """
    try:
        with safe_open(path, "pt"):  # which checks it all, and reads no tensor
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file: {error}") from error
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(start - 8))
    entries.pop("__metadata__", None)
    return {
        name: Stored(_DTYPES.get(e["dtype"], e["dtype"]), tuple(e["shape"]), path, start + e["data_offsets"][0])
        for name, e in entries.items()
    }
