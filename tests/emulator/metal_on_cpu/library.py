"""Compile Metal source and dispatch its kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from . import abi
from .lint import lint
from .report import ExecutionError, LimitError, Report, read_report
from .rewrite import Argument, Entry, Rewriter
from .token_stream import RewriteError
from .toolchain import ToolError, build_kernels, preprocess

MAX_THREADS = 1024


class CompileError(ValueError):
    """The source was refused; the text names lines of the source."""


@dataclass(frozen=True)
class Source:
    """Rewritten Metal, and the two builds of it."""

    name: str
    text: str
    strict: bool
    entries: Mapping[str, Entry]
    variables: Sequence[tuple[str, int]]

    def build(self, *, trace: bool) -> Path:
        try:
            return build_kernels(self.text, self.name, strict=self.strict, trace=trace)
        except ToolError as error:
            raise CompileError(str(error)) from None

    @cached_property
    def fast(self) -> tuple[Path, ctypes.CDLL]:
        return self.load(trace=False)

    @cached_property
    def traced(self) -> tuple[Path, ctypes.CDLL]:
        return self.load(trace=True)

    def load(self, *, trace: bool) -> tuple[Path, ctypes.CDLL]:
        abi.executor()
        path = self.build(trace=trace)
        return path, ctypes.CDLL(str(path))


class Kernel:
    """A kernel by its host name. ``arguments`` are its buffer parameters by index."""

    def __init__(self, source: Source, name: str, code: ctypes.CDLL) -> None:
        """``code`` is either of the source's builds: both describe a kernel alike."""
        self.source, self.name = source, name
        self.entry = source.entries[name]
        self.arguments: list[Argument] = self.entry.arguments
        describe = getattr(code, f"{self.entry.symbol}_describe")
        parameters = (abi.Parameter * abi.BUFFERS)()
        self.max_total_threads: int = describe(parameters)
        self.parameters = {parameters[i].index: parameters[i] for i in range(len(self.arguments))}

    def __repr__(self) -> str:
        return f"Kernel({self.name!r}, {', '.join(f'{a.space} {a.type} {a.name} [{a.index}]' for a in self.arguments)})"

    def dispatch(
        self,
        *,
        threads: Sequence[int],
        group: Sequence[int],
        arguments: Sequence[torch.Tensor | bytes | None],
        trace: bool = False,
        order: str = "forward",
        most_groups: int = 0,
    ) -> Report:
        """Run the kernel as ``dispatchThreads:threadsPerThreadgroup:`` would, and return its counters and findings.

        Args:
            threads: threads of the whole grid, x y z; groups at its edge are smaller where need be.
            group: threads of a threadgroup, x y z.
            arguments: by buffer index. A CPU tensor is bound from its first element to the end of its storage and
                written in place; bytes are a constant (``setBytes``); None leaves the index unbound.
            trace: run instrumented, with shadow memory: findings are returned, not raised.
            most_groups: run no more threadgroups than so many, the first in order; 0: all.
            order: in which lanes, simdgroups and threadgroups take turns: forward, reverse or permuted.

        Raises:
            LimitError: the dispatch exceeds a limit of Metal.
            ExecutionError: in fast mode, lanes diverged or an access hit a guard page.
            TypeError, ValueError: arguments that do not fit the kernel's parameters.
        """
        grid, size = self.check_extents(threads, group)
        if order not in abi.ORDERS:
            raise ValueError(f"order is one of {', '.join(abi.ORDERS)}, not {order!r}")
        path, library = self.source.traced if trace else self.source.fast
        request = abi.Dispatch(order=abi.ORDERS[order], most_groups=most_groups, trace=trace, threads=grid, group=size)
        request.launch = ctypes.cast(library[self.entry.symbol], ctypes.c_void_p).value
        kept = self.bind(request, arguments)
        raw = abi.RawReport()
        if math.prod(grid):
            abi.executor().executor_dispatch(request, raw)
        else:
            raw.complete = 1
        del kept
        report = read_report(raw, self.name, self.arguments, path, self.source.variables)
        for finding in report.findings:
            if finding.kind == "limit":
                raise LimitError(str(finding))
        if not trace and report.findings:
            raise ExecutionError("\n".join(map(str, report.findings)), report)
        return report

    def check_extents(self, threads: Sequence[int], group: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        grid, size = tuple(map(int, threads)), tuple(map(int, group))
        if len(grid) != 3 or len(size) != 3 or min(grid) < 0 or min(size) < 1 or max(grid) >= 1 << 32:
            raise ValueError(f"threads and group are three extents each, not {grid} and {size}")
        count = math.prod(size)
        if count > MAX_THREADS:
            raise LimitError(f"{self.name}: {count} threads a threadgroup; Metal has {MAX_THREADS}")
        if count > self.max_total_threads:
            raise LimitError(
                f"{self.name}: {count} threads a threadgroup; its max_total_threads_per_threadgroup is "
                f"{self.max_total_threads}"
            )
        return grid, size

    def bind(self, request: abi.Dispatch, arguments: Sequence[torch.Tensor | bytes | None]) -> list[object]:
        """Fill the request's buffers; returns what must live until the dispatch is done."""
        if len(arguments) > abi.BUFFERS:
            raise LimitError(f"{self.name}: {len(arguments)} buffers; Metal has {abi.BUFFERS}")
        kept: list[object] = []
        for index, parameter in self.parameters.items():
            request.buffers[index].space = parameter.space
        for index, value in enumerate(arguments):
            if value is None:
                continue
            parameter, buffer = self.parameters.get(index), request.buffers[index]
            if parameter is None:
                raise ValueError(f"{self.name} has no buffer {index}; it has {sorted(self.parameters)}")
            if isinstance(value, torch.Tensor):
                if value.device.type != "cpu":
                    raise TypeError(f"{self.name}: buffer {index} is a tensor on {value.device}, not on the CPU")
                offset = value.storage_offset() * value.element_size()
                size, granule = value.untyped_storage().nbytes() - offset, value.element_size()
                buffer.data, buffer.binding = value.untyped_storage().data_ptr() + offset, abi.BUFFER
            elif isinstance(value, bytes):
                if parameter.space == abi.DEVICE:
                    raise TypeError(f"{self.name}: buffer {index} is written by the kernel: bind a tensor, not bytes")
                copy = ctypes.create_string_buffer(value, len(value))
                kept.append(copy)
                size, granule = len(value), 1
                buffer.data, buffer.binding = ctypes.addressof(copy), abi.BYTES
                if size < parameter.size:
                    raise ValueError(
                        f"{self.name}: buffer {index} takes {parameter.size} bytes or a multiple, not {size}"
                    )
            else:
                raise TypeError(f"{self.name}: buffer {index} is a tensor, bytes or None, not {type(value).__name__}")
            buffer.size, buffer.granule = size, granule
        return kept


class Library(Mapping[str, Kernel]):
    """The kernels of one source text by host name."""

    def __init__(self, source: Source, *, trace: bool) -> None:
        self.source = source
        code = (source.traced if trace else source.fast)[1]
        self.kernels = {name: Kernel(source, name, code) for name in source.entries}

    def __getitem__(self, name: str) -> Kernel:
        try:
            return self.kernels[name]
        except KeyError:
            raise KeyError(f"no kernel {name!r} in {self.source.name}; it has {', '.join(self.kernels)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.kernels)

    def __len__(self) -> int:
        return len(self.kernels)


@lru_cache(maxsize=64)
def compile(source: str, name: str = "metal", *, strict: bool = False, trace: bool = False) -> Library:
    """Compile Metal 3.1 source to kernels for this CPU.

    ``strict`` also refuses what clang takes and Metal does not, and checks the ``thread`` address space; off, it is for
    Metal that others wrote. ``trace`` builds the instrumented code now and the fast one once it is dispatched, instead
    of the other way about. Raises CompileError with the source's lines.
    """
    if not source.isascii():
        raise CompileError(f"{name}: Metal source is ASCII")
    if strict and (broken := lint(source)):
        raise CompileError("\n".join(f"{name}:{found.line}: {found.rule}: {found.message}" for found in broken))
    try:
        rewritten = Rewriter(preprocess(without_standard_includes(source), name)).run()
    except ToolError as error:
        raise CompileError(str(error)) from None
    except RewriteError as error:
        raise CompileError(f"{name}:{error}") from None
    return Library(Source(name, rewritten.text, strict, rewritten.entries, rewritten.variables), trace=trace)


def without_standard_includes(source: str) -> str:
    """Metal's own headers are the shim, which is there already."""
    lines = source.split("\n")
    return "\n".join("" if line.replace(" ", "").startswith("#include<metal_") else line for line in lines)
