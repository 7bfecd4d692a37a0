"""How long launches take by a model: ``python -m tests.kernels.time_model``. Nothing here was timed on Apple GPUs.

A launch takes launch_us and the longest of: bytes over bandwidth, of device memory (each byte once) and of its cache
(all requests); matrix multiplies over their rate on the cores that have a threadgroup; and the chain: threadgroup
memory's bytes over its bandwidth, plus the steps that wait for each other on the longest way through a threadgroup,
times the threadgroups that a core has one after the other: as many at once as the estimated registers of this very
variant (kernel_code.py) and its threadgroup memory leave room for. The executor counts all of it, in trace mode, on the
launch's first threadgroup, which speaks for all. chips.tsv has the constants.

Of the first kernels, launches, bytes, multiplies and steps alone put 22 of 28 within 1.5 of an H100's times and 12
of 517 pairs in the wrong order: missing were simd operations in the chain (a simd_sum, a load of a matrix), threadgroup
memory's bytes, and how many threadgroups a core has room for. Still missing: instructions that are none of these, which
make the row kernels on few cores up to twice as slow as modelled.

``--check`` compares the model with what was measured on an H200 (docs/metal_on_an_nvidia_gpu.json), where kernels of
the same names are launched now. The H200's constants are fitted to these very times.
``--plot FILE`` draws the table.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests import ROOT
from tests.emulator import metal_on_cpu
from tests.emulator.metal_on_cpu import codegen
from tests.emulator.metal_on_cpu.toolchain import cached, runtime
from tests.emulator.metal_on_gpu import times
from tests.emulator.metal_on_gpu.library import Dispatches
from tests.kernels.launch_plan import Launch
from torch_fused_lora.affine import Packed

MEASURED = ROOT / "docs" / "metal_on_an_nvidia_gpu.json"
HALF = torch.float16


@dataclasses.dataclass(frozen=True)
class Chip:
    """A line of chips.tsv, which explains the numbers."""

    chip: str
    cores: int
    ghz: float
    gb_per_s: float
    share: float
    l2_gb_per_s: float
    latency_ns: float
    threadgroup_bytes: float
    register_kb: float
    threadgroup_kb: float
    threads: int
    launch_us: float
    step: float
    collective: float
    multiply: float
    multiplies: float

    def bandwidth_us(self, moved: float) -> float:
        return moved / (self.gb_per_s * self.share) / 1e3


@functools.cache
def chips() -> dict[str, Chip]:
    lines = [line for line in Path(__file__).with_name("chips.tsv").read_text().splitlines() if line[0] != "#"]
    found = csv.DictReader(lines, delimiter="\t")
    return {line["chip"]: Chip(line.pop("chip"), *(float(value) for value in line.values())) for line in found}


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one launch: totals, then those of its longest threadgroup or simdgroup."""

    kernel: str
    threadgroups: int
    threads: int  # of a threadgroup
    registers: int  # of a thread, estimated: kernel_code.py
    threadgroup_memory: int  # its bytes
    requested: int  # bytes of device memory, all requests
    least: int  # and each byte once
    threadgroup_accessed: int
    multiplies: int
    longest_steps: int
    longest_multiplies: int
    longest_collectives: int

    def parts(self, chip: Chip) -> dict[str, float]:
        """Microseconds of each of what a launch may be limited by."""
        busy, cycles = min(self.threadgroups, chip.cores), chip.ghz * 1e3  # a microsecond
        turns = math.ceil(self.threadgroups / (chip.cores * self.resident(chip)))
        step = chip.latency_ns / 1e3 + chip.step / cycles
        simd = self.longest_multiplies * chip.multiply + self.longest_collectives * chip.collective
        return {
            "memory": chip.bandwidth_us(self.least),
            "cache": self.requested / chip.l2_gb_per_s / 1e3,
            "multiplies": self.multiplies / busy * chip.multiplies / cycles,
            "chain": self.threadgroup_accessed / (busy * chip.threadgroup_bytes * cycles)
            + turns * (self.longest_steps * step + simd / cycles),
        }

    def resident(self, chip: Chip) -> int:
        """Threadgroups that a core has room for."""
        registers = self.registers * 4 * self.threads
        memory = chip.threadgroup_kb * 1024 / max(self.threadgroup_memory, 1)
        return max(int(min(chip.register_kb * 1024 / registers, chip.threads / self.threads, memory)), 1)

    def microseconds(self, chip: Chip) -> float:
        return chip.launch_us + max(self.parts(chip).values())


def count(launch: Launch, arguments: Sequence[Tensor | bytes | None]) -> Counts:
    """What the executor counts in a launch; from the cache where it was counted before."""
    kernel, source = launch.kernel.decode(), launch.source.decode()
    groups = math.prod(a // b for a, b in zip(launch.threads, launch.group, strict=True))

    def make(path: Path) -> None:
        compiled = metal_on_cpu.compile(source)[kernel]
        report = compiled.dispatch(
            threads=launch.threads, group=launch.group, arguments=arguments, trace=True, most_groups=1
        )
        assert not report.findings, report.findings[0]
        counters = report.counters
        least = sum(
            min(moved * groups, value.nbytes)
            for value, *both in zip(arguments, counters.loaded, counters.stored, strict=False)
            if isinstance(value, Tensor)
            for moved in both
        )
        totals = {
            "requested": groups * (sum(counters.loaded) + sum(counters.stored)),
            "least": least,
            "threadgroup_accessed": groups * counters.threadgroup_accessed,
            "multiplies": groups * counters.matrix_multiplies,
        }
        longest = {name: getattr(counters, name) for name in dataclasses.asdict(counters) if name.startswith("longest")}
        path.write_text(json.dumps({**totals, **longest, "threadgroup_memory": counters.threadgroup_bytes}))

    given = [id(value) for value in arguments]  # a tensor that is given twice counts once
    shapes = [
        (value.shape, value.stride(), value.dtype, given.index(id(value))) if isinstance(value, Tensor) else value
        for value in arguments
    ]
    parts = [source, kernel, repr(shapes), repr((list(launch.threads), list(launch.group))), str(runtime())]
    name = hashlib.sha256(kernel.encode()).hexdigest()[:8]
    found = json.loads(cached(f"counts-{name}", [*parts, inspect.getsource(count)], ".json", make).read_text())
    registers = codegen.inspect(source)[kernel].live_registers
    return Counts(kernel, groups, launch.group[0], registers, **found)


def counts(gpu_cores: int, launch_all: Callable[[Dispatches], object]) -> list[Counts]:
    """Of all that is launched on a GPU of so many cores."""
    found: list[Counts] = []
    launch_all(Dispatches(gpu_cores, run=lambda *dispatch: found.append(count(*dispatch))))
    return found


# ------------------------------------------------------------------------------------------------ against the H200

COLUMNS = [("us", "H200", None), ("us_fma", "H200 FMA", ("lora_delta", "lora_grad")), ("us_for_40_cores", "H200", None)]


def compared(column: str, chip: Chip, kernels: Sequence[str] | None = None) -> Iterator[tuple[str, float, float]]:
    """Case, modelled and measured microseconds, of what is launched by the kernels that were measured."""
    measured = {(case["kernel"], case["shape"]): case for case in json.loads(MEASURED.read_text())["times"]["cases"]}
    cores = 40 if column.endswith("40_cores") else chip.cores
    for case in times.CASES:
        if kernels is None or case.kernel in kernels:
            launches = counts(int(cores), lambda dispatches, case=case: case.ours(dispatches, case.make()))
            then = measured[case.kernel, case.shape]
            if [found.kernel for found in launches] != [launch["kernel"] for launch in then["launches"]]:
                continue
            modelled = sum(found.microseconds(chip) for found in launches)
            yield f"{case.kernel}, {case.shape}", modelled, then[column]


def judged(found: Sequence[tuple[str, float, float]]) -> tuple[int, int, int]:
    """How many are within a factor of 1.5; of the pairs that were measured a factor of 2 apart, how many are modelled
    in the wrong order; and how many such pairs there are."""
    within = sum(1 / 1.5 <= modelled / measured <= 1.5 for _, modelled, measured in found)
    pairs = [(a, b) for a in found for b in found if a[2] >= 2 * b[2]]
    return within, sum(a[1] <= b[1] for a, b in pairs), len(pairs)


def check() -> int:
    failed = 0
    for column, name, kernels in COLUMNS:
        found = list(compared(column, chips()[name], kernels))
        within, wrong, pairs = judged(found)
        failed += within < 0.8 * len(found) or wrong > 0
        print(f"{name}, {column}: {within} of {len(found)} within 1.5, {wrong} of {pairs} pairs in the wrong order")
        for case, modelled, measured in found:
            print(f"  {case:45} {modelled:8.1f} modelled {measured:8.1f} measured {modelled / measured:6.2f}")
    return failed


# ---------------------------------------------------------------------------------------------------- layers on Macs

TOKENS = 1, 2, 4, 8, 16, 32, 128, 512, 2048, 8192
RANKS = 8, 16, 64
MACS = "M1", "M1 Max", "M3 Ultra", "M4", "M4 Max"
FFMA = 102  # of 128 a core and cycle, that matrix products reach: metal-benchmarks


@dataclasses.dataclass(frozen=True)
class Layer:
    """N x N, of rank r, on M tokens, fp16. Peers are charged their best case: their dispatches' bytes and
    multiplications with all cores busy, no chain. So is the base product, which is torch's for all but lora_decode."""

    chip: Chip
    M: int
    N: int
    r: int

    def peers(self, *dispatches: tuple[float, float]) -> float:
        """(elements moved, multiplications) each."""
        rate = self.chip.cores * FFMA * self.chip.ghz * 1e3
        return sum(
            self.chip.launch_us + max(self.chip.bandwidth_us(HALF.itemsize * moved), multiplied / rate)
            for moved, multiplied in dispatches
        )

    def product(self, rows: int, inner: int, columns: int, also_read: float = 0) -> tuple[float, float]:
        return rows * inner + inner * columns + rows * columns + also_read, rows * inner * columns

    def ours(self, launch_all: Callable[[Dispatches, Sequence[Tensor]], object]) -> float:
        M, N, r = self.M, self.N, self.r
        shapes = (M, N), (N, N), (r, N), (N, r), (M, N), (M, r), (M, r)
        operands = [torch.zeros(shape, dtype=HALF) for shape in shapes]
        found = counts(int(self.chip.cores), lambda kernels: launch_all(kernels, operands))
        return sum(launch.microseconds(self.chip) for launch in found)

    def forward(self) -> dict[str, float]:
        M, N, r = self.M, self.N, self.r
        linear, down, up = self.product(M, N, N), self.product(M, N, r), self.product(M, r, N)
        if M <= 8:
            ours = self.ours(lambda kernels, o: kernels.decode(o[0], o[1], None, o[2], o[3], 1.0))
        else:
            ours = self.peers(linear) + self.ours(lambda kernels, o: kernels.delta(o[4], o[0], o[2], o[3], 1.0))
        return {
            "linear": self.peers(linear),
            "ours": ours,
            "composition": self.peers(linear, down, self.product(M, r, N, M * N)),  # linear, mm, addmm_
            "MLX": self.peers(linear, down, up, (3 * M * N, 0)),
            "PEFT": self.peers(linear, down, up, (2 * M * N, 0), (3 * M * N, 0)),
        }

    def packed(self) -> dict[str, float]:
        """Forward over a weight in 4 bits with scales for 64, all of it ours; "linear" is that of the half weight."""
        M, N, r = self.M, self.N, self.r
        scales = torch.zeros(N, N // 64, dtype=HALF)
        words = torch.zeros(N, N // 8, dtype=torch.int32).view(torch.uint32)
        weight = Packed(words, scales, torch.zeros_like(scales), 4, 64)

        def forward(kernels: Dispatches, o: Sequence[Tensor]) -> None:
            if M <= 8:
                kernels.decode(o[0], weight, None, o[2], o[3], 1.0)
            else:
                kernels.delta(None, o[0], o[2], o[3], 1.0, save_h=True)
                kernels.gemm(o[0], weight, None, o[3], o[5], 1.0)

        linear, up = self.peers(self.product(M, N, N)), self.product(M, r, N, M * N)
        formed = (N * N / 4 + N / 32 * N + N * N, 0)  # elements of packed words and of scales read, of W written
        return {
            "linear": linear,
            "ours": self.ours(forward),
            "dequantised": linear + self.peers(formed, self.product(M, N, r), up),
        }

    def training(self) -> dict[str, float]:
        """Forward and backward, all gradients but the weight's."""
        M, N, r = self.M, self.N, self.r
        linear, down, up = self.product(M, N, N), self.product(M, N, r), self.product(M, r, N)
        gradient = self.product(r, M, N)  # of A or B

        def backward(kernels: Dispatches, o: Sequence[Tensor]) -> None:
            kernels.delta_dx(o[4], o[0], o[2], o[3], 1.0, save_z=True)
            kernels.grad(o[0], o[5], o[4], o[6], o[2], o[3], 1.0)

        composition = self.peers(linear, down, self.product(M, r, N, M * N), gradient, gradient)
        separate = self.peers(linear, down, gradient, up, gradient, (3 * M * N, 0))
        more = {"linear": self.peers(linear), "ours": self.peers(linear) + self.ours(backward)}
        more |= {"composition": composition, "MLX": separate, "PEFT": separate + self.peers((2 * M * N, 0))}
        return {who: us + more[who] for who, us in self.forward().items()}


def report(N: int, plot: Path | None) -> None:
    found = {}
    for what in ("forward", "packed", "training"):
        for name, r in itertools.product(MACS, RANKS):
            by_tokens = {M: getattr(Layer(chips()[name], M, N, r), what)() for M in TOKENS}
            found[what, name, r] = by_tokens
            print(f"\nModelled, not measured: {what}, {N} x {N}, rank {r}, fp16, on {name}, microseconds")
            print(f"{'tokens':>8}" + "".join(f"{who:>13}" for who in by_tokens[1]))
            for M, by_who in by_tokens.items():
                print(f"{M:8}" + "".join(f"{us:13.0f}" for us in by_who.values()))
    if plot:
        draw(found, N, plot)


def draw(found: Mapping[tuple[str, str, int], Mapping[int, Mapping[str, float]]], N: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(MACS), 2.5 * 2 * len(RANKS)), layout="constrained")
    axes = figure.subplots(2 * len(RANKS), len(MACS), sharex=True, sharey=True)
    planes = {
        (what, name, r): axes[i][MACS.index(name)]
        for i, (what, r) in enumerate(itertools.product(("forward", "training"), RANKS))
        for name in MACS
    }
    for (what, name, r), by_tokens in found.items():
        plane = planes[what, name, r]
        for who in by_tokens[1]:
            ratios = [by_who[who] / by_who["linear"] for by_who in by_tokens.values()]
            plane.loglog(list(by_tokens), ratios, base=2, label=who, linewidth=2 if who == "ours" else 1)
        plane.set_title(f"{what}, rank {r}, {name}", fontsize=9)
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("tokens")
    figure.supylabel("time over that of the linear layer alone")
    figure.suptitle(f"Modelled, not measured: a {N} x {N} LoRA layer, fp16")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what was measured on an H200")
    parser.add_argument("--size", type=int, default=4096, help="of the layer")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.check:
        return check()
    report(options.size, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
