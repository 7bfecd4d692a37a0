"""The LoRA tax: how much longer a linear layer takes once it carries an adapter.

Three layers over the same base are timed in one process, interleaved: in every round each of them runs once, in
a new random order, so that what slows the machine for a while slows all three. What is reported is the median of
the rounds' ratios, with the quartiles as its spread; times of different rounds are never compared.

On CUDA it is the device that is timed: a layer's time there is the replay of a CUDA graph that goes through so many
layers and inputs in turn that none is left in L2 from the round before.

Beside it the host's cost, what a call of `lora_linear` takes of the CPU before the device has done anything, and the
operators on rows, timed beside torch's own.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from torch_fused_lora.ops.lora_linear import lora_linear
from torch_fused_lora.ops.rms_norm import rms_norm
from torch_fused_lora.ops.softmax import softmax
from torch_fused_lora.peft import patch_peft
from torch_fused_lora.plan import Dispatch, plan
from torch_fused_lora.torch_private import base_of

from .formats import FORMATS

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclasses.dataclass(frozen=True)
class Case:
    """M tokens through a (N, K) layer with a rank-r adapter, base and adapters in the dtypes given; the adapters' base
    in another format, of `FORMATS`, if one is named."""

    M: int
    K: int
    N: int
    r: int
    base: str = "float32"
    adapters: str = "float32"
    dropout: float = 0.0
    format: str = ""

    def __str__(self) -> str:
        text = f"{self.M} x {self.K} x {self.N}, r {self.r}, {SHORT[self.base]}"
        text += f" + {SHORT[self.adapters]}" if self.adapters != self.base else ""
        text += f", {self.format}" if self.format else ""
        return text + (f", dropout {self.dropout}" if self.dropout else "")


L2_BYTES = 60e6  # an H200's, the largest of a card so far

SMALL = ((1, 512, 512, 8), (64, 2048, 2048, 16), (512, 1024, 1024, 16))
MEDIUM = ((1, 4096, 4096, 16), (64, 4096, 4096, 16), (512, 4096, 4096, 16), (4096, 2048, 2048, 16))
LARGE = ((4096, 4096, 4096, 16), (8192, 4096, 14336, 16), (8192, 4096, 4096, 64))


# What its peers publish of a card: a bfloat16 base, and from 512 rows on dropout too.
GPU = [
    Case(*shape, "bfloat16", adapters, dropout)
    for shape in (
        *((rows, 4096, 4096, 16) for rows in (1, 8, 64, 512, 4096)),
        (8192, 4096, 14336, 16),
        (8192, 14336, 4096, 16),
        (8192, 4096, 4096, 64),
    )
    for adapters in ("float32", "bfloat16")
    for dropout in ((0.0, 0.1) if shape[0] >= 512 else (0.0,))
]

PACKED = [
    Case(*shape, "bfloat16", "float32", format=format)
    for shape in (
        *((rows, *layer, 16) for layer in ((4096, 4096), (4096, 14336), (14336, 4096)) for rows in (1, 8)),
        (512, 4096, 4096, 16),
        (4096, 4096, 4096, 16),
    )
    for format in ("4bit", "nf4")
]
CALLED = [Case(rows, 1024, 1024, 16, base, format="called") for base in ("float32", "bfloat16") for rows in (64, 512)]


def cases(shapes: Sequence[tuple[int, int, int, int]]) -> list[Case]:
    """PEFT's default adapters (float32) over a float32 and a bfloat16 base, at every shape."""
    return [Case(*shape, base=base) for base in ("float32", "bfloat16") for shape in shapes]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median, lower and upper quartile over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Ratio:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Ratio(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Result:
    """One case in one direction: "forward" (no_grad) or "forward+backward" (gradients of x, A and B). ``plan``: how the
    patched layer's kernels were launched, on mps. ``peak_bytes``: on CUDA, as of `peak_bytes`."""

    case: Case
    direction: str
    rounds: int
    linear_ms: float
    peft_tax: Ratio
    patched_tax: Ratio
    patched_over_peft: Ratio
    saved_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    plan: list[Dispatch]


def layers(case: Case, device: torch.device) -> dict[str, nn.Module]:
    """The plain frozen layer, stock PEFT's and the patched one, all over the same weight, or what that is held in."""
    linear = nn.Linear(case.K, case.N, device=device, dtype=getattr(torch, case.base)).requires_grad_(False)
    base = FORMATS[case.format](linear) if case.format else linear
    found: dict[str, nn.Module] = {"linear": linear}
    for name in ("peft", "patched"):
        model = with_adapters(nn.Sequential(base), ["0"], case.r, case.adapters, case.dropout)
        if name == "patched":
            report = patch_peft(model)
            assert len(report.patched) == 1, report
        found[name] = model.base_model.model[0]
    return found


def with_adapters(model: nn.Module, targets: list[str] | str, r: int, adapters: str, dropout: float) -> Any:
    """Stock PEFT's model; its adapters are random, B too, and of dtype "float32" or of the base's."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config, autocast_adapter_dtype=adapters == "float32")


def run(case: Case, direction: str, device: torch.device, seconds: float, min_rounds: int = 5) -> Result:
    """Time one case: rounds until ``seconds`` are spent, ``min_rounds`` at least."""
    copies = _copies(case) if device.type == "cuda" else 1
    steps: dict[str, list[Callable[[], object]]] = {}
    for _ in range(copies):
        x = torch.randn(case.M, case.K, device=device, dtype=getattr(torch, case.base))
        for name, layer in layers(case, device).items():
            steps.setdefault(name, []).append(_step(layer, x, direction))
    saved = {name: saved_bytes(first) for name, (first, *_) in steps.items()} if direction != "forward" else {}
    on_card, peaks = device.type == "cuda", {}
    for name, (first, *_) in steps.items() if on_card else ():
        first()  # which allocates cuBLAS's workspace, once
        peaks[name] = peak_bytes(first, device)
    in_turn = {name: _captured(own) if on_card else own[0] for name, own in steps.items()}
    times = interleaved(in_turn, device, seconds, min_rounds)
    return Result(
        case,
        direction,
        len(times["linear"]),
        statistics.median(times["linear"]) * 1e3 / copies,
        ratio(times, "peft", "linear"),
        ratio(times, "patched", "linear"),
        ratio(times, "patched", "peft"),
        saved,
        peaks,
        _planned(direction, device, "lora_linear", (case.M, case.K, case.N, case.r), case.base, case.adapters),
    )


def _copies(case: Case) -> int:
    """Of a layer and its input, so that they come to twice what L2 holds; but 16 at most."""
    itemsize = getattr(torch, case.base).itemsize
    size = case.N * case.K * (0.5 if case.format else itemsize) + case.M * (case.N + case.K) * itemsize
    return min(math.ceil(2 * L2_BYTES / size), 16)


def _captured(steps: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """All of them one after the other, as a CUDA graph."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for step in steps:
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph.replay


def interleaved(
    steps: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    """Seconds a step, one number a round for each of the steps."""
    once = 0.0
    for step in steps.values():  # warm up
        step()
        _synchronize(device)
        started = time.perf_counter()
        step()
        _synchronize(device)
        once = time.perf_counter() - started
    repeats = max(1, min(int(5e-3 / once), 500))  # a sample is 5 ms or one call
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    deadline = time.perf_counter() + seconds
    gc.disable()
    try:
        while len(times[order[0]]) < min_rounds or time.perf_counter() < deadline:
            random.shuffle(order)
            for name in order:
                step = steps[name]
                _synchronize(device)
                started = time.perf_counter()
                for _ in range(repeats):
                    step()
                _synchronize(device)
                times[name].append((time.perf_counter() - started) / repeats)
    finally:
        gc.enable()
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> Ratio:
    return Ratio.of([a / b for a, b in zip(times[over], times[under], strict=True)])


def _step(layer: nn.Module, x: Tensor, direction: str) -> Callable[[], object]:
    return _function_step(layer, x, [p for p in layer.parameters() if p.requires_grad], direction)


def _function_step(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], direction: str
) -> Callable[[], object]:
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x)

        return forward
    x = x.detach().requires_grad_()
    wanted = [x, *parameters]
    grad = torch.randn_like(function(x))

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x), wanted, grad)

    return forward_backward


@dataclasses.dataclass(frozen=True)
class RowCase:
    """An operator, "rms_norm" or "softmax", on M rows of H elements; the weight is of the rows' dtype."""

    operator: str
    M: int
    H: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.operator}, {self.M} x {self.H}, {SHORT[self.dtype]}"


ROWS = ((1, 4096), (512, 1024), (4096, 4096))


def row_cases(shapes: Sequence[tuple[int, int]]) -> list[RowCase]:
    """Both operators in float32 and bfloat16, at every shape."""
    names = ("rms_norm", "softmax")
    return [RowCase(name, *shape, dtype) for name in names for dtype in ("float32", "bfloat16") for shape in shapes]


@dataclasses.dataclass(frozen=True)
class RowResult:
    """A row operator beside torch's own and, for rms_norm, beside the Llama module that `patch_norms` replaces."""

    case: RowCase
    direction: str
    rounds: int
    torch_ms: float
    over_torch: Ratio
    over_module: Ratio | None
    plan: list[Dispatch]


def run_rows(case: RowCase, direction: str, device: torch.device, seconds: float, min_rounds: int = 5) -> RowResult:
    """Time one case: rounds until ``seconds`` are spent, ``min_rounds`` at least."""
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.M, case.H, device=device, dtype=dtype)
    if case.operator == "softmax":
        functions = {"torch": lambda x: torch.softmax(x, -1), "ours": softmax}
        steps = {name: _function_step(function, x, [], direction) for name, function in functions.items()}
    else:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        module = LlamaRMSNorm(case.H).to(device, dtype)
        weight, eps = module.weight, module.variance_epsilon
        functions = {
            "torch": lambda x: F.rms_norm(x, (case.H,), weight, eps),
            "ours": lambda x: rms_norm(x, weight, eps),
            "module": module,
        }
        steps = {name: _function_step(function, x, [weight], direction) for name, function in functions.items()}
    times = interleaved(steps, device, seconds, min_rounds)
    return RowResult(
        case,
        direction,
        len(times["ours"]),
        statistics.median(times["torch"]) * 1e3,
        ratio(times, "ours", "torch"),
        ratio(times, "ours", "module") if "module" in times else None,
        _planned(direction, device, case.operator, (case.M, case.H), case.dtype, case.dtype),
    )


def _planned(
    direction: str, device: torch.device, operator: str, shape: tuple[int, ...], dtype: str, adapter_dtype: str
) -> list[Dispatch]:
    dispatches = plan(operator, shape, dtype, adapter_dtype) if device.type == "mps" else []
    return [dispatch for dispatch in dispatches if dispatch.direction in direction.split("+")]


def saved_bytes(step: Callable[[], object]) -> int:
    """Bytes that a forward keeps for its backward, a storage once, leaves that are parameters not counted."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if (base := base_of(tensor)) is None else base, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[StorageWeakRef(storage).cdata] = storage.nbytes()  # which meta tensors have, too
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that a call has allocated on a card at a time, beside what was there before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclasses.dataclass(frozen=True)
class HostCost:
    """Microseconds of the calling thread's CPU time, at best, a call of `lora_linear` on 1 x 16 tensors of a device, of
    F.linear on CPU tensors of the same shape, and the ratio of the two over the rounds. "no_grad" or "recording"."""

    mode: str
    linear_us: float
    lora_linear_us: float
    ratio: Ratio


def host_cost(device: torch.device, mode: str, rounds: int = 41, calls: int = 200) -> HostCost:
    """Interleaved; other processes are not in the times, nor what a device does on its own."""
    recording = mode == "recording"
    shapes = (1, 16), (16, 16), (16,), (4, 16), (16, 4)
    x, weight, bias, lora_A, lora_B = (
        torch.randn(shape, device=device).requires_grad_(recording and len(shape) == 2) for shape in shapes
    )
    plain = [torch.randn(shape, device="cpu") for shape in shapes[:3]]
    plain[0].requires_grad_(recording)

    def microseconds(call: Callable[[], object]) -> float:
        _synchronize(device)
        started = time.thread_time()
        for _ in range(calls):
            call()
        return (time.thread_time() - started) / calls * 1e6

    times = []
    with torch.set_grad_enabled(recording):
        for _ in range(rounds + 1):  # the first one warms up
            linear = microseconds(lambda: F.linear(*plain))
            times.append((linear, microseconds(lambda: lora_linear(x, weight, bias, lora_A, lora_B, 0.5))))
    linear_us, lora_linear_us = zip(*times[1:], strict=True)
    ratio = Ratio.of([a / b for a, b in zip(lora_linear_us, linear_us, strict=True)])
    return HostCost(mode, min(linear_us), min(lora_linear_us), ratio)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
