"""What a dispatch found and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import abi
from .lines import line_at
from .rewrite import Argument


@dataclass(frozen=True)
class Finding:
    """One kind of error at one place of a kernel: the first thread that met it."""

    kind: str
    kernel: str
    line: int
    thread: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    message: str

    def __str__(self) -> str:
        where = f"{self.kernel}:{self.line}" if self.line else self.kernel
        return f"{where}: {self.kind}: {self.message} (thread {self.thread}, threadgroup {self.threadgroup})"


@dataclass(frozen=True)
class Counters:
    """Bytes are requests of device memory by buffer index, in trace mode only; a barrier or a matrix multiply counts
    once a threadgroup or simdgroup, not once a thread. Buffers that overlap count under the lowest index."""

    loaded: list[int]
    stored: list[int]
    constant_loaded: int
    barriers: int
    simdgroup_barriers: int
    matrix_multiplies: int
    threadgroups: int
    threadgroup_bytes: int
    threadgroup_accessed: int  # bytes requested, in trace mode
    longest_steps: int  # of the threadgroup that has most, with loads that wait for each other, in trace mode
    longest_multiplies: int  # and of the simdgroup
    longest_collectives: int  # all other simd operations


@dataclass(frozen=True)
class Report:
    counters: Counters
    findings: list[Finding]


class LimitError(ValueError):
    """A dispatch exceeds a limit of Metal."""


class ExecutionError(RuntimeError):
    """A kernel did what ends a dispatch; ``report`` holds the findings."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def read_report(
    raw: abi.RawReport, kernel: str, arguments: Sequence[Argument], path: Path, variables: Sequence[tuple[str, int]]
) -> Report:
    counters = Counters(
        list(raw.loaded),
        list(raw.stored),
        *(int(getattr(raw, name)) for name in list(Counters.__dataclass_fields__)[2:]),
    )
    names = {argument.index: argument.name for argument in arguments}
    findings = [
        Finding(
            abi.KINDS[found.kind] if abi.KINDS[found.kind] != "fault" else "out-of-bounds",
            kernel,
            line_at(path, found.pc),
            tuple(found.thread),
            tuple(found.group),
            describe(found, names, variables),
        )
        for found in raw.findings[: raw.finding_count]
    ]
    return Report(counters, findings)


def describe(found: abi.RawFinding, names: dict[int, str], variables: Sequence[tuple[str, int]]) -> str:
    access = "store" if found.store else "load"
    other = "store" if found.other_store else "load"
    if found.object == abi.BUFFER_OBJECT:
        place = f"buffer {found.index} ({names.get(found.index, '')})"
    elif found.object == abi.THREADGROUP_OBJECT and found.index < len(variables):
        place = f"threadgroup variable {variables[found.index][0]}"
    elif found.object == abi.CONSTANT_OBJECT:
        place = f"constant {found.name.decode().split()[0]}"
    else:
        place = "memory outside of every object"
    at = f"{access} of {found.size} bytes at byte {found.offset} of {place}"
    match abi.KINDS[found.kind]:
        case "race":
            return f"{at}, no barrier after a {other} by thread {found.other_thread} of the threadgroup"
        case "group-race":
            return f"{at}, which threadgroup {found.other_group} {'stored' if found.other_store else 'loaded'} too"
        case "uninitialised":
            return f"{at}, which the threadgroup has not stored before"
        case "out-of-bounds":
            if found.object == abi.NOTHING:
                return "an address far from every buffer, variable and constant"
            if found.object == abi.ARRAY_OBJECT:
                return f"index {found.offset} of {found.name.decode()}"
            if not found.size:  # a guard page: the size of the access is not known
                return f"access at byte {found.offset} of {place}, which has {found.object_size} bytes"
            if 0 <= found.offset <= found.object_size - found.size:
                return f"{at}, which the kernel may not store to"
            return f"{at}, which has {found.object_size} bytes"
        case "divergent-barrier":
            return f"thread {found.other_thread} of the threadgroup does not wait at this barrier"
        case "divergent-simd":
            return f"thread {found.other_thread} of the threadgroup does not take part here with the same arguments"
        case "limit":
            return f"{found.size} bytes of threadgroup memory with {place.split()[-1]}; Metal has 32768"
        case _:
            return "fault: a misaligned vector, a wild pointer or a stack that overflowed"
