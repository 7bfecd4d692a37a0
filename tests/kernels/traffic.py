"""What the kernels move: ``python -m tests.kernels.traffic``.

Counted: bytes that the executor saw a dispatch request, by operand, beside the least possible (each operand once). The
same follows from the launches by formulas, also for shapes too large to execute here; test_traffic.py holds them to the
counts, byte for byte. What time that makes: time_model.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests import ROOT
from tests.emulator.metal_on_cpu import Report
from tests.kernels.launch_plan import Kernels
from tests.kernels.row_plan import RowKernels
from torch_fused_lora.affine import Packed

W_ROWS = int(re.findall(r"DECODE_W_ROWS = (\d+)", (ROOT / "metal" / "lora_decode.h").read_text())[0])

DECODE_OPERANDS = "x", "weight", "scales", "biases", "bias", "lora_A", "lora_B", "y", "h", "partial"


@dataclasses.dataclass(frozen=True)
class Case:
    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype = torch.float16
    adapter_dtype: torch.dtype = torch.float16
    gpu_cores: int = 40
    bits: int = 0  # of a packed weight, in groups of 64
    has_table: bool = False

    def __str__(self) -> str:
        adapters = "" if self.adapter_dtype == self.dtype else f" + {_short(self.adapter_dtype)}"
        packed = ", NF4" if self.has_table else f", {self.bits}-bit" if self.bits else ""
        return f"{self.M} x {self.K} x {self.N}, r {self.r}, {_short(self.dtype)}{adapters}{packed}"

    @property
    def scale_bytes(self) -> int:
        return 4 if self.has_table else self.dtype.itemsize

    def bytes(self, operand: str) -> int:
        """Of one operand, read or written once."""
        size, adapter = self.dtype.itemsize, self.adapter_dtype.itemsize
        M, K, N, r = self.M, self.K, self.N, self.r
        return {
            "partial": 0,
            "x": M * K * size,
            "weight": N * K * self.bits // 8 or N * K * size,
            "scales": N * K // 64 * self.scale_bytes if self.bits else 0,
            "biases": 64 if self.has_table else N * K // 64 * size if self.bits else 0,
            "bias": N * size,
            "lora_A": r * K * adapter,
            "lora_B": N * r * adapter,
            "y": M * N * size,
            "dy": M * N * size,
            "dx": M * K * size,
            "h": M * r * adapter,
            "z": M * r * adapter,
            "dA": r * K * adapter,
            "dB": N * r * adapter,
        }[operand]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


Moved = dict[str, tuple[int, int]]  # operand -> bytes (loaded, stored)


def operands(case: Case):
    def randn(*shape, dtype):
        return torch.randn(shape).to(dtype)

    M, K, N, r = case.M, case.K, case.N, case.r
    return (
        randn(M, K, dtype=case.dtype),
        packed(case, *(randn(N, K // 64, dtype=case.dtype) for _ in range(2))) or randn(N, K, dtype=case.dtype),
        randn(N, dtype=case.dtype),
        randn(r, K, dtype=case.adapter_dtype),
        randn(N, r, dtype=case.adapter_dtype),
        randn(M, N, dtype=case.dtype),
    )


def packed(case: Case, scales: Tensor, biases: Tensor) -> Packed | None:
    """A weight of so many bits, of zeros."""
    if not case.bits:
        return None
    if case.has_table:
        words = torch.zeros(case.N, case.K // 2, dtype=torch.uint8, device=scales.device)
        return Packed(words, scales.float(), torch.zeros(16, device=scales.device), case.bits, 64)
    words = torch.zeros(case.N, case.K * case.bits // 32, dtype=torch.int32, device=scales.device)
    return Packed(words.view(torch.uint32), scales, biases, case.bits, 64)


def count_decode(case: Case) -> Moved:
    x, weight, bias, A, B, _ = operands(case)
    kernels = Kernels(case.gpu_cores, trace=True)
    kernels.decode(x, weight, bias, A, B, 1.0)
    return _counted(kernels.runs, DECODE_OPERANDS)


def count_delta(case: Case) -> Moved:
    x, _, _, A, B, y = operands(case)
    kernels = Kernels(case.gpu_cores, trace=True)
    kernels.delta(y, x, A, B, 1.0)
    return _counted(kernels.runs, ("x", "lora_A", "lora_B", "y", "h", "partial"))


GEMM_OPERANDS = {
    False: ("x", "weight", "scales", "biases", "bias", "h", "lora_B", "y"),
    True: ("dy", "weight", "scales", "biases", "bias", "z", "lora_A", "dx"),
}


def count_gemm(case: Case, is_backward: bool) -> Moved:
    """The first dispatch; where the terms are split, the result is partial sums."""
    x, weight, bias, A, B, dy = operands(case)
    h, kernels = torch.randn(case.M, case.r).to(case.adapter_dtype), Kernels(case.gpu_cores, trace=True)
    if is_backward:
        kernels.gemm_dx(dy, weight, A, h, 1.0)
    else:
        kernels.gemm(x, weight, bias, B, h, 1.0)
    return _counted(kernels.runs[:1], GEMM_OPERANDS[is_backward])


def count_grad(case: Case) -> Moved:
    """The first dispatch; where the rows are split, dA and dB are partial sums."""
    x, _, _, A, B, dy = operands(case)
    z, h = (torch.randn(case.M, case.r).to(case.adapter_dtype) for _ in range(2))
    kernels = Kernels(case.gpu_cores, trace=True)
    kernels.grad(x, z, dy, h, A, B, 1.0)
    return _counted(kernels.runs[:1], ("x", "z", "dy", "h", "dA", "dB"))


def _counted(runs: Sequence[tuple[str, Report]], names: tuple[str, ...]) -> Moved:
    """By all these dispatches, of the same operands."""
    counters = [report.counters for _, report in runs]
    return {
        name: (sum(found.loaded[i] for found in counters), sum(found.stored[i] for found in counters))
        for i, name in enumerate(names)
    }


# ------------------------------------------------------------------------------- the same from the launches alone


def model_decode(case: Case) -> Moved:
    x, weight, bias, A, B, _ = operands_meta(case)
    launches, h_sums = Kernels(case.gpu_cores)._plan_decode(x, weight, bias, A, B, False)
    size, adapter, rows = case.dtype.itemsize, case.adapter_dtype.itemsize, int(launches[0].kernel.decode()[-1])
    # What is read again where the rows do not fill a block or the kernel.
    W_blocks, A_blocks = -(-case.N // W_ROWS), -(-case.r // W_ROWS)
    a_row = case.K * case.bits // 8 or case.K * size
    runs = 4 if rows <= 2 else 2  # that have a scale and a bias together
    scales = W_blocks * W_ROWS * case.K // (8 * runs) * case.scale_bytes if case.bits else 0
    groups = launches[-1].threads[0] // launches[-1].group[0]
    again = launches[0].threads[0] // launches[0].group[0] if h_sums is None else 1
    scratch = 0 if h_sums is None else h_sums.nbytes
    return {
        "x": ((W_blocks + again * A_blocks) * rows * case.K * size, 0),
        "weight": (W_blocks * W_ROWS * a_row, 0),
        "scales": (scales, 0),
        "biases": (64 * groups if case.has_table else scales, 0),
        "bias": (case.M * case.bytes("bias"), 0),
        "lora_A": (again * A_blocks * W_ROWS * case.K * adapter, 0),
        "lora_B": (W_blocks * W_ROWS * case.r * adapter, 0),
        "y": (0, case.bytes("y")),
        "h": (0, 0),
        "partial": (W_blocks * scratch, scratch),
    }


def model_delta(case: Case) -> Moved:
    x, _, _, A, B, y = operands_meta(case)
    down, up = Kernels(case.gpu_cores).plan_delta(y, x, A, B)
    k_splits, column_splits = (launch.threads[0] // launch.group[0] for launch in (down, up))
    rank_blocks = int(down.kernel.decode().split("_")[5])
    partial = 4 * k_splits * case.M * 8 * rank_blocks
    return {
        "x": (case.bytes("x"), 0),
        "lora_A": (down.threads[1] * case.bytes("lora_A"), 0),
        "lora_B": (up.threads[1] * case.bytes("lora_B"), 0),
        "y": (case.bytes("y"), case.bytes("y")),
        "h": (0, 0),
        "partial": (column_splits * partial, partial),
    }


def model_gemm(case: Case, is_backward: bool) -> Moved:
    x, weight, bias, A, B, dy = operands_meta(case)
    arguments = (dy, weight, None, A) if is_backward else (x, weight, bias, B)
    (launch, *_), splits = Kernels(case.gpu_cores)._plan_gemm(is_backward, *arguments, 0.0)
    column_tiles, row_tiles = launch.threads[0] // launch.group[0], launch.threads[1]
    left, _, _, _, _, h, factor, y = GEMM_OPERANDS[is_backward]
    scales = row_tiles * case.N * case.K // 8 * case.scale_bytes if case.bits else 0  # one a run
    groups = column_tiles * row_tiles * splits
    return {
        left: (column_tiles * case.bytes(left), 0),
        "weight": (row_tiles * case.bytes("weight"), 0),
        "scales": (scales, 0),
        "biases": (64 * groups if case.has_table else scales, 0),
        "bias": (0 if is_backward else 16 * row_tiles * case.bytes("bias"), 0),  # by eight lanes of two simdgroups
        h: (column_tiles * case.bytes(h), 0),
        factor: (row_tiles * case.bytes(factor), 0),
        y: (0, splits * case.bytes(y) * (4 // case.dtype.itemsize if splits > 1 else 1)),
    }


def model_grad(case: Case) -> Moved:
    x, _, _, A, B, dy = operands_meta(case)
    launches, splits = Kernels(case.gpu_cores).plan_grad(x, dy, A, B)
    tiles, A_tiles = launches[0].threads[0] // launches[0].group[0], launches[0].words[9] >> 32
    wide = 4 // case.adapter_dtype.itemsize if splits > 1 else 1
    return {
        "x": (case.bytes("x"), 0),
        "z": (A_tiles * case.bytes("z"), 0),
        "dy": (case.bytes("dy"), 0),
        "h": ((tiles - A_tiles) * case.bytes("h"), 0),
        "dA": (0, splits * wide * case.bytes("dA")),
        "dB": (0, splits * wide * case.bytes("dB")),
    }


def operands_meta(case: Case):
    """Shapes without memory: what planning needs."""
    with torch.device("meta"):
        M, K, N, r = case.M, case.K, case.N, case.r
        shapes = ((M, K), (N, K), (N,), (r, K), (N, r), (M, N))
        dtypes = (case.dtype,) * 3 + (case.adapter_dtype,) * 2 + (case.dtype,)
        found = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        found[1] = packed(case, *(torch.empty(N, K // 64, dtype=case.dtype) for _ in range(2))) or found[1]
        return tuple(found)


def total(case: Case | RowCase, moved: Moved) -> int:
    """Bytes requested."""
    return sum(loaded + stored for loaded, stored in moved.values())


def least(case: Case | RowCase, moved: Moved) -> int:
    """Bytes if every operand were loaded and stored once."""
    return sum(case.bytes(name) * ((loaded > 0) + (stored > 0)) for name, (loaded, stored) in moved.items())


# ------------------------------------------------------------------------------------------------- kernels on rows


ROW_OPERATORS = "rms_norm", "rms_norm_backward", "softmax", "softmax_backward"


@dataclasses.dataclass(frozen=True)
class RowCase:
    M: int
    H: int
    dtype: torch.dtype = torch.float16
    weight_dtype: torch.dtype = torch.float16
    gpu_cores: int = 40

    def __str__(self) -> str:
        weight = "" if self.weight_dtype == self.dtype else f" + {_short(self.weight_dtype)}"
        return f"{self.M} x {self.H}, {_short(self.dtype)}{weight}, {self.gpu_cores} cores"

    def bytes(self, operand: str) -> int:
        """Of one operand, read or written once; partial sums need not be."""
        weight = self.H * self.weight_dtype.itemsize
        return {"partial": 0, "rstd": 4 * self.M, "weight": weight, "dweight": weight}.get(
            operand, self.M * self.H * self.dtype.itemsize
        )


def count_rows(operator: str, case: RowCase) -> Moved:
    """Every dispatch of ``rms_norm`` or ``softmax``, or of their ``_backward``."""
    x, grad = (torch.randn(case.M, case.H).to(case.dtype) for _ in range(2))
    weight = torch.randn(case.H).to(case.weight_dtype)
    kernels = RowKernels(case.gpu_cores, trace=True)
    if operator == "rms_norm":
        kernels.rms_norm(x, weight)
        return _counted(kernels.runs, ("x", "weight", "y", "rstd"))
    if operator == "softmax":
        kernels.softmax(x)
        return _counted(kernels.runs, ("x", "y"))
    if operator == "softmax_backward":
        kernels.softmax_backward(grad, x)
        return _counted(kernels.runs, ("grad", "y", "dx"))
    kernels.rms_norm_backward(grad, x, weight, torch.ones(case.M))
    moved = _counted(kernels.runs[:1], ("grad", "x", "weight", "rstd", "dx", "dweight"))
    if len(kernels.runs) == 2:
        loaded, stored = moved["dweight"]
        counters = kernels.runs[1][1].counters
        moved |= {"partial": (loaded + counters.loaded[0], stored), "dweight": (0, counters.stored[2])}
    return moved


def model_rows(operator: str, case: RowCase) -> Moved:
    """The same from the launches alone."""
    M, H = case.M, case.H
    x = torch.empty(M, H, dtype=case.dtype, device="meta")
    weight = torch.empty(H, dtype=case.weight_dtype, device="meta")
    kernels, splits = RowKernels(case.gpu_cores), 1
    if operator == "rms_norm_backward":
        launches, splits = kernels.plan_rms_norm_backward(x, x, weight)
    else:
        launches = {
            "rms_norm": lambda: kernels.plan_rms_norm(x, weight),
            "softmax": lambda: kernels.plan_softmax(x),
            "softmax_backward": lambda: kernels.plan_softmax_backward(x, x),
        }[operator]()
    groups, simdgroups = launches[0].threads[0] // launches[0].group[0], launches[0].group[0] // 32
    *_, row_simdgroups, _, how, _ = launches[0].kernel.decode().split("_")
    slots, held = groups * simdgroups // int(row_simdgroups), how == "held"
    read = {name: ((1 if held else 2) * case.bytes(name), 0) for name in ("x", "grad", "y")}
    written = {name: (0, case.bytes(name)) for name in ("y", "dx")}
    if operator == "softmax":
        return {"x": read["x"], "y": written["y"]}
    if operator == "softmax_backward":
        return {"grad": read["grad"], "y": read["y"], "dx": written["dx"]}
    loads = slots if held else M  # of the weight, in one loop over the row
    if operator == "rms_norm":
        rstd = (0, case.bytes("rstd"))
        return {"x": read["x"], "weight": (loads * case.bytes("weight"), 0), "y": written["y"], "rstd": rstd}
    sums = (0, groups) if held else (M - groups, M)  # rows of sums that the first dispatch reads and writes
    size = 4 if splits > 1 else case.weight_dtype.itemsize
    moved = {
        "grad": read["grad"],
        "x": read["x"],
        "weight": ((1 if held else 2) * loads * case.bytes("weight"), 0),
        "rstd": (int(row_simdgroups) * case.bytes("rstd"), 0),
        "dx": written["dx"],
        "dweight": (sums[0] * H * size, sums[1] * H * size),
    }
    if splits > 1:
        partial = ((sums[0] + splits) * H * size, sums[1] * H * size)
        moved |= {"partial": partial, "dweight": (0, case.bytes("dweight"))}
    return moved


# --------------------------------------------------------------------------------------------------------- report

COUNTED = {
    "lora_decode": (count_decode, [Case(1, 4096, 4096, 16), Case(4, 2048, 2048, 16), Case(1, 512, 512, 8)]),
    "lora_delta": (count_delta, [Case(1024, 512, 512, 16), Case(64, 1024, 1024, 16), Case(16, 1024, 1024, 64)]),
    "lora_decode, packed": (
        count_decode,
        [Case(1, 4096, 4096, 16, bits=bits, has_table=table) for bits, table in ((4, False), (8, False), (4, True))],
    ),
    "lora_gemm": (
        lambda case: count_gemm(case, False),
        [Case(256, 512, 512, 16, bits=4), Case(256, 512, 512, 16), Case(32, 4096, 512, 16, bits=4)],
    ),
    "lora_gemm, backward": (lambda case: count_gemm(case, True), [Case(256, 512, 512, 16, bits=4)]),
    "lora_grad": (count_grad, [Case(1024, 512, 512, 16), Case(64, 1024, 1024, 16)]),
}
COUNTED_ROWS = [
    RowCase(2048, 1024, gpu_cores=8),
    RowCase(512, 4096, torch.bfloat16, torch.float32, 4),
    RowCase(32, 8192),
]


def main() -> None:
    console = Console()
    table = Table(title="Counted by the executor: bytes requested over the least possible; LoRA on 40 cores")
    table.add_column("kernel")
    table.add_column("case")
    table.add_column("by operand, in units of the operand (loaded + stored)")
    table.add_column("total / least", justify="right")
    counts = [(kernel, case, count(case)) for kernel, (count, cases) in COUNTED.items() for case in cases]
    counts += [(operator, case, count_rows(operator, case)) for operator in ROW_OPERATORS for case in COUNTED_ROWS]
    for kernel, case, moved in counts:
        summed = "h" if isinstance(case, Case) else "dweight"  # in parts, of which the least possible has none
        units = {name: case.bytes(name) or case.bytes(summed) for name in moved}
        parts = [f"{name} {(loaded + stored) / units[name]:.4g}" for name, (loaded, stored) in moved.items()]
        table.add_row(kernel, str(case), ", ".join(parts), f"{total(case, moved) / least(case, moved):.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
