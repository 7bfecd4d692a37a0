"""Stock PEFT against patched, over every language model of Transformers that a shrunk configuration builds.

    python -m tests.models.sweep                     # writes docs/architectures.md
    python -m tests.models.sweep LlamaForCausalLM    # these classes, to the screen

Random weights, no hub. LoRA goes on all linear layers of a model, which then is run forward and back with stock layers
and with patched ones; how far apart these may be is derived (`rounding`). Exits with 1 if a model differs, or if a call
of a patched layer is not fused.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import resource
import textwrap
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers.models.auto import modeling_auto

import torch_fused_lora as tfl
from tests.models.sweep.architectures import build, in_float64, step
from tests.models.sweep.rounding import Differences, differences, layers_of
from torch_fused_lora.originals import Patched

TABLE = Path(__file__).parents[3] / "docs" / "architectures.md"
MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
SECONDS, BYTES = 150, 10 << 30  # what a model may take


@dataclasses.dataclass
class Row:
    """What came of a model."""

    name: str
    tasks: str
    why_not: str = ""  # it was not built or run
    parameters: int = 0
    layers: int = 0
    left: int = 0  # of them, not patched
    calls: int = 0
    fused: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)  # of calls that were declined
    error: str = ""  # the patched model's
    float32: Differences | None = None
    float64: Differences | None = None
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        if self.why_not or self.error:
            return [self.error] if self.error else []
        both = [found for found in (self.float32, self.float64) if found]
        checks = {
            f"{self.left} layers not patched": self.left,
            "no LoRA layer was called": not self.calls,
            f"{self.calls - self.fused} calls not fused": self.fused < self.calls,
            "the loss differs": any(not found.loss <= 1 for found in both),
            "a gradient differs": any(not found.gradients <= 1 for found in both),
            "too ill-conditioned to tell": all(not found.seen < 1 for found in both),
        }
        return [what for what, wrong in checks.items() if wrong]


def compare(row: Row) -> Row:
    """Fill in a row."""
    try:
        model, batch, row.parameters = build(row.name)
    except Exception as error:  # of as many kinds as there are models
        row.why_not = " ".join(str(error).split())
        return row
    row.float32 = differences(model, batch)
    report = tfl.patch_peft(model)
    row.calls, row.fused, row.reasons = fused_calls(report)
    row.layers, row.left = len(layers_of(model)), sum(not isinstance(layer, Patched) for layer in layers_of(model))
    tfl.unpatch_peft(model)
    with contextlib.suppress(RuntimeError):  # some models mix dtypes then
        if math.isfinite(step(in_float64(model), batch)["loss"]):
            row.float64 = differences(model, batch)
    return row


def fused_calls(report: tfl.PatchReport) -> tuple[int, int, list[str]]:
    """Calls of the patched layers, how many of them were fused, and why the others were not."""
    calls = report.calls().values()
    fused = sum(call.fused for call in calls)
    reasons = {*report.declined.values(), *(call.reason for call in calls if call.reason)}
    return fused + sum(call.declined for call in calls), fused, sorted(reasons)


def models() -> list[Row]:
    """An empty row for each model class, with the tasks for which it is listed."""
    tasks: dict[str, list[str]] = {}
    for task, mapping in MAPPINGS.items():
        for name in mapping.values():
            if task not in tasks.setdefault(name, []):
                tasks[name].append(task)
    return [Row(name, ", ".join(tasks[name])) for name in sorted(tasks, key=str.lower)]


def sweep(rows: list[Row], jobs: int) -> Iterator[Row]:
    """The rows, filled in, as they come: each in a process of its own, which may take so much time and memory."""
    waiting, running = rows[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            row = waiting.pop()
            ours, theirs = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(target=in_process, args=(row, theirs))
            process.start()
            theirs.close()
            running[ours] = row, process, time.monotonic()
        for pipe in wait(list(running), timeout=1):
            row, process, start = running.pop(pipe)
            try:
                row = pipe.recv()
            except EOFError:
                row.error = "the process ended"
            process.join()
            row.seconds = time.monotonic() - start
            yield row
        for pipe, (row, process, start) in list(running.items()):
            if time.monotonic() - start > SECONDS:
                process.kill()
                row.why_not = f"longer than {SECONDS} s"
                del running[pipe]
                yield row


def in_process(row: Row, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        pipe.send(compare(row))
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}"
        pipe.send(row)


def table(rows: list[Row], command: str, seconds: float) -> str:
    ran = [row for row in rows if not row.why_not]
    calls, fused = sum(row.calls for row in ran), sum(row.fused for row in ran)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Transformers' language models, stock and patched",
        "",
        f"`{command}`: {versions}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{seconds / 60:.0f} minutes.",
        "",
        f"Of {len(rows)} model classes {len(ran)} could be built and trained from a shrunk configuration with random "
        f"weights. {fused:,} of {calls:,} calls of the LoRA layers over their linear layers were fused; those over",
        "parameters, such as experts', are PEFT's.",
        "",
        "Loss and gradients: how far the patched model is from stock PEFT, in units of how far it is if every LoRA",
        "layer is off by as much as rounding allows; of the gradients, the worst parameter's. Up to 1 is within",
        "rounding. Seen: the smallest relative error of the gradient that shows. Some models cannot do float64.",
        "",
        "| model | tasks | parameters | LoRA layers | fused calls | float32: loss | gradients | seen "
        "| float64: loss | gradients | seen | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in ran:
        cells = [row.name, row.tasks, f"{row.parameters:,}", row.layers, f"{row.fused} of {row.calls}"]
        for found in (row.float32, row.float64):
            numbers = (found.loss, found.gradients, found.seen) if found else ()
            cells += [f"{number:.1g}" for number in numbers] or [""] * 3
        cells.append("; ".join([*row.problems, *(f"PEFT: {reason}" for reason in row.reasons)]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "## Not built or trained here, with stock PEFT", "", "| model | tasks | why |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.tasks} | {textwrap.shorten(row.why_not, 140)} |" for row in rows if row.why_not]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of model classes (default: all, into docs/architectures.md)")
    parser.add_argument("-n", dest="jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()

    start = time.monotonic()
    rows = [row for row in models() if not options.models or row.name in options.models]
    rows = list(track(sweep(rows, options.jobs), "models", len(rows), console=Console(stderr=True)))
    rows.sort(key=lambda row: row.name.lower())
    text = table(rows, "python -m tests.models.sweep", time.monotonic() - start)
    if options.models:
        print(text)
    else:
        TABLE.write_text(text)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    wrong = [f"{row.name}: {'; '.join(row.problems)}" for row in rows if row.problems]
    print(*wrong, f"{len(rows)} models, {sum(not row.why_not for row in rows)} ran, {len(wrong)} wrong", sep="\n")
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
