"""Draws the pages' pictures from docs/benchmarks/: ``python -m docs.pictures``; ``--check`` only sees whether they are
up to date, as each file says by a digest what it was drawn from.

White behind each, so that they read the same on a light page and on a dark one. Text becomes paths and identifiers are
salted: the same data, code and matplotlib give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tests import ROOT

DATA, PICTURES = ROOT / "docs" / "benchmarks", ROOT / "docs" / "pictures"
STOCK, OURS, WORSE, MUTED = "#9a9a9a", "#2166ac", "#c0392b", "#5f5f5f"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
MB = 1e6

matplotlib.rcParams.update(
    {
        "svg.hashsalt": "torch-fused-lora",
        "figure.facecolor": "white",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "legend.frameon": False,
        "figure.constrained_layout.h_pad": 0.12,
    }
)


def path(name: str) -> Path:
    """Of what a picture is drawn from: a file of docs/benchmarks/, or a kernel's header."""
    return ROOT / "metal" / f"{name[:-2]}.h" if name.endswith("_h") else DATA / f"{name}.json"


def load(name: str) -> Any:
    text = path(name).read_text()
    return {k: int(v) for k, v in re.findall(r"(\w+) = (\d+)", text)} if name.endswith("_h") else json.loads(text)


# A function a picture; its parameters are what it is drawn from.


def operators(counted: Any) -> Figure:
    """README's: what a layer's forward moves, operator by operator."""
    found = counted["operators"]
    says = {"addmm": "x Wᵀ + b", "linear": "x Wᵀ + b", "bernoulli_": "draw the mask", "div_": "mask / (1 − p)"}
    says |= {"add": "y + that", "lora_delta, down": "h = dropout(x) Aᵀ", "lora_delta, up": "y += s h Bᵀ"}
    twice = {"_to_copy": ("x to fp32", "y to bf16"), "mul": ("x · mask", "· s"), "mm": ("h = x Aᵀ", "h Bᵀ")}
    in_turn = {name: iter(labels) for name, labels in twice.items()}
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    names = "Stock PEFT", "Patched, on mps"
    counts = f"{len(found['stock'])} operators", "1 operator"
    for axes, who, name, count in zip(panels, ("stock", "ours"), names, counts, strict=True):
        sizes = [size / MB for _, size in found[who]]
        labels = [next(in_turn[name]) if name in in_turn else says[name] for name, _ in found[who]]
        axes.barh(range(len(sizes)), sizes, height=0.72, color=STOCK if who == "stock" else OURS)
        for y, (label, size) in enumerate(zip(labels, sizes, strict=True)):
            axes.text(-6, y, label, ha="right", va="center")
            axes.text(size + 4, y, f"{size:.0f} MB", va="center", fontsize=9, color=MUTED)
        color = MUTED if who == "stock" else OURS
        axes.set_title(f"{name}: {count}, {sum(sizes):.0f} MB", fontweight="bold", color=color)
        axes.set(xlim=(-120, 240), ylim=(len(found["stock"]) - 0.4, -0.6), xticks=(), yticks=())
        axes.spines[:].set_visible(False)
    case = found["case"]
    figure.supxlabel(
        f"A layer's forward in training: {case['M']} tokens, {case['K']} to {case['N']}, rank {case['r']}, bf16 base, "
        "fp32 adapters, dropout.\nBytes read and written, each operand once: counted from the operators' shapes. "
        "No clock was read.",
        fontsize=9,
        color=MUTED,
    )
    return figure


def tax(cpu_layers: Any) -> Figure:
    """LoRA tax by tokens, stock against patched."""
    return _taxes(cpu_layers, "base", f"a CPU: {cpu_layers['environment']['machine']}")


def tax_on_cuda(cuda_layers: Any) -> Figure:
    """The same on a card, over a bfloat16 base."""
    return _taxes(cuda_layers, "adapters", f"{cuda_layers['environment']['device']}, device time")


def _taxes(layers: Any, marked: str, machine: str) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, ("forward", "forward+backward"), strict=True):
        for result in layers["results"]:
            case = result["case"]
            if result["direction"] != direction or case["format"] or case["dropout"]:
                continue
            is_float = case[marked] == "float32"
            tokens = case["M"] * (0.86 if is_float else 1.16) * (0.93 if case["K"] < 4096 else 1.07)
            stock, ours = (result[f"{who}_tax"]["median"] for who in ("peft", "patched"))
            slower = result["patched_over_peft"]["median"] > 1
            marker = "o" if is_float else "s"
            axes.plot([tokens, tokens], [stock, ours], color=WORSE if slower else OURS, linewidth=1.2, zorder=1)
            axes.plot(tokens, stock, marker, color="white", markeredgecolor=MUTED, markersize=6)
            axes.plot(tokens, ours, marker, color=WORSE if slower else OURS, markersize=6)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks((1, 8, 64, 512, 4096), ("1", "8", "64", "512", "4096"))
        axes.minorticks_off()
        axes.set(title=direction.replace("+", " + "), xlabel="tokens")
        axes.set_xlim(0.5, 16000)
    panels[0].set_ylabel("time / the plain linear layer's")
    handles = [
        panels[1].plot([], [], "o", color="white", markeredgecolor=MUTED, label="stock PEFT")[0],
        panels[1].plot([], [], "o", color=OURS, label="patched")[0],
        panels[1].plot([], [], "o", color=WORSE, label="patched, slower than stock")[0],
        panels[1].plot([], [], "o", color="black", markerfacecolor="none", label=f"fp32 {marked}")[0],
        panels[1].plot([], [], "s", color="black", markerfacecolor="none", label=f"bf16 {marked}")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(f"LoRA tax on {machine}. 1.0 is a layer without LoRA", fontsize=10)
    return figure


def kept(counted: Any) -> Figure:
    """What a layer keeps for backward."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for offset, who, name, color in ((-0.2, "peft", "stock PEFT", STOCK), (0.2, "patched", "patched", OURS)):
        places = [i + offset for i in range(len(counted["kept"]))]
        sizes = [found["bytes"][who] / 2**20 for found in counted["kept"]]
        axes.bar_label(axes.bar(places, sizes, width=0.38, color=color, label=name), fmt="%.0f", fontsize=9)
    cases = [found["case"] for found in counted["kept"]]
    axes.set_xticks(
        range(len(cases)),
        [f"{SHORT[c['base']]} + {SHORT[c['adapters']]}\n{'dropout' if c['dropout'] else 'no dropout'}" for c in cases],
    )
    axes.set(ylabel="MiB", ylim=(0, 150))
    axes.set_title("Kept for backward: 4096 tokens, 4096 to 4096, rank 16, base + adapters. Counted", loc="left")
    axes.legend(loc="upper right", ncols=2)
    return figure


def step(cpu_model: Any, cuda_model: Any, cuda_nf4_model: Any) -> Figure:
    """Whole training steps, patched over stock."""
    bars = []
    for document, where in ((cpu_model, "CPU"), (cuda_model, "H200"), (cuda_nf4_model, "H200, NF4 base")):
        for result in document["results"]:
            case, ours = result["case"], result["compared"]["wall_ms"]["over_stock"]
            dropout = ", dropout" if case["dropout"] else ""
            label = f"{where}: {case['lines']} x {case['tokens']}, {SHORT[case['adapters']]}{dropout}"
            bars.append((label, *((ours.get(who) or {}).get("median") for who in ("patched", "patched+norms"))))
    figure = Figure(figsize=(9, 0.9 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for y, (_, patched, norms) in enumerate(bars):
        color = WORSE if patched > 1 else OURS
        axes.plot([1, patched], [y, y], color=color, linewidth=5, alpha=0.7, solid_capstyle="butt")
        axes.plot(patched, y, "o", color=color)
        if norms:
            axes.plot(norms, y, "D", color="white", markeredgecolor=MUTED, markersize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="time of a training step / stock PEFT's")
    figure.suptitle("A whole training step of a Llama: lines x tokens, dtype of the adapters", fontsize=11)
    handles = [
        axes.plot([], [], "o", color=OURS, label="patched")[0],
        axes.plot([], [], "o", color=WORSE, label="patched, slower than stock")[0],
        axes.plot([], [], "D", color="white", markeredgecolor=MUTED, label="patched, norms too")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def modelled(time_model: Any) -> Figure:
    """Apple's GPUs by the model of time."""
    found = time_model["forward_us"]
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    panels = figure.subplots(2, len(found), sharex=True, sharey="row")
    lines = (
        ("PEFT", "PEFT's sequence", STOCK, ":"),
        ("composition", "torch's products, best case", "#444444", "--"),
        ("ours", "ours", OURS, "-"),
    )
    for column, (gpu, by_rank) in enumerate(found.items()):
        for row, (rank, by_tokens) in enumerate(by_rank.items()):
            axes = panels[row][column]
            for who, label, color, style in lines:
                taxes = [by_who[who] / by_who["linear"] for by_who in by_tokens.values()]
                axes.plot([int(t) for t in by_tokens], taxes, style, color=color, label=label, linewidth=2)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_xticks((1, 8, 64, 512, 8192), ("1", "8", "64", "512", "8192"), fontsize=9)
            axes.minorticks_off()
            axes.set_title(f"{gpu}, rank {rank}", fontsize=10)
    for axes in panels[:, 0]:
        axes.set_ylabel("forward / plain linear")
    for axes in panels[-1]:
        axes.set_xlabel("tokens")
    title = "MODELLED, not measured: nothing was ever timed on an Apple GPU. 4096 to 4096, fp16"
    figure.suptitle(title, fontsize=11, color=WORSE)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def losses(encoder: Any, gemma_4bit: Any) -> Figure:
    """The examples' loss curves."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = "all-MiniLM-L6-v2, topics of dialogue", "Gemma 3 270M, dialogue"
    for axes, document, title in zip(panels, (encoder, gemma_4bit), titles, strict=True):
        first, second = document["losses"].items()
        label = "stock PEFT" if first[0] == "stock" else first[0]
        axes.plot(first[1], color="#e08214", linewidth=4.5, alpha=0.5, label=label)
        axes.plot(second[1], color=OURS, linewidth=1.2, label=second[0])
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        axes.legend()
    panels[0].set_ylabel("training loss")
    return figure


def box(axes: Axes, x: float, y: float, w: float, h: float, label: str = "", color: str = "white") -> None:
    axes.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor="#333333", linewidth=1))
    axes.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=9)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """In inches, which are the coordinates."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


TILE, HELD = "#fdd49e", "#c6dbef"


def delta_tiles(lora_delta_h: Any) -> Figure:
    """lora_delta's two dispatches, at rank 16."""
    figure, axes = canvas(9, 4.1)

    def operand(x: float, y: float, w: float, h: float, name: str, size: str) -> None:
        box(axes, x, y, w, h)
        axes.text(x, y + h + 0.06, f"{name}  {size}", fontsize=9.5, va="bottom")

    axes.text(0.3, 3.82, "1  down: h = x Aᵀ", fontsize=11, fontweight="bold")
    operand(0.3, 1.3, 2.6, 1.9, "x", "M x K")
    box(axes, 0.3, 2.3, 0.65, 0.45, "", HELD)
    box(axes, 0.95, 2.3, 0.65, 0.45, "tile", TILE)
    axes.annotate("", (2.85, 2.52), (1.62, 2.52), arrowprops={"arrowstyle": "->"})
    axes.text(0.33, 1.98, "32 rows x 128 columns a tile, to rank 16", fontsize=8.5)
    text = f"a threadgroup, {lora_delta_h['DELTA_SIMDGROUPS']} simdgroups, has 8, 16\nor 32 rows and a split of K"
    axes.text(0.33, 1.42, text, fontsize=8.5, color=MUTED)
    operand(0.3, 0.35, 2.6, 0.3, "A", "r x K")
    box(axes, 0.95, 0.35, 0.65, 0.3, "tile", TILE)
    operand(3.3, 1.3, 0.5, 1.9, "h", "M x r")
    box(axes, 3.3, 2.3, 0.5, 0.45, "h", HELD)
    axes.text(3.2, 1.0, "float32, one for\neach split of K", fontsize=8.5, color=MUTED, va="top")

    axes.plot([4.5, 4.5], [0.2, 3.9], color="#bbbbbb", linewidth=0.8)
    axes.text(4.8, 3.82, "2  up: y += s h Bᵀ", fontsize=11, fontweight="bold")
    operand(4.8, 1.3, 0.5, 1.9, "h", "M x r")
    box(axes, 4.8, 2.3, 0.5, 0.45, "h", HELD)
    axes.text(4.72, 1.0, "summed over the splits,\nheld in registers", fontsize=8.5, color=MUTED, va="top")
    operand(5.9, 1.3, 2.8, 1.9, "y", "M x N")
    box(axes, 5.9, 2.3, 0.65, 0.45, "", HELD)
    box(axes, 6.55, 2.3, 0.65, 0.45, "tile", TILE)
    axes.annotate("", (8.6, 2.52), (7.22, 2.52), arrowprops={"arrowstyle": "->"})
    axes.text(5.95, 1.98, "32 rows x 128 columns a tile, to rank 16", fontsize=8.5)
    text = "a threadgroup has as many, and a split\nof N; y is read and written once"
    axes.text(5.95, 1.42, text, fontsize=8.5, color=MUTED)
    operand(6.4, 0.35, 2.3, 0.3, "Bᵀ", "r x N")
    box(axes, 6.95, 0.35, 0.55, 0.3, "tile", TILE)
    return figure


def gemm_tiles(lora_gemm_h: Any) -> Figure:
    """lora_gemm over packed words."""
    depth, columns = lora_gemm_h["GEMM_DEPTH"], lora_gemm_h["GEMM_COLUMNS"]
    figure, axes = canvas(9, 4.9)
    axes.text(0.3, 4.55, "lora_gemm: y = x Wᵀ + b + s h Bᵀ, W in 4 bits", fontsize=11, fontweight="bold")

    def operand(x: float, y: float, w: float, h: float, name: str) -> None:
        box(axes, x, y, w, h)
        axes.text(x, y + h + 0.06, name, fontsize=9.5, va="bottom")

    def note(text: str, y: float, color: str = "black") -> None:
        axes.plot([5.55, 6.3], [y, y], color=MUTED, linewidth=0.8)
        axes.text(6.35, y, text, fontsize=8.5, va="center", color=color)

    operand(3.9, 3.75, 2.2, 0.3, "Bᵀ  r x N")
    box(axes, 4.9, 3.75, 0.6, 0.3, "", HELD)
    note("first the rank: s h Bᵀ, and b", 3.9)
    operand(3.9, 2.1, 2.2, 1.25, "Wᵀ  K x N, packed")
    box(axes, 4.9, 2.75, 0.6, 0.2, "", TILE)
    axes.annotate("", (5.2, 2.15), (5.2, 2.73), arrowprops={"arrowstyle": "->"})
    decoded = "decoded on\ntheir way from registers to threadgroup\nmemory; W exists nowhere else"
    note(f"then K, or a split of it: tiles of\n{depth} x {columns}, {decoded}", 2.85)
    operand(3.9, 0.4, 2.2, 1.3, "y  M x N")
    for i, j in itertools.product(range(2), range(2)):
        box(axes, 4.9 + 0.3 * i, 0.85 + 0.25 * (1 - j), 0.3, 0.25, str(2 * j + i), HELD)
    note(f"64 x {columns} a threadgroup, a quarter a\nsimdgroup, summed in float32 registers\nand rounded once", 1.1)
    operand(0.3, 0.4, 0.45, 1.3, "h  M x r")
    box(axes, 0.3, 0.85, 0.45, 0.5, "", HELD)
    operand(1.3, 0.4, 2.2, 1.3, "x  M x K")
    box(axes, 2.0, 0.85, 0.2, 0.5, "", TILE)
    axes.annotate("", (3.4, 1.1), (2.22, 1.1), arrowprops={"arrowstyle": "->"})
    axes.text(1.38, 0.5, f"tiles of 64 x {depth}", fontsize=8.5)
    return figure


FIGURES: tuple[Callable[..., Figure], ...] = (
    *(operators, tax, tax_on_cuda, kept, step, modelled),
    *(losses, delta_tiles, gemm_tiles),
)


def digest(function: Callable[..., Figure]) -> str:
    """Of the function and of what it is drawn from."""
    parts = [Path(__file__).read_bytes(), function.__name__.encode()]
    parts += [path(name).read_bytes() for name in inspect.signature(function).parameters]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="draw nothing; fail where a picture is not up to date")
    options = parser.parse_args()
    stale = 0
    for function in FIGURES:
        file, expected = PICTURES / f"{function.__name__}.svg", digest(function)
        if file.exists() and expected in file.read_text():
            continue
        stale += 1
        print(f"{file.relative_to(ROOT)}: {'not up to date: make numbers' if options.check else 'drawn'}")
        if not options.check:
            figure = function(*(load(name) for name in inspect.signature(function).parameters))
            figure.savefig(file, metadata={"Date": None, "Description": expected})
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
