"""Do the tests notice? Breaks the kernels of metal/ in one small place at a time: ``python tests/mutation/run.py``.

Each edit is made in a copy of the tree and the kernel tests run there until the first failure. An edit that no test
notices is a survivor; it fails the run unless it stands in EQUIVALENT with the proof that it changes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[2]
# Trace mode first: it finds most in the fewest compilations.
TESTS = (
    ["tests/test_metal_kernels.py", "-k", "trace"],
    ["tests/test_metal_kernels.py", "-k", "not trace"],
    ["tests/test_traffic.py"],
)


@dataclasses.dataclass(frozen=True)
class Edit:
    """The nth occurrence of ``before`` in metal/``file`` becomes ``after``."""

    file: str
    before: str
    after: str
    nth: int = 0

    def apply(self, metal: Path) -> None:
        path = metal / self.file
        parts = path.read_text().split(self.before)
        if len(parts) < self.nth + 2:
            raise SystemExit(f"{self.file}: {self.before!r} does not occur {self.nth + 1} times: update EDITS")
        left, right = self.before.join(parts[: self.nth + 1]), self.before.join(parts[self.nth + 1 :])
        path.write_text(left + self.after + right)

    def __str__(self) -> str:
        occurrence = f" ({self.nth + 1})" if self.nth else ""
        return f"{self.file}{occurrence}: {self.before.strip()!r} -> {self.after.strip()!r}"


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
DELTA, DECODE, GRAD = "lora_delta.metal", "lora_decode.metal", "lora_grad.metal"
EDITS = [
    # operands.h: bounds, strides, casts
    Edit("operands.h", "ulong(row / inner) * outer_stride", "ulong(row / inner) * row_stride"),
    Edit("operands.h", "ulong(row % inner) * row_stride", "ulong(row % inner) * col_stride"),
    Edit("operands.h", "data + level + ulong(col) * col_stride", "data + level + col"),
    Edit("operands.h", "count >= uint(RUN)", "count >= uint(RUN - 1)"),
    Edit("operands.h", "count >= uint(RUN)", "count >= uint(RUN - 1)", 1),
    Edit("operands.h", "uint(i) < count", "uint(i) <= count"),
    Edit("operands.h", "uint(i) < count", "uint(i) <= count", 1),
    Edit("operands.h", "uint(i) < count", "uint(i) <= count", 2),
    Edit("operands.h", "run.high = float4(quads[1])", "run.high = float4(quads[0])"),
    Edit("operands.h", "quads[1] = vec<T, 4>(run.high)", "quads[0] = vec<T, 4>(run.high)"),
    Edit("operands.h", "source.inner >= source.rows", "source.inner <= source.rows"),
    Edit("operands.h", "begin < end ? end - begin : 0", "end - begin"),
    # dropout.h
    Edit("dropout.h", "round < 10", "round < 9"),
    Edit("dropout.h", "high.y ^ counter.y ^ key.x", "high.x ^ counter.y ^ key.x"),
    Edit("dropout.h", "uint(counter >> 32)", "0u"),
    Edit("dropout.h", "rotate(words[i], 16u) >=", "words[i] >="),
    Edit("dropout.h", "words[i] >= threshold", "words[i] > threshold"),
    Edit("dropout.h", "first / RUN + 1", "first / RUN"),
    Edit("dropout.h", ">> shift;", ">> (shift + 1);"),
    Edit("dropout.h", "value * inverse_keep", "value"),
    Edit("dropout.h", "run.get(i) * inverse_keep", "run.get(i)"),
    # tiles.h
    Edit("tiles.h", "stride = COLS + PADDING", "stride = COLS"),
    Edit("tiles.h", "stride, ulong2(0), true", "stride, ulong2(0), false"),
    Edit("tiles.h", "row + r < source.rows ?", "row + r <= source.rows ?"),
    Edit("tiles.h", "col + c < source.cols ?", "col + c <= source.cols ?"),
    Edit("tiles.h", "* source.cols + col + c", "* source.cols + c"),
    Edit("tiles.h", "i += THREADS", "i += 2 * THREADS"),
    Edit("tiles.h", "*at(r + j, c) =", "*at(r, c + j) ="),
    # lora_delta.metal
    Edit(DELTA, BARRIER, ""),
    Edit(DELTA, BARRIER, "", 1),
    Edit(DELTA, BARRIER, "", 2),
    Edit(DELTA, BARRIER, "", 3),
    Edit(DELTA, BARRIER, "", 4),
    Edit(DELTA, BARRIER, "", 5),
    Edit(DELTA, BARRIER, "", 6),
    Edit(DELTA, BARRIER, "", 7),
    Edit(DELTA, "simdgroup_index / K_SLICES * 8", "simdgroup_index % ROW_BLOCKS * 8"),
    Edit(DELTA, "block += 8 * K_SLICES", "block += 8"),
    Edit(DELTA, "k < K; k += WIDTH", "k + WIDTH <= K; k += WIDTH"),
    Edit(DELTA, "sum += rank_floats[s", "sum = rank_floats[s"),
    Edit(DELTA, "s < K_SLICES", "s < K_SLICES - 1"),
    Edit(DELTA, "m < M && rank < rank_count", "m < M"),
    Edit(DELTA, "m < M && rank < rank_count", "rank < rank_count"),
    Edit(DELTA, "&& group.x == 0", ""),
    Edit(DELTA, "(first + i / PART) * 8", "(i / PART) * 8"),
    Edit(DELTA, "float4(scaling)", "float4(1.0f)"),
    Edit(DELTA, "float4(scaling)", "float4(1.0f)", 1),
    Edit(DELTA, "fma(delta.low, float4(scaling), sum.low)", "delta.low * scaling"),
    Edit(DELTA, "ulong(m) * N + n", "ulong(m) * N"),
    Edit(DELTA, "m < M && n < column_end", "m <= M && n < column_end"),
    Edit(DELTA, "column_end - n", "N - n"),
    Edit(DELTA, "min(N, column_begin + n_columns.y)", "column_begin + n_columns.y"),
    Edit(DELTA, "lora_B + ulong(ranks.x) * B_strides.y", "lora_B"),
    Edit(DELTA, "lora_A + ulong(ranks.x) * A_strides.x", "lora_A"),
    Edit(DELTA, "stream_h_stride.y + ranks.x + rank", "stream_h_stride.y + rank"),
    # lora_decode.metal
    Edit(DECODE, BARRIER, ""),
    Edit(DECODE, BARRIER, "", 1),
    Edit(DECODE, BARRIER, "", 2),
    Edit(DECODE, "if (j < row_count)", "if (true)"),
    Edit(DECODE, "k += 32 * VECTOR", "k += 16 * VECTOR"),
    Edit(DECODE, "uint k = lane * VECTOR", "uint k = lane"),
    Edit(DECODE, "first == 0 ? sum : total + sum", "sum"),
    Edit(DECODE, "&& group == 0", ""),
    Edit(DECODE, "uint rank = lane", "uint rank = 0"),
    Edit(DECODE, "scaling * float(B_row", "float(B_row"),
    Edit(DECODE, "!= 0 && lane == 0", "!= 0"),
    Edit(DECODE, "if (K > CHUNK)", "if (false)"),
    Edit(DECODE, "ulong(n) * W_strides.x + ulong(first) * W_strides.y", "ulong(n) * W_strides.x"),
    Edit(DECODE, "ulong(n + j) * flags_bias_stride.y", "(n + j)"),
    Edit(DECODE, "float(*x.at(m, first + k))", "float(*x.at(m, k))"),
    # lora_grad.metal
    Edit(GRAD, BARRIER, ""),
    Edit(GRAD, BARRIER, "", 1),
    Edit(GRAD, BARRIER, "", 2),
    Edit(GRAD, "simdgroup_barrier(mem_flags::mem_threadgroup);", ""),
    Edit(GRAD, "simdgroup_barrier(mem_flags::mem_threadgroup);", "", 1),
    Edit(GRAD, "row < big.rows; row += DEPTH", "row + DEPTH <= big.rows; row += DEPTH"),
    Edit(GRAD, "min(rows.x, row + rows.y)", "rows.x"),
    Edit(GRAD, "scaling * block", "block"),
    Edit(GRAD, "matrix(h + rank", "matrix(h"),
    Edit(GRAD, "matrix(z + rank", "matrix(z"),
    Edit(GRAD, "n < columns && j < ranks.y", "j < ranks.y"),
    Edit(GRAD, "n < columns && j < ranks.y", "n < columns"),
    Edit(GRAD, "ulong(group.y) * r_tiles.x * columns", "0"),
    Edit(GRAD, "(simdgroup_index * BLOCKS + c) * 8", "(simdgroup_index + c) * 8"),
    Edit(GRAD, "sum += partial", "sum = partial"),
    Edit(GRAD, "split < splits.x", "split + 1 < splits.x"),
]
EQUIVALENT: dict[Edit, str] = {}


def copy(source: Path, target: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "build", ".hypothesis")
    for name in ("metal", "csrc", "tests"):
        shutil.copytree(source / name, target / name, ignore=ignore)
    shutil.copy(source / "pyproject.toml", target)


def first_failure(snapshot: Path, edit: Edit | None) -> str | None:
    """The first test that fails with the edit made, or None where all pass."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy(snapshot, tree)
        if edit is not None:
            edit.apply(tree / "metal")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the package comes from this tree
        for tests in TESTS:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
            if done.returncode == 1:
                return next(line for line in done.stdout.splitlines() if line.startswith("FAILED")).split("::")[-1]
            if done.returncode != 0:
                raise SystemExit(f"{edit}: pytest could not run\n{done.stdout}{done.stderr}")
    return None


def run(edits: list[Edit], jobs: int, console: Console) -> list[Edit]:
    """The edits that no test notices."""
    survivors = []
    with tempfile.TemporaryDirectory() as snapshot, ThreadPoolExecutor(jobs) as pool:
        copy(ROOT, Path(snapshot))
        if failed := first_failure(Path(snapshot), None):
            raise SystemExit(f"{failed} fails without any edit")
        results = pool.map(lambda edit: first_failure(Path(snapshot), edit), edits)
        for edit, test in track(zip(edits, results, strict=True), "mutations", len(edits), console=console):
            verdict = f"caught by {test}" if test else EQUIVALENT.get(edit, "SURVIVED")
            console.print(f"{edit}\n    {verdict}", markup=False, highlight=False, soft_wrap=True)
            if test is None:
                survivors.append(edit)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="edits whose description contains this")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    options = parser.parse_args()
    edits = [edit for edit in EDITS if options.only in str(edit)]
    console = Console()
    survivors = run(edits, options.jobs, console)
    proven = [edit for edit in survivors if edit in EQUIVALENT]
    console.print(f"{len(edits) - len(survivors)} of {len(edits)} caught, {len(proven)} proven equivalent")
    return int(len(survivors) > len(proven))


if __name__ == "__main__":
    sys.exit(main())
