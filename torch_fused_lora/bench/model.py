"""A whole training step, forward and backward, of a Llama-like model with random weights: stock PEFT against patched.

Four models share one base's tensors, and the last three of them their adapters': the base without adapters, which is
the floor (its input requires a gradient, or it would have no backward), stock PEFT's, the same patched, and with its
norms patched as well. Under the adapters the base may be in another format. They are timed in one process, interleaved,
as `measure` does. Every one of them gets the same input embeddings, which require a gradient. An optimizer's step is
not part of it, as it is the same for all.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from rich.box import SIMPLE
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..norms import patch_norms
from ..peft import patch_peft
from .formats import held
from .measure import SHORT, Ratio, interleaved, peak_bytes, ratio, with_adapters
from .report import environment_of, one_line, start, write

SIZES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "1.1B": {  # TinyLlama's
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
BATCHES = {"small": [[4, 128], [1, 64]], "1.1B": [[4, 1024], [1, 512]]}
Bases: TypeAlias = tuple[PreTrainedModel, PreTrainedModel]  # without adapters, and what is under them
ADAPTED = ("stock", "patched", "patched+norms")
PROFILED_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A batch, and adapters on every linear layer of the decoder; the base is bfloat16."""

    lines: int
    tokens: int
    r: int
    adapters: str
    dropout: float

    def __str__(self) -> str:
        return f"{self.lines} x {self.tokens}, {SHORT[self.adapters]}, dropout {self.dropout:g}"


@dataclasses.dataclass(frozen=True)
class Compared:
    """The floor's median, and the rounds' ratios: of what has adapters over the floor, of ours over stock PEFT."""

    floor: float
    over_floor: dict[str, Ratio]
    over_stock: dict[str, Ratio]

    @staticmethod
    def of(samples: dict[str, list[float]], unit: float) -> Compared:
        return Compared(
            statistics.median(samples["floor"]) / unit,
            {name: ratio(samples, name, "floor") for name in ADAPTED},
            {name: ratio(samples, name, "stock") for name in ADAPTED[1:]},
        )


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """``compared``: "wall_ms", the host's clock from a synchronised device to a synchronised device; on CUDA also
    "kernels_ms", the sum of their times, and "peak_MiB", the most that a step had allocated beside the model."""

    case: ModelCase
    rounds: int
    compared: dict[str, Compared]


def bench_model(
    device: str | None,
    size: str,
    format: str,
    batches: list[list[int]] | None,
    rank: int,
    dropouts: list[float],
    seconds: float,
    threads: int | None,
    out: Path,
) -> None:
    """Measure a step for each batch, dropout and dtype of the adapters; print the table, write JSON.

    Args:
        device: torch device; None for the accelerator if there is one, else the CPU.
        size: a name in `SIZES`, or "auto": 1.1B on CUDA, else small.
        format: of the base under the adapters, "" for the model's own, which is bfloat16.
        batches: (lines, tokens a line) each; None for the size's `BATCHES`.
        rank: of every adapter.
        dropouts: of every adapter.
        seconds: for each case.
        threads: CPU threads, None for torch's default.
        out: folder that gets model.json.
    """
    chosen, console = start(device, threads)
    if size == "auto":
        size = "1.1B" if chosen.type == "cuda" else "small"
    base = build(size, chosen)
    bases = base, held(_sharing(base), format) if format else base
    cases = [
        ModelCase(lines, tokens, rank, adapters, dropout)
        for lines, tokens in batches or BATCHES[size]
        for adapters in (("float32",) if format else ("bfloat16", "float32"))  # over packed words PEFT makes no others
        for dropout in dropouts
    ]
    results = [timed(bases, case, seconds) for case in track(cases, "measuring", console=console)]
    if chosen.type == "cuda":  # last: a profiler may leave launches slower
        results = [counted(bases, result) for result in track(results, "profiling", console=console)]
    environment = environment_of(chosen)
    console.print(one_line(environment))
    parameters = sum(p.numel() for p in base.parameters())
    of = f"Llama of {parameters / 1e6:.0f} M parameters, {format or 'bf16'}, LoRA of rank {rank}"
    console.print(_table(of, results))
    document = {
        "environment": environment,
        "model": {"name": size, "parameters": parameters, "dtype": "bfloat16", "format": format, **SIZES[size]},
        "results": [dataclasses.asdict(result) for result in results],
    }
    write(document, out / "model.json")
    console.print(f"wrote {out / 'model.json'}")


def build(size: str, device: torch.device) -> PreTrainedModel:
    """The frozen base, bfloat16, with Transformers' initial weights."""
    with device:
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], use_cache=False))
    return model.to(torch.bfloat16).requires_grad_(False).train()


def timed(bases: Bases, case: ModelCase, seconds: float) -> ModelResult:
    """Time one case: rounds until ``seconds`` are spent, 5 at least."""
    times = interleaved(_steps(bases, case), bases[0].device, seconds, min_rounds=5)
    return ModelResult(case, len(times["floor"]), {"wall_ms": Compared.of(times, 1e-3)})


def counted(bases: Bases, result: ModelResult) -> ModelResult:
    """A case's result, with its kernels and memory on CUDA."""
    steps = _steps(bases, result.case)
    kernels: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(PROFILED_ROUNDS):
        for name in random.sample(list(steps), len(steps)):
            microseconds, peak = _on_cuda(steps[name], bases[0].device)
            kernels[name].append(microseconds)
            peaks[name].append(peak)
    more = {"kernels_ms": Compared.of(kernels, 1e3), "peak_MiB": Compared.of(peaks, 2**20)}
    return dataclasses.replace(result, compared=result.compared | more)


def _steps(bases: Bases, case: ModelCase) -> dict[str, Callable[[], Tensor]]:
    """A step of every variant, each made once already."""
    base = bases[0]
    labels = torch.randint(base.config.vocab_size, (case.lines, case.tokens), device=base.device)
    embeddings = base.get_input_embeddings()(labels).detach().requires_grad_()
    steps = {name: _step(model, embeddings, labels) for name, model in variants(bases, case).items()}
    for name, step in steps.items():
        assert math.isfinite(loss := step()), f"{name}: the loss is {loss}"
    return steps


def variants(bases: Bases, case: ModelCase) -> dict[str, torch.nn.Module]:
    """The floor and the three with adapters, by name."""
    floor, under = bases
    stock = with_adapters(_sharing(under), "all-linear", case.r, case.adapters, case.dropout)
    patched, with_norms = _sharing(stock), _sharing(stock)
    for report in (patch_peft(patched), patch_peft(with_norms), patch_norms(with_norms)):
        assert report.patched, report
        assert not report.declined, report
    return {"floor": floor, **dict(zip(ADAPTED, (stock, patched, with_norms), strict=True))}


def _sharing(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules over the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})


def _step(model: torch.nn.Module, embeddings: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    trained = [embeddings, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> Tensor:
        loss = model(inputs_embeds=embeddings, labels=labels).loss
        loss.backward()
        for tensor in trained:
            tensor.grad = None
        return loss.detach()

    return step


def _on_cuda(step: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Microseconds that kernels took in a step, and the most bytes it had allocated beside what was there before."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:  # it warns without
        peak = peak_bytes(step, device)
    on_device = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in on_device), peak


def _table(model: str, results: list[ModelResult]) -> Table:
    title = f"Training step, {model}: times the floor's and times stock PEFT's, median of the rounds (quartiles)"
    caption = "floor: the same model without adapters. kernels: their sum. peak: beside the model. No optimizer's step."
    table = Table(title=title, caption=caption, box=SIMPLE)
    table.add_column("lines x tokens, adapters", no_wrap=True)
    for heading in ("", "floor", "stock", "patched", "+ norms", "patched / stock", "+ norms / stock"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        for quantity, compared in result.compared.items():
            ratios = [str(r) for r in (*compared.over_floor.values(), *compared.over_stock.values())]
            table.add_row(str(result.case), quantity.replace("_", " "), f"{compared.floor:.1f}", *ratios)
    return table
