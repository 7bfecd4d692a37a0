"""The Metal extension: finding it, loading it, and what state it is in."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
from pathlib import Path

import torch


@dataclasses.dataclass
class Extension:
    """`library` is None until the extension is loaded; `reason` then says why it is not."""

    library: ctypes.CDLL | None = None
    reason: str = "this machine has no MPS"

    def load(self, path: Path | None = None) -> None:
        """Load the extension for the "mps" device that torch has; whether it did, `library` and `reason` tell.

        ``path``, or the environment variable TORCH_FUSED_LORA_MPS, overrides where it is looked for: beside this file.
        """
        if self.library is not None or not torch.backends.mps.is_available():
            return
        path = path or Path(os.environ.get("TORCH_FUSED_LORA_MPS", Path(__file__).parent / "_mps.so"))
        if not path.exists():
            self.reason = f"it is not built ({path.name} is missing): on the Mac, {INSTALL}"
            return
        try:
            torch.ops.load_library(str(path))
            library = ctypes.CDLL(str(path))
        except OSError as error:
            self.reason = f"torch {torch.__version__} could not load it: {error}"
            return
        library.tfl_configure.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
        library.tfl_compiled_kernels.restype = library.tfl_contiguous_copies.restype = ctypes.c_uint64
        versions = f"torch {torch.__version__}, macOS {platform.mac_ver()[0]}, {torch.backends.mps.get_name()}"
        library.tfl_configure(torch.backends.mps.get_core_count(), versions.encode())
        self.library, self.reason = library, "loaded"

    @property
    def compiled_kernels(self) -> int:
        """Kernels compiled in this process so far."""
        return self.library.tfl_compiled_kernels() if self.library is not None else 0

    @property
    def contiguous_copies(self) -> int:
        """Operands that had to be copied because no kernel could read their layout."""
        return self.library.tfl_contiguous_copies() if self.library is not None else 0


INSTALL = "pip install -e . in the source folder (Command Line Tools are enough)"
extension = Extension()
