"""Faults planted in the kernels: do wrong numbers, buffers' guards or compute-sanitizer find each of them?"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.emulator.metal_on_cpu import ExecutionError
from tests.emulator.metal_on_gpu.library import Dispatches, Modules
from tests.kernels.launch_plan import Launch
from tests.mutation import BARRIER, DELTA, GRAD, NORM, ROWS, Edit

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
Attempt = Callable[[Dispatches], None]
KERNEL = re.compile(r"\b(?:fault_(\d)_)?((?:lora|rms_norm|softmax|sum_splits)_?\w*)")


def try_lora(kernels: Dispatches, M: int = 70, N: int = 131) -> None:
    from tests.kernels import test_metal_kernels as lora  # not before kernel_tests.py has set what they run with

    operands = lora.layer(M, 150, N, 16)
    lora.check_all(lora.run_all(kernels, operands), operands)


def try_rows(kernels: Dispatches, H: int = 700) -> None:
    from tests.kernels import test_row_kernels as rows

    x, grad, weight = torch.randn(37, H), torch.randn(37, H), torch.randn(H)
    rows.check_rms_norm(kernels, x, weight, grad)
    rows.check_softmax(kernels, x, grad)


FAULTS: list[tuple[str, Edit, Attempt]] = [
    ("no barrier after a tile is filled", Edit(DELTA, BARRIER, "", 1), try_lora),
    ("a store past the last column", Edit("operands.h", "uint(i) < count", "uint(i) <= count", 1), try_lora),
    ("no check of the last rows", Edit(DELTA, " && m + STEP * turn < M", ""), try_lora),
    ("no barrier in a row's sum", Edit(ROWS, BARRIER, ""), try_rows),
    ("one buffer for two sums", Edit(NORM, "turn ^= 1", "turn = 0"), try_rows),
    ("no barrier of a simdgroup", Edit(GRAD, "simdgroup_barrier(mem_flags::mem_threadgroup);", ""), try_lora),
]
CLEAN = [try_lora, lambda kernels: try_lora(kernels, M=1), try_rows, lambda kernels: try_rows(kernels, H=4100)]


def planted(launch: Launch, fault: int | None) -> tuple[str, str]:
    """The launch's source and its kernel's name, another one where the fault is in it."""
    source, name = launch.source.decode(), launch.kernel.decode()
    if fault is None or (edited := FAULTS[fault][1].apply(source)) == source:
        return source, name
    return edited.replace(f'host_name("{name}")', f'host_name("fault_{fault}_{name}")'), f"fault_{fault}_{name}"


def attempts() -> list[tuple[int | None, Attempt]]:
    return [(None, attempt) for attempt in CLEAN] + [(i, attempt) for i, (_, _, attempt) in enumerate(FAULTS)]


def sources() -> set[str]:
    """Of all kernels that are launched here, faults in them and not. What they give is not looked at."""
    found: set[str] = set()
    for fault, attempt in attempts():
        trial(attempt, Dispatches(1, run=lambda launch, _, fault=fault: found.add(planted(launch, fault)[0])))
    return found


def trial(attempt: Attempt, kernels: Dispatches) -> str:
    """What was wrong, in a few words."""
    torch.manual_seed(0)
    try:
        attempt(kernels)
    except ExecutionError as error:
        return str(error).partition(": ")[2].partition(" (")[0]
    except AssertionError as error:
        return f"wrong numbers: {str(error).splitlines()[0].partition(';')[0]}" if str(error) else "wrong numbers"
    return ""


def run_all(modules: Modules, guard: int | None = None) -> dict[str, str]:
    """On the GPU: each attempt, and what numbers and guards say."""
    found = {}
    for i, (fault, attempt) in enumerate(attempts()):

        def run(launch: Launch, arguments: list, fault=fault) -> None:
            kernel = modules.kernel(*planted(launch, fault))
            kernel.dispatch(threads=launch.threads, group=launch.group, arguments=arguments, guard=guard)

        name = f"clean {i}" if fault is None else FAULTS[fault][0]
        found[name] = trial(attempt, Dispatches(1, run=run))
    return found


def sanitize(command: Sequence[str], logs: Path) -> dict[str, dict[str, object]]:
    """By tool: what it found, by fault, and the kernels without a fault of which it reports something."""
    if not shutil.which(SANITIZER):
        return {"not run": {"why": f"no {SANITIZER} on this machine"}}
    found = {}
    for tool in TOOLS:
        log = logs / f"{tool}.log"
        options = ["--tool", tool, "--log-file", str(log), "--destroy-on-device-error", "kernel"]
        options += ["--print-limit", "1000000", "--show-backtrace", "no"]
        done = subprocess.run([SANITIZER, *options, sys.executable, *command], capture_output=True, text=True)
        text = log.read_text() if log.exists() else done.stderr
        kernels = KERNEL.findall(text)
        found[tool] = {
            "faults": sorted({FAULTS[int(fault)][0] for fault, _ in kernels if fault}),
            "clean kernels": sorted({name for fault, name in kernels if not fault}),
            "summary": (re.findall(r"(?:ERROR|RACECHECK) SUMMARY.*", text) or [done.stdout[-300:]])[-1],
        }
    return found
