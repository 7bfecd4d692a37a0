from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from tests.emulator import mps_on_linux

# Shared, noisy machines: no deadline; the same examples on every run, so that a failure is everybody's.
settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
# A search of its own: pytest tests/operators/test_lora_linear.py --hypothesis-profile=long --hypothesis-seed=1
settings.register_profile("long", settings.get_profile("default"), max_examples=5000, derandomize=False)
settings.load_profile("default")


def _install_mps() -> str | None:
    """Give this process device "mps" and the extension, before torch_fused_lora looks for them; or why it has none."""
    if torch.backends.mps.is_built():  # a Mac: the real ones
        return None if torch.backends.mps.is_available() else "this Mac has no MPS"
    if reason := mps_on_linux.why_unavailable():
        return reason
    mps_on_linux.install_with_extension()
    return None


_why_no_mps = _install_mps()


@pytest.fixture
def mps() -> torch.device:
    """Device "mps" with the extension: the emulator's on Linux, the real one on a Mac."""
    if _why_no_mps:
        pytest.skip(_why_no_mps)
    return torch.device("mps")


@pytest.fixture(params=["cpu", "mps"])
def device(request) -> torch.device:
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("mps")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
