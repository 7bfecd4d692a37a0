"""Faults planted in the kernels: do wrong numbers, buffers' guards or compute-sanitizer find each of them?"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.emulator.metal_on_cpu import ExecutionError
from tests.emulator.metal_on_gpu import library
from tests.kernels.launch_plan import Kernels, Launch
from tests.kernels.row_plan import RowKernels
from tests.mutation import BARRIER, DELTA, GRAD, NORM, ROWS, Edit

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
KERNEL = re.compile(r"\b(?:fault_(\d)_)?((?:lora|rms_norm|softmax|sum_splits)_?\w*)")


@dataclasses.dataclass
class Planted(Kernels, RowKernels):
    """Kernels with a fault in them; `run` gets each one's source, its name there, and the dispatch."""

    fault: int | None = None
    run: Callable[[str, str, Launch, list[Tensor | bytes | None]], None] = lambda *_: None

    def _dispatch(self, launch: Launch, tensors: Sequence[Tensor | bytes | None]) -> None:
        source, name = launch.source.decode(), launch.kernel.decode()
        if self.fault is not None and (edited := FAULTS[self.fault][1].apply(source)) != source:
            name = f"fault_{self.fault}_{name}"
            source = edited.replace(f'host_name("{launch.kernel.decode()}")', f'host_name("{name}")')
        words = [launch.words[i].to_bytes(8, "little") for i in range(launch.word_count)]
        self.run(source, name, launch, [*tensors, *words])


def try_lora(kernels: Planted, M: int = 70, N: int = 131) -> None:
    from tests.kernels import test_metal_kernels as lora  # not before kernel_tests.py has set what they run with

    operands = lora.layer(M, 150, N, 16)
    lora.check_all(lora.run_all(kernels, operands), operands)


def try_rows(kernels: Planted, H: int = 700) -> None:
    from tests.kernels import test_row_kernels as rows

    x, grad, weight = torch.randn(37, H), torch.randn(37, H), torch.randn(H)
    rows.check_rms_norm(kernels, x, weight, grad)
    rows.check_softmax(kernels, x, grad)


def try_one_row(kernels: Planted) -> None:
    try_lora(kernels, M=1, N=71)


WIDE_STORE = "count >= uint(RUN)"
FAULTS: list[tuple[str, Edit, Callable[[Planted], None]]] = [
    ("no barrier after a tile is filled", Edit(DELTA, BARRIER, "", 1), try_lora),
    ("a store past the last column", Edit("operands.h", WIDE_STORE, "count >= uint(RUN - 1)", 1), try_one_row),
    ("no check of the last rows", Edit(DELTA, "thread_index < RUNS && m < M", "thread_index < RUNS"), try_lora),
    ("no barrier in a row's sum", Edit(ROWS, BARRIER, ""), try_rows),
    ("one buffer for two sums", Edit(NORM, "turn ^= 1", "turn = 0"), try_rows),
    ("no barrier of a simdgroup", Edit(GRAD, "simdgroup_barrier(mem_flags::mem_threadgroup);", ""), try_lora),
]
CLEAN = [try_lora, try_one_row, try_rows, lambda kernels: try_rows(kernels, H=4100)]


def sources() -> set[str]:
    """Of all kernels that are launched here, faults in them and not. What they give is not looked at."""
    found: set[str] = set()
    for fault, attempt in attempts():
        trial(attempt, Planted(gpu_cores=1, fault=fault, run=lambda source, *_: found.add(source)))
    return found


def attempts() -> list[tuple[int | None, Callable[[Planted], None]]]:
    return [(None, attempt) for attempt in CLEAN] + [(i, attempt) for i, (_, _, attempt) in enumerate(FAULTS)]


def trial(attempt: Callable[[Planted], None], kernels: Planted) -> str:
    """What was wrong, in a few words."""
    torch.manual_seed(0)
    try:
        attempt(kernels)
    except ExecutionError as error:
        return str(error).partition(": ")[2].partition(" (")[0]
    except AssertionError as error:
        return f"wrong numbers ({str(error).partition(';')[0]})"
    return ""


def run_all(modules: library.Modules, guard: int | None = None) -> dict[str, str]:
    """On the GPU: each attempt, and what numbers and guards say."""
    found = {}
    for i, (fault, attempt) in enumerate(attempts()):

        def run(source, name, launch, arguments) -> None:
            modules.kernel(source, name).dispatch(
                threads=launch.threads, group=launch.group, arguments=arguments, guard=guard
            )

        name = f"clean {i}" if fault is None else FAULTS[fault][0]
        found[name] = trial(attempt, Planted(gpu_cores=1, fault=fault, run=run))
    return found


def sanitize(command: Sequence[str], logs: Path) -> dict[str, dict[str, object]]:
    """By tool: what it found, by fault, and the kernels without a fault of which it reports something."""
    if not shutil.which(SANITIZER):
        return {"not run": {"why": f"no {SANITIZER} on this machine"}}
    found = {}
    for tool in TOOLS:
        log = logs / f"{tool}.log"
        options = ["--tool", tool, "--log-file", str(log), "--destroy-on-device-error", "kernel"]
        done = subprocess.run([SANITIZER, *options, sys.executable, *command], capture_output=True, text=True)
        text = log.read_text() if log.exists() else done.stderr
        kernels = KERNEL.findall(text)
        found[tool] = {
            "faults": sorted({FAULTS[int(fault)][0] for fault, _ in kernels if fault}),
            "clean kernels": sorted({name for fault, name in kernels if not fault}),
            "summary": (re.findall(r"(?:ERROR|RACECHECK) SUMMARY.*", text) or [done.stdout[-300:]])[-1],
        }
    return found
