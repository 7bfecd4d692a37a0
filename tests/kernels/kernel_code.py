"""What the optimiser makes of every kernel that the launch plans ask for: ``python -m tests.kernels.kernel_code``.

Fails on what metal_on_cpu/codegen.py finds, and where a variant has more values live at once than kernel_code.tsv says;
``--update`` writes that file anew. Printed beside it: the 32-bit registers a thread has, if a core's register file has
208 KB and one threadgroup at a time (a figure from public sources). Both are estimates: what Apple's compiler
allocates, only a Mac can show.

``--sources FOLDER`` compiles nothing and writes every kernel's source there, as torch is given it on a Mac.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tests.emulator.metal_on_cpu.codegen import Code, inspect
from tests.kernels.launch_plan import Kernels, Launch, shape_of
from tests.kernels.row_plan import RowKernels
from tests.reference import MIXED, NARROW
from torch_fused_lora.affine import Packed

FIGURES = Path(__file__).with_suffix(".tsv")
REGISTER_FILE = 208 << 10
TOGETHER = 32  # variants in a translation unit: it is parsed once
RANKS = 8, 16, 32, 64, 128, 256  # other ranks differ in the number of blocks of eight alone


def variants() -> dict[str, Launch]:
    """A launch of every instantiation, by its kernel's name."""
    found = [launch for dtypes in MIXED for launch in (*lora(*dtypes), *quantized(*dtypes), *rows(*dtypes))]
    return {launch.kernel.decode(): launch for launch in found}


def lora(dtype: torch.dtype, adapter: torch.dtype, K: int = 512) -> list[Launch]:
    kernels, launches = Kernels(), []
    weight, A, B = empty(dtype, 160, K), empty(adapter, 16, K), empty(adapter, 160, 16)
    for M in (1, 2, 4, 8):
        launches += kernels.plan_decode(empty(dtype, M, K), weight, None, A, B)
    # Few rows, and so many that they are split for the gradients: these also one element behind 16 bytes.
    for rank, (M, offset), dropout_p in itertools.product(
        RANKS, ((8, 0), (16, 0), (1 << 16, 0), (1 << 16, 1)), ((), (0.5,))
    ):
        x, A, B = empty(dtype, M, K, offset), empty(adapter, rank, K), empty(adapter, K, rank)
        launches += kernels.plan_delta(x, x, A, B, dropout_p)
        launches += kernels.plan_delta_dx(x, x, A, B, dropout_p)
        launches += kernels.plan_delta_dx(None, x, A, B, dropout_p)
        launches += kernels.plan_grad(x, x, A, B, dropout_p)[0]
    return launches


def quantized(dtype: torch.dtype, adapter: torch.dtype, K: int = 512) -> list[Launch]:
    """Over packed weights, and lora_gemm over plain ones, too."""
    kernels, launches = Kernels(), []
    formats = [*((4, scale_dtype) for scale_dtype in NARROW), (8, torch.float16)]
    weights = [empty(dtype, K, K), *(packed(K, bits, scale_dtype) for bits, scale_dtype in formats), with_table(K)]
    A, B = empty(adapter, 16, K), empty(adapter, K, 16)
    for M, weight in itertools.product((1, 2, 4, 8), weights[1:]):
        launches += kernels.plan_decode(empty(dtype, M, K), weight, None, A, B)
    for M, weight in itertools.product((16, 4096), [*weights, packed(2 * K, 4, dtype)]):  # the last one's K is split
        K = shape_of(weight)[1]
        x, factor = empty(dtype, M, K), empty(adapter, 16, K)
        launches += kernels.plan_gemm(False, x, weight, None, factor.T)
        launches += kernels.plan_gemm(True, x, weight, None, factor)
        launches += kernels.plan_gemm(True, x, weight, None, factor, 0.5)
    return launches


def packed(K: int, bits: int, scale_dtype: torch.dtype, group_size: int = 64) -> Packed:
    scales = empty(scale_dtype, K, K // group_size)
    return Packed(empty(torch.uint32, K, K * bits // 32), scales, scales, bits, group_size)


def with_table(K: int) -> Packed:
    words, scales, table = (torch.uint8, K, K // 2), (torch.float32, K, K // 64), (torch.float32, 1, 16)
    return Packed(*(empty(*shape) for shape in (words, scales, table)), 4, 64)


def rows(dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Launch]:
    kernels, launches = RowKernels(), []
    # Held up to 4096, by softmax to 8192; aligned to 16 bytes, and one element behind that.
    for H, M, offset in itertools.product((256, 512, 1024, 2048, 4096, 8192, 16384), (16, 4096), (0, 1)):
        x, weight = empty(dtype, M, H, offset), empty(weight_dtype, 1, H)[0]
        launches += kernels.plan_rms_norm(x, weight)
        launches += kernels.plan_rms_norm_backward(x, x, weight)[0]
        launches += kernels.plan_softmax(x)
        launches += kernels.plan_softmax_backward(x, x)
    return launches


def empty(dtype: torch.dtype, M: int, N: int, offset: int = 0) -> torch.Tensor:
    return torch.empty(offset + M * N, dtype=dtype, device="meta")[offset:].view(M, N)


def generate(launches: Mapping[str, Launch]) -> dict[str, Code]:
    """Compile them, those of one family together."""
    families = defaultdict(list)
    for launch in launches.values():
        family, mark, instantiation = launch.source.decode().rpartition("\ntemplate [[host_name")
        families[family].append(mark + instantiation)
    sources = [
        family + "".join(lines[begin : begin + TOGETHER])
        for family, lines in families.items()
        for begin in range(0, len(lines), TOGETHER)
    ]
    if len(sources) == 1:
        return inspect(*sources)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return {name: code for found in pool.map(inspect, sources) for name, code in found.items()}


def shape(name: str) -> str:
    """A variant's name without its dtypes: those of one shape share a figure, the largest."""
    return re.sub(r"_(float|half|bfloat)(?=_|$)", "", name)


def figures(codes: Mapping[str, Code]) -> dict[str, int]:
    most: dict[str, int] = defaultdict(int)
    for name, code in codes.items():
        most[shape(name)] = max(most[shape(name)], code.live_registers)
    return dict(most)


def committed() -> dict[str, int]:
    lines = FIGURES.read_text().splitlines()
    return {name: int(registers) for name, registers in (line.split("\t") for line in lines)}


def faults(codes: Mapping[str, Code], limits: Mapping[str, int]) -> list[str]:
    """What is wrong with these variants, a sentence each."""
    by_finding = defaultdict(list)
    for name, code in codes.items():
        for finding in code.findings:
            by_finding[finding].append(name)
    found = [f"{finding} ({len(names)} variants, one of them {names[0]})" for finding, names in by_finding.items()]
    for name, registers in figures(codes).items():
        if name not in limits:
            found.append(f"{name}: no figure in {FIGURES.name}")
        elif registers > limits[name]:
            found.append(f"{name}: {registers} registers live at once, {limits[name]} in {FIGURES.name}")
    return found


def write_sources(launches: Mapping[str, Launch], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, launch in launches.items():
        (folder / f"{name}.metal").write_bytes(launch.source)
    print(f"{len(launches)} sources in {folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write {FIGURES.name} anew")
    parser.add_argument("--sources", type=Path, metavar="FOLDER", help="write every kernel's source there and stop")
    options = parser.parse_args()
    launches = variants()
    if options.sources:
        write_sources(launches, options.sources)
        return 0
    codes = generate(launches)
    print("32-bit registers a thread, estimates: live at once, at most / there, of 208 KB for one threadgroup")
    for name, code in codes.items():
        there = REGISTER_FILE // (4 * launches[name].group[0])
        print(f"{name:50} {code.live_registers:4} /{there:4}{'  more than there are' * (code.live_registers > there)}")
    if options.update:
        FIGURES.write_text("".join(f"{name}\t{registers}\n" for name, registers in sorted(figures(codes).items())))
    limits = committed()
    wrong = faults(codes, limits) + [f"{name}: no such variant" for name in limits.keys() - figures(codes).keys()]
    print(f"{len(codes)} variants, {len(figures(codes))} shapes, {len(wrong)} faults", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
