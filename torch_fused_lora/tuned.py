"""What `tune` found fastest on this machine: one small file in the user's cache, which is read once.

An entry overrides what is chosen for a layer of `lora_linear` in one direction, in the words of TORCH_FUSED_LORA_PLAN.
Whoever launches says of each entry whether it is among its candidates; no other is ever used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .version import __version__


class Layer(NamedTuple):
    """A layer in one direction, without dropout. Layers with the same power of two at or above M share an entry."""

    backward: bool
    M: int
    K: int
    N: int
    r: int
    dtype: str
    adapter_dtype: str

    def __str__(self) -> str:
        dtypes = self.dtype if self.dtype == self.adapter_dtype else f"{self.dtype} + {self.adapter_dtype}"
        return f"{self.M} x {self.K} x {self.N}, r {self.r}, {dtypes}, {'backward' if self.backward else 'forward'}"

    @property
    def bucket(self) -> Layer:
        return self._replace(M=bucket(self.M))


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


Accept = Callable[[Layer, str], "str | None"]  # puts an entry in force, or says what is wrong with it


@dataclasses.dataclass
class Table:
    """Of one machine: its entries in force, and in which words doctor tells of them."""

    path: Path
    machine: dict[str, Any]
    entries: dict[Layer, str]
    trouble: str = ""

    @classmethod
    def load(cls, device: str, cores: int, accept: Accept) -> Table:
        """The file of a machine, if there is one; entries that are not accepted, or all of a file that is not this
        machine's, are left out with one warning."""
        machine = {"device": device, "cores": cores, "torch": str(torch.__version__), "package": __version__}
        name = re.sub(r"[^\w.+-]+", "_", "-".join(map(str, machine.values())))
        table = cls(cache_folder() / "torch_fused_lora" / f"{name}.json", machine, {})
        try:
            text = table.path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return table
        except (OSError, ValueError) as error:
            table._complain(str(error))
            return table
        refused = []
        try:
            document = json.loads(text)
            if document["machine"] != machine:
                raise ValueError(f"it was tuned on {document['machine']}, and this is {machine}")
            taken = [table._take(entry, accept) for entry in document["entries"]]
            refused += [wrong for wrong in taken if wrong]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            refused.append(f"{type(error).__name__}: {error}")
        if refused:
            table._complain(refused[0] + (f", and {len(refused) - 1} more" if len(refused) > 1 else ""))
        return table

    def _take(self, entry: Any, accept: Accept) -> str | None:
        """Put an entry of the file in force, or say what is wrong with it."""
        if not isinstance(entry, list) or len(entry) != len(Layer._fields) + 1:
            return f"{entry} is no entry"
        layer, overrides = Layer(*entry[:-1]), entry[-1]
        fits = type(layer.backward) is bool and all(type(n) is int and 0 < n < 1 << 63 for n in layer[1:5])
        fits = fits and all(isinstance(text, str) and text.isprintable() and text for text in entry[5:])
        if not fits or layer != layer.bucket:
            return f"{entry} is no entry"
        if wrong := accept(layer, overrides):
            return f"{layer}: {wrong}"
        self.entries[layer] = overrides
        return None

    def save(self) -> None:
        """Write all entries, replacing the file at once. Raises OSError where that is not allowed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": self.machine,
            "entries": [[*layer, text] for layer, text in sorted(self.entries.items())],
        }
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(document, file, indent=1)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise

    def __str__(self) -> str:
        if not self.entries:
            return self.trouble or "none, the defaults: `tune` measures what is faster here"
        count = f"{len(self.entries)} layers as {self.path} says"
        return f"{count}; not all of it: {self.trouble}" if self.trouble else count

    def _complain(self, trouble: str) -> None:
        self.trouble = f"{self.path} is not used where it is wrong ({trouble}): `tune` writes it anew"
        warnings.warn(f"torch_fused_lora: {self.trouble}", stacklevel=2)


def cache_folder() -> Path:
    """The user's, as XDG_CACHE_HOME, if it is absolute, or the system has it."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if asked.is_absolute():
        return asked
    try:
        home = Path.home()
    except RuntimeError:  # a container's user without one
        return Path(os.devnull)  # in which nothing is found, and nothing can be kept
    return home / ("Library/Caches" if platform.system() == "Darwin" else ".cache")


def numbers_of(overrides: str) -> dict[str, int]:
    """{"product.rows": 64}, of "product.rows=64". Raises ValueError."""
    found = {}
    for entry in overrides.split(","):
        name, _, number = entry.partition("=")
        if not re.fullmatch(r"\w+\.\w+", name) or not re.fullmatch(r"[0-9]{1,9}", number):
            raise ValueError(f"{entry}: expected kernel.field=number")
        found[name] = int(number)
    return found


def text_of(numbers: dict[str, int]) -> str:
    return ",".join(f"{name}={number}" for name, number in sorted(numbers.items()))
