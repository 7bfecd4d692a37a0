"""Pytest plugin: device "mps", on Linux that of the bench. It comes first, and PEFT then picks the device by itself."""

from __future__ import annotations

import torch

if not torch.backends.mps.is_built():  # a Mac has its own
    from mps_on_linux import run

    run.install()
