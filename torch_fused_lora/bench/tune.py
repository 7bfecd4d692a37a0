"""Measures launch configurations of LoRA layers on this machine, and keeps those that win.

For a layer in one direction the fields are taken one after the other: all of a field's candidates beside the best so
far, interleaved as `measure` does. What is best in the end is timed once more, beside the default and torch's own
products. It is kept if it beats the default by more than `MARGIN` in the median of the rounds, and in the upper
quartile at all; so is torch's way, if that is the fastest.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Table as Sheet
from torch import Tensor, nn

from ..mps import extension
from ..ops.lora_linear.ways import has_kernels, triton_kernels, tuned_layers
from ..plan import plan
from ..tuned import Layer, Table, text_of
from .measure import Ratio, interleaved, ratio
from .report import start

MARGIN = 0.02
TORCH = {"lora_linear.way": 2}
ROTATED = 256 << 20  # bytes of weights in rotation, so that no cache has the next one

Numbers = dict[str, int]


class _Mps:
    """What the extension launches."""

    def __init__(self, device: torch.device):
        if extension.overrides:
            raise RuntimeError("TORCH_FUSED_LORA_PLAN overrides every configuration: unset it first")
        if extension.tuned is None:
            raise RuntimeError(f"the Metal extension is missing: {extension.reason}")
        self.table: Table = extension.tuned

    def put(self, layer: Layer, text: str) -> None:
        extension.tune(layer, text)

    def fields(self, layer: Layer) -> list[list[Numbers]]:
        """Each with its candidates."""
        return [
            [{f"{kernel}.{field}": number} for number in numbers]
            for kernel, fields in extension.candidates().items()
            for field, numbers in fields.items()
        ]

    def planned(self, layer: Layer, numbers: Numbers) -> str:
        """What would be launched."""
        self.put(layer, text_of(numbers))
        dispatches = plan("lora_linear", layer[1:5], layer.dtype, layer.adapter_dtype)
        direction = "backward" if layer.backward else "forward"
        return str([dispatch for dispatch in dispatches if dispatch.direction == direction])

    def step(self, layer: Layer, step: Callable[[], object], numbers: Numbers) -> Callable[[], object]:
        """So configured."""
        text = text_of(numbers)

        def configured() -> None:
            self.put(layer, text)
            step()

        return configured


class _Cuda:
    """What Triton launches. A step is a graph of its launches, so that the device alone is timed."""

    def __init__(self, device: torch.device):
        self.device = torch.cuda.current_device() if device.index is None else device.index
        if not has_kernels(self.device):
            raise RuntimeError("there is no Triton for NVIDIA, or a card older than Ampere")
        self.layers = tuned_layers(self.device)
        self.table = self.layers.table

    def put(self, layer: Layer, text: str) -> None:
        self.layers.tune(layer, text)

    def fields(self, layer: Layer) -> list[list[Numbers]]:
        return triton_kernels().candidates(layer.backward, layer.M, layer.N, layer.r, self.device)

    def planned(self, layer: Layer, numbers: Numbers) -> str:
        return text_of(numbers)

    def step(self, layer: Layer, step: Callable[[], object], numbers: Numbers) -> Callable[[], object]:
        self.put(layer, text_of(numbers))
        step()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


@dataclasses.dataclass(frozen=True)
class Found:
    """Of a layer: the default's milliseconds, ratios over them, and what is kept, nothing for the default."""

    layer: Layer
    default_ms: float
    best_over_default: Ratio
    torch_over_default: Ratio | None
    kept: str


def tune(
    device: str | None,
    shapes: list[tuple[int, int, int]],
    rank: int,
    dtype: str,
    adapter_dtype: str | None,
    seconds: float,
) -> int:
    """Tune layers of M x K x N, forward and backward; print the table, keep what won. 0, or 1 with the reason.

    Args:
        device: torch device; None for the accelerator, if there is one.
        shapes: of which those that share an entry are measured once.
        rank, dtype, adapter_dtype: of all of them; None for the rows' dtype.
        seconds: for all.
    """
    chosen, console = start(device, None)
    try:
        if chosen.type not in ("mps", "cuda"):
            raise RuntimeError("its calls take one way alone")
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("torch.use_deterministic_algorithms(True) ignores what is tuned")
        target = _Mps(chosen) if chosen.type == "mps" else _Cuda(chosen)
    except RuntimeError as error:
        console.print(f"nothing to tune on {chosen}: {error}")
        return 1
    if chosen.type == "mps" and platform.system() != "Darwin":
        console.print(
            "this mps is an emulated one: its times mean nothing, and what is kept here says nothing of a Mac"
        )
    layers = [
        Layer(backward, *shape, rank, dtype, adapter_dtype or dtype) for shape in shapes for backward in (False, True)
    ]
    layers = list({layer.bucket: layer for layer in layers}.values())
    before = dict(target.table.entries)
    found, deadline = [], time.perf_counter() + seconds
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(layers))
        for done, layer in enumerate(layers):
            progress.update(task, description=str(layer))
            share = (deadline - time.perf_counter()) / (len(layers) - done)
            if share <= 0:
                break
            found.append(_tuned(target, chosen, layer, share))
            progress.advance(task)
    console.print(_sheet(found))
    for left in layers[len(found) :]:
        console.print(f"no time was left for {left}")
    entries = {result.layer.bucket: result.kept for result in found}
    target.table.entries = {layer: text for layer, text in (before | entries).items() if text}
    for layer, text in target.table.entries.items():
        target.put(layer, text)
    try:
        target.table.save()
    except OSError as error:
        console.print(f"not kept, there is no write access: {error}")
        return 1
    console.print(f"{target.table.path} has {len(target.table.entries)} layers")
    return 0


def _tuned(target: _Mps | _Cuda, device: torch.device, layer: Layer, seconds: float) -> Found:
    until = time.perf_counter() + seconds
    step, fields = _step(layer, device), target.fields(layer)

    def compare(tried: Iterable[Numbers], share: float) -> dict[str, list[float]]:
        steps = {text_of(numbers): target.step(layer, step, numbers) for numbers in tried}
        return interleaved(steps, device, share * (until - time.perf_counter()), min_rounds=5)

    best: Numbers = {}
    for done, candidates in enumerate(fields):
        if time.perf_counter() > until:
            break
        tried = {target.planned(layer, best): best}
        for candidate in candidates:
            if candidate != TORCH:
                tried.setdefault(target.planned(layer, best | candidate), best | candidate)
        if len(tried) > 1:
            times = compare(tried.values(), 1 / (len(fields) - done + 3))
            best = min(tried.values(), key=lambda numbers: ratio(times, text_of(numbers), text_of(best)).median)
    has_torch = target.planned(layer, TORCH) != target.planned(layer, {})
    times = compare([{}, best, TORCH] if has_torch else [{}, best], 1)
    target.put(layer, "")
    ratios = {text: ratio(times, text, "") for text in times}
    winner = min(ratios, key=lambda text: ratios[text].median)
    won = ratios[winner].median < 1 - MARGIN and ratios[winner].high < 1
    milliseconds, of_torch = statistics.median(times[""]) * 1e3, ratios.get(text_of(TORCH))
    return Found(layer, milliseconds, ratios[text_of(best)], of_torch, winner if won else "")


def _step(layer: Layer, device: torch.device) -> Callable[[], object]:
    """Calls of the operator on random operands, over as many weights as no cache holds."""
    dtype, adapter_dtype = getattr(torch, layer.dtype), getattr(torch, layer.adapter_dtype)
    M, K, N, r = layer[1:5]

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, grad, h = random(M, K), random(M, N), random(M, r, dtype=adapter_dtype)
    A, B = random(r, K, dtype=adapter_dtype), random(N, r, dtype=adapter_dtype)
    weights = [random(N, K) for _ in range(min(max(ROTATED // (N * K * dtype.itemsize), 1), 16))]
    scaling, needs = torch.tensor(0.5), (True, False, False, True, True, False)
    ops = torch.ops.torch_fused_lora

    def forward() -> None:
        for weight in weights:
            ops.lora_linear_forward(x, weight, None, A, B, scaling, None, (), (), True)

    def backward() -> None:
        for weight in weights:
            ops.lora_linear_backward(grad, x, weight, A, B, scaling, h, None, (), (), needs)

    return backward if layer.backward else forward


def _sheet(results: list[Found]) -> Sheet:
    sheet = Sheet(title="Time over the default's, median of the rounds (quartiles)", box=SIMPLE)
    sheet.add_column("layer", no_wrap=True)
    for heading in ("default ms", "best", "torch's own", "kept"):
        sheet.add_column(heading, justify="right" if heading != "kept" else "left", overflow="fold")
    for found in results:
        others = str(found.best_over_default), str(found.torch_over_default or "")
        sheet.add_row(str(found.layer), f"{found.default_ms:.3f}", *others, found.kept or "the default")
    return sheet


def shapes_of(folder: Path, rows: list[int]) -> list[tuple[int, int, int]]:
    """M x K x N of a model's linear layers, by its config.json: one each, for every number of rows. Not its head.

    Raises OSError or ValueError where there is no such file or Transformers does not know the model.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shapes = dict.fromkeys((module.in_features, module.out_features) for module in linears)
    return [(M, K, N) for (K, N), M in itertools.product(shapes, rows)]
