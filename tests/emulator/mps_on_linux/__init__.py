"""``torch.device("mps")`` on Linux, and the C functions of PyTorch's MPS shim. See README.md."""

from .build import extension
from .device import (
    Counters,
    a_stream_a_thread,
    counters,
    execution,
    install,
    install_with_extension,
    no_leaks,
    reset_counters,
    why_unavailable,
)

__all__ = [
    "Counters",
    "a_stream_a_thread",
    "counters",
    "execution",
    "extension",
    "install",
    "install_with_extension",
    "no_leaks",
    "reset_counters",
    "why_unavailable",
]
