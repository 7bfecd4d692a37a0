"""Pytest plugin: device "mps", on Linux the emulator's. It comes first, and PEFT then picks the device by itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

EMULATOR = Path(__file__).resolve().parents[1] / "emulator" / "__init__.py"

if not torch.backends.mps.is_built():  # a Mac has its own
    # Not as tests.emulator: in this process `tests` is PEFT's.
    spec = importlib.util.spec_from_file_location("emulator", EMULATOR)
    sys.modules["emulator"] = importlib.util.module_from_spec(spec)
    from emulator import mps_on_linux

    mps_on_linux.install_with_extension()
