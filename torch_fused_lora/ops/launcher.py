"""Triton kernels, launched without what ``kernel[grid](...)`` does anew on every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from triton import JITFunction, knobs
from triton.runtime import driver

PREPARED = 4096  # launches that are remembered of a kernel


def _hooked() -> bool:
    """Whether a profiler of Triton's wants to hear of launches: hooks are chains of calls."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


class Launcher:
    """A Triton kernel, whose launches are prepared once for what decides them.

    Its first arguments are the tensors, then come numbers that differ from call to call, for which it specialises no
    code. ``prepare(*tensors, *options)`` returns the grid, the other arguments, and how to compile it.
    """

    def __init__(self, kernel: Any, prepare: Callable[..., tuple[tuple[int, int, int], tuple[Any, ...], Any]]):
        self._kernel, self._prepare = kernel, prepare
        self._prepared: dict[Any, Any] = {}

    def __call__(
        self,
        tensors: tuple[Any, ...],
        numbers: tuple[int | float, ...],
        options: tuple[Hashable, ...],
        key: tuple[Hashable, ...],
    ) -> None:
        """Launch on the current stream of the device of the first tensor; others may be None. ``key`` says, beside the
        options, all that `prepare` and the machine code depend on, but for which tensors are None, and alignments."""
        if not isinstance(self._kernel, JITFunction):  # interpreted
            grid, arguments, how = self._prepare(*tensors, *options)
            self._kernel[grid](*tensors, *numbers, *arguments, **how)
            return
        index, active = tensors[0].get_device(), driver.active
        if active.get_current_device() != index:
            with torch.cuda.device(index):
                self(tensors, numbers, options, key)
            return
        pointers = [None if t is None else t.data_ptr() for t in tensors]  # of a tensor Triton would ask the driver
        full_key = index, options, key, *[None if p is None else p & 15 for p in pointers]
        prepared = self._prepared.get(full_key)
        if prepared is None or _hooked():
            grid, arguments, how = self._prepare(*tensors, *options)
            compiled = self._kernel[grid](*tensors, *numbers, *arguments, **how)
            if len(self._prepared) >= PREPARED:
                self._prepared.clear()
            self._prepared[full_key] = compiled, grid, arguments
            return
        compiled, grid, arguments = prepared
        compiled.run(
            *grid, active.get_current_stream(index), compiled.function, compiled.packed_metadata, None, None, None,
            *pointers, *numbers, *arguments,
        )  # fmt: skip
