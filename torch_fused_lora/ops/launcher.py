"""Triton kernels, launched without what ``kernel[grid](...)`` does anew on every call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
import triton
from triton import JITFunction, knobs
from triton.runtime import driver

PREPARED = 4096  # kinds of calls whose launches are remembered
TESTED = ("3.6",)  # releases of Triton that have run this package's kernels on a GPU
Grid: TypeAlias = tuple[int, int, int]
Launch: TypeAlias = Callable[[int, list[int | None], tuple[int | float, ...]], None]  # of stream, pointers and numbers
Launches: TypeAlias = dict[Any, Any]  # of one kind of call, by launcher; several of one launcher in dicts of their own


class Prepared(dict[tuple[Hashable, ...], Any]):
    """What is prepared for a kind of call. The key says all that it depends on: the `kind` of each tensor that is
    given, and options."""

    def keep(self, key: tuple[Hashable, ...], what: Any) -> Any:
        if len(self) >= PREPARED:
            self.clear()
        self[key] = what
        return what


prepared = Prepared()


def kind(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What of a tensor decides how a kernel reads it, and whether it can."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() & 15, tensor.get_device()


def _hooked() -> bool:
    """Whether a profiler of Triton's wants to hear of launches: hooks are chains of calls."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def is_tested() -> bool:
    return triton.__version__.rpartition(".")[0] in TESTED


@functools.cache
def begins_early(device: int) -> bool:
    """Whether a launch on a card may begin before the one before it is done: from Hopper on."""
    return device >= 0 and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def start_of(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """``run`` and ``given`` so that ``run(*grid, stream, *given, *arguments)`` launches what is compiled."""
    run, given = compiled.run, [compiled.function]
    if is_tested() and run.global_scratch_size == run.profile_scratch_size == 0:  # past the method that allocates it
        given += [run.launch_cooperative_grid, run.launch_pdl, None, None]
        run = run.launch
    return run, (*given, compiled.packed_metadata, None, None, None)


def _bind(compiled: Any, grid: Grid, arguments: tuple[Any, ...], _: tuple[Any, ...]) -> Launch:
    run, given = start_of(compiled)

    def launch(stream: int, pointers: list[int | None], numbers: tuple[int | float, ...]) -> None:
        run(*grid, stream, *given, *pointers, *numbers, *arguments)

    return launch


class Launcher:
    """A Triton kernel, whose launches are prepared once for what decides them; on other makers' GPUs Triton makes each.

    Its first arguments are the tensors, then come numbers that differ from call to call, for which it specialises no
    code. ``prepare(*tensors, *options)`` returns the grid, the other arguments, and how to compile it. Where the kernel
    takes descriptors of tensors, ``describe``, called alike, makes them, and ``bind`` a launch that does.

    ``dependent``: where a launch `begins_early` (CUDA's programmatic dependent launch), which the kernel's last
    argument says, its programs begin once all of the launch before have called `gdc_launch_dependents`, or ended. That
    hides some microseconds. What the launch before writes is there after `gdc_wait`. Programs call it before they read
    such a thing, some of them in any case, so that no launch ends before an older one. And those that wait call
    `gdc_launch_dependents` after it, so that whatever is older than the launch before may be read at once.
    """

    def __init__(
        self,
        kernel: Any,
        prepare: Callable[..., tuple[Grid, tuple[Any, ...], Any]],
        describe: Callable[..., tuple[Any, ...]] | None = None,
        bind: Callable[[Any, Grid, tuple[Any, ...], tuple[Any, ...]], Launch] = _bind,
        dependent: bool = False,
    ):
        self._kernel, self._prepare, self._describe, self._bind = kernel, prepare, describe, bind
        self._dependent = dependent

    def __call__(
        self,
        tensors: tuple[Any, ...],
        numbers: tuple[int | float, ...],
        options: tuple[Hashable, ...],
        launches: Launches,
    ) -> None:
        """Launch on the current stream of the device of the first tensor; others may be None. ``launches``: those that
        are `prepared` for this kind of call."""
        launch = launches.get(self)
        if launch is None and not isinstance(self._kernel, JITFunction):  # interpreted
            self._compile(tensors, numbers, options)
            return
        index, active = tensors[0].get_device(), driver.active
        if active.get_current_device() != index:
            with torch.get_device_module(tensors[0].device).device(index):
                self(tensors, numbers, options, launches)
        elif launch is None or _hooked():
            compiled = self._compile(tensors, numbers, options)
            if active.get_current_target().backend == "cuda":  # only NVIDIA's launches are known
                launches[self] = self._bind(*compiled)
        else:  # a pointer, since of a tensor Triton would ask the driver
            pointers = [None if t is None else t.data_ptr() for t in tensors]
            launch(active.get_current_stream(index), pointers, numbers)

    def prepare(
        self, tensors: tuple[Any, ...], options: tuple[Hashable, ...]
    ) -> tuple[Grid, tuple[Any, ...], dict[str, Any]]:
        """The grid, the arguments after the numbers, and how to compile it."""
        grid, arguments, how = self._prepare(*tensors, *options)
        if self._dependent:
            early = begins_early(tensors[0].get_device())
            arguments, how = (*arguments, early), how | ({"launch_pdl": True} if early else {})
        return grid, arguments, how

    def _compile(
        self, tensors: tuple[Any, ...], numbers: tuple[int | float, ...], options: tuple[Hashable, ...]
    ) -> tuple[Any, Grid, tuple[Any, ...], tuple[Any, ...]]:
        """And launch. What was compiled, the grid, the other arguments, and what stands for the tensors."""
        grid, arguments, how = self.prepare(tensors, options)
        given = tensors if self._describe is None else self._describe(*tensors, *options)
        return self._kernel[grid](*given, *numbers, *arguments, **how), grid, arguments, given
