"""Triton kernels, launched without the search for the compiled one that ``kernel[grid](...)`` makes on every call."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from triton import JITFunction, knobs
from triton.runtime import driver


def _hooked() -> bool:
    """Whether a profiler of Triton's wants to hear of launches: hooks are chains of calls."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


class Launcher:
    """A Triton kernel, which is compiled once for a key of what Triton specialises its code for, and for a device."""

    def __init__(self, kernel: Any, **options: Any):
        self._kernel, self._options = kernel, options
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, device: torch.device, grid: tuple[int, int, int], key: Hashable, *arguments: Any) -> None:
        """Launch on a device's current stream. ``key`` says all that decides the machine code: dtypes, alignments, and
        every integer, unless the kernel does not specialise it."""
        if not isinstance(self._kernel, JITFunction):  # interpreted
            self._kernel[grid](*arguments, **self._options)
            return
        index = driver.active.get_current_device()
        if index != device.index:
            with torch.cuda.device(device):
                self(device, grid, key, *arguments)
            return
        compiled = self._compiled.get((index, key))
        if compiled is None or _hooked():
            self._compiled[index, key] = self._kernel[grid](*arguments, **self._options)
            return
        stream = driver.active.get_current_stream(index)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
