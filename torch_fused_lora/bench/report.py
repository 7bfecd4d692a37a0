"""Runs the bench and shows it: a table while it runs, then JSON and a plot."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..doctor import device_name, devices, tuned_on
from ..mps import extension
from . import measure
from .measure import HostCost, Result, RowResult

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIRECTIONS = ("forward", "forward+backward")


def bench(device: str | None, shapes: list[str] | None, seconds: float, threads: int | None, out: Path) -> None:
    """Measure every case of the chosen shape sets in both directions, and the host's cost of a call; print the tables,
    write JSON and plot.

    Args:
        device: torch device; None for the accelerator if there is one, else the CPU.
        shapes: of "small", "medium", "large" LoRA layers, "gpu" for those of a card, "packed" and "called" for bases in
            4 bits and those that a patched layer calls, "rows" for RMS norm and softmax; None for gpu and rows on CUDA,
            small, medium and rows elsewhere.
        seconds: for each case and direction.
        threads: CPU threads, None for torch's default.
        out: folder that gets bench.json and bench.png.
    """
    chosen, console = start(device, threads)
    shapes = shapes or (["gpu", "rows"] if chosen.type == "cuda" else ["small", "medium", "rows"])
    by_size = [name for name in shapes if name in ("small", "medium", "large")]
    cases: list[Any] = [
        *measure.cases([shape for name in by_size for shape in getattr(measure, name.upper())]),
        *(case for name in ("gpu", "packed", "called") if name in shapes for case in getattr(measure, name.upper())),
        *measure.row_cases(measure.ROWS if "rows" in shapes else ()),
    ]
    jobs = [(case, direction) for case in cases for direction in DIRECTIONS]
    results, row_results = [], []
    for case, direction in track(jobs, "measuring", console=console):
        if isinstance(case, measure.RowCase):
            row_results.append(measure.run_rows(case, direction, chosen, seconds))
        else:
            results.append(measure.run(case, direction, chosen, seconds))
    environment = environment_of(chosen)
    console.print(one_line(environment))
    costs = [measure.host_cost(chosen, mode) for mode in ("no_grad", "recording")]
    for cost in costs:
        console.print(host_cost_line(cost))
    for direction in DIRECTIONS if results else ():
        rows = [result for result in results if result.direction == direction]
        console.print(_table(direction, rows))
        stock = statistics.geometric_mean([result.peft_tax.median for result in rows])
        patched = statistics.geometric_mean([result.patched_tax.median for result in rows])
        console.print(f"geometric mean of the {direction} tax: stock PEFT {stock:.3f}, patched {patched:.3f}\n")
    if row_results:
        console.print(_row_table(row_results))
    document = {
        "environment": environment,
        "host_cost": [dataclasses.asdict(cost) for cost in costs],
        "results": [dataclasses.asdict(result) for result in results],
        "rows": [dataclasses.asdict(result) for result in row_results],
    }
    write(document, out / "bench.json")
    if results:
        _plot(results, out / "bench.png")
    console.print(f"wrote {out / 'bench.json'}" + (f" and {out / 'bench.png'}" if results else ""))


def start(device: str | None, threads: int | None) -> tuple[torch.device, Console]:
    """The device that is measured, and where the tables go."""
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = torch.device(device) if device else devices()[-1]
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # graphs are captured on the current one
    return chosen, Console(width=max(Console().width, 150))


def write(document: dict[str, Any], path: Path) -> None:
    """As JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1))


def one_line(environment: dict[str, str]) -> str:
    return " ".join(f"{key} {value}," for key, value in environment.items()).rstrip(",")


def _table(direction: str, results: list[Result]) -> Table:
    table = Table(
        title=f"LoRA tax, {direction}: time over the plain linear's, median of the rounds (quartiles)", box=SIMPLE
    )
    table.add_column("tokens x K x N, rank, base + adapters", no_wrap=True)
    kept = "KiB kept: PEFT, patched" if direction != "forward" else ""
    for heading in ("linear ms", "stock PEFT", "patched", "patched / PEFT", kept):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        saved = ", ".join(f"{result.saved_bytes[name] / 1024:.0f}" for name in ("peft", "patched") if kept)
        ratios = [str(r) for r in (result.peft_tax, result.patched_tax, result.patched_over_peft)]
        table.add_row(str(result.case), f"{result.linear_ms:.3f}", *ratios, saved)
    return table


def _row_table(results: list[RowResult]) -> Table:
    table = Table(title="Row operators: time over torch's own, median of the rounds (quartiles)", box=SIMPLE)
    table.add_column("operator, rows x elements", no_wrap=True)
    table.add_column("direction", no_wrap=True)
    for heading in ("torch ms", "ours / torch", "ours / Llama's module"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        over_module = str(result.over_module) if result.over_module else ""
        table.add_row(str(result.case), result.direction, f"{result.torch_ms:.3f}", str(result.over_torch), over_module)
    return table


def host_cost_line(cost: HostCost) -> str:
    """One line of text."""
    return (
        f"host cost, {cost.mode}: lora_linear {cost.lora_linear_us:.1f} us a call, F.linear on the CPU "
        f"{cost.linear_us:.1f} us; ratio {cost.ratio}"
    )


def _plot(results: list[Result], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(11, 1 + 0.3 * len(results) / 2), layout="constrained")
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        rows = [result for result in results if result.direction == direction]
        for offset, (name, color) in enumerate((("peft", "tab:gray"), ("patched", "tab:blue"))):
            taxes = [getattr(result, f"{name}_tax") for result in rows]
            spread = [[t.median - t.low for t in taxes], [t.high - t.median for t in taxes]]
            panel.barh(
                [i + 0.4 * offset for i in range(len(rows))],
                [t.median for t in taxes],
                height=0.38,
                xerr=spread,
                color=color,
                label="stock PEFT" if name == "peft" else "patched",
            )
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_yticks([i + 0.2 for i in range(len(rows))], [str(result.case) for result in rows], fontsize=7)
        panel.set_xlabel("time / plain linear's")
        panel.set_title(direction)
    panels[0].invert_yaxis()
    panels[0].legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def environment_of(device: torch.device) -> dict[str, str]:
    overridden = {"plan overridden": extension.overrides} if extension.overrides else {}
    used = [name for name in ("triton", "bitsandbytes") if name in sys.modules]
    return (
        overridden
        | {name: version(name) for name in used}
        | {
            "device": f"{device} ({device_name(device)})",
            "tuned": tuned_on(device),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
    )
