"""The Metal extension: finding it, loading it, and what state it is in."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .system import System
from .tuned import Layer, Table
from .version import __version__

INTERFACE = f"torch_fused_lora interface 5 version {__version__}"  # tfl_interface() in csrc/mps/interface.mm
DTYPES = ("float32", "float16", "bfloat16")  # in the order of Scalar in csrc/plan/launch.h
INSTALL = "pip install -e . in the source folder (Command Line Tools are enough)"


@dataclasses.dataclass
class Extension:
    """`library` is None until the extension is loaded; `reason` then says why it is not. `overrides`: of its launch
    configurations, as the environment variable TORCH_FUSED_LORA_PLAN had them when it was loaded; `tuned`: the table
    that is in force where there are none."""

    library: ctypes.CDLL | None = None
    reason: str = "this machine has no MPS"
    overrides: str = ""
    tuned: Table | None = None

    def load(self, path: Path | None = None) -> None:
        """Load the extension for the "mps" device that torch has; whether it did, `library` and `reason` tell.

        ``path``, or the environment variable TORCH_FUSED_LORA_MPS, overrides where it is looked for: beside this file.
        Raises ValueError for overrides that cannot be.
        """
        if self.library is not None or not torch.backends.mps.is_available():
            return
        obstacle = System.here().without_metal()
        if obstacle is not None:
            self.reason = obstacle
            return
        path = path or Path(os.environ.get("TORCH_FUSED_LORA_MPS", Path(__file__).parent / "_mps.so"))
        if not path.exists():
            self.reason = f"it is not built ({path.name} is missing): on the Mac, {INSTALL}"
            return
        try:
            found = interface_of(path.read_bytes())
            if found != INTERFACE:
                self.reason = f"{path.name} is {found}, wanted {INTERFACE}: build it anew, on the Mac {INSTALL}"
                return
            torch.ops.load_library(str(path))
            library = ctypes.CDLL(str(path))
            library.tfl_interface.restype = ctypes.c_char_p
            library.tfl_configure.argtypes = (ctypes.c_uint32, ctypes.c_char_p, ctypes.c_char_p)
            library.tfl_configure.restype = ctypes.c_char_p
            library.tfl_candidates.restype = library.tfl_tune.restype = ctypes.c_char_p
            library.tfl_compile_seconds.restype = ctypes.c_double
            library.tfl_compiled_kernels.restype = library.tfl_contiguous_copies.restype = ctypes.c_uint64
            if library.tfl_interface() != INTERFACE.encode():
                self.reason = f"{path.name} says another interface once loaded than in its file"
                return
            cores = core_count()
            versions = f"torch {torch.__version__}, macOS {platform.mac_ver()[0]}, {torch.backends.mps.get_name()}"
            self.overrides = os.environ.get("TORCH_FUSED_LORA_PLAN", "")
            refused = library.tfl_configure(cores, versions.encode(), self.overrides.encode())
        except Exception as error:  # whatever it is, importing the package goes on
            self.reason = f"torch {torch.__version__} could not load it: {error}"
            return
        if refused:
            raise ValueError(refused.decode())
        self.library = library
        self.reason = "loaded" if cores else "loaded; the GPU tells no core count, launches are planned for 8"
        if not self.overrides:
            self.tuned = Table.load(torch.backends.mps.get_name(), cores, self.tune)

    def describe(self, operator: str, shape: Sequence[int], dtype: int, adapter_dtype: int, gpu_cores: int) -> str:
        """How an operator is launched, in JSON: see tfl_describe. Raises RuntimeError where there is no extension."""
        if self.library is None:
            raise RuntimeError(f"the launch plan is part of the Metal extension, which is missing: {self.reason}")
        self.library.tfl_describe.restype = ctypes.c_char_p
        numbers = (ctypes.c_uint64 * len(shape))(*shape)
        scalars = ctypes.c_int32(dtype), ctypes.c_int32(adapter_dtype), ctypes.c_uint32(gpu_cores)
        return self.library.tfl_describe(operator.encode(), numbers, *scalars).decode()

    def tune(self, layer: Layer, overrides: str) -> str | None:
        """Launch a layer so from now on, as chosen for an empty text; or what is wrong with it. See tfl_tune."""
        if layer.dtype not in DTYPES or layer.adapter_dtype not in DTYPES:
            return f"expected dtypes of {', '.join(DTYPES)}"
        shape, scalars = (ctypes.c_uint64 * 4)(*layer[1:5]), map(DTYPES.index, layer[5:])
        refused = self.library.tfl_tune(layer.backward, shape, *scalars, overrides.encode())  # type: ignore[union-attr]
        return refused.decode() if refused else None

    def candidates(self) -> dict[str, dict[str, list[int]]]:
        """Of each kernel's fields, the numbers that `tune` takes."""
        return json.loads(self.library.tfl_candidates())  # type: ignore[union-attr]

    @property
    def compiled_kernels(self) -> int:
        """Kernels compiled in this process so far."""
        return self.library.tfl_compiled_kernels() if self.library is not None else 0

    @property
    def compile_seconds(self) -> float:
        """How long compiling them took."""
        return self.library.tfl_compile_seconds() if self.library is not None else 0.0

    @property
    def contiguous_copies(self) -> int:
        """Operands that had to be copied because no kernel could read their layout."""
        return self.library.tfl_contiguous_copies() if self.library is not None else 0


def interface_of(binary: bytes) -> str:
    """The interface that an extension's file names. Read before loading: loading alone registers its operators."""
    marker = re.search(rb"torch_fused_lora interface \d+ version [^\0]+(?=\0)", binary)
    return marker[0].decode(errors="replace") if marker else "no extension of this package, or one too old to say"


def core_count() -> int:
    """The GPU's cores; 0 where torch cannot tell, as a virtual GPU may not."""
    try:
        return max(0, torch.backends.mps.get_core_count())
    except Exception:
        return 0


extension = Extension()
