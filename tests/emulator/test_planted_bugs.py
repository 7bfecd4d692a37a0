"""The executor, tested: small kernels that are right, and planted bugs that it must find on the right line.

A bug is an edit of a kernel. In trace mode it must give a finding of its kind on its line. What fast mode makes of it
is documented too: ``wrong`` numbers, ``stops`` with an ExecutionError, or ``right`` numbers that only trace mode
mistrusts. The kernels themselves must give right numbers in every lane order and no finding. What is refused before it
runs stands in test_metal_refusals.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch

from tests.emulator import metal_on_cpu as moc

HEADER = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
TILE_FENCE = "barrier(mem_flags::mem_threadgroup);"
DEVICE_FENCE = "barrier(mem_flags::mem_device);"
BARRIER = f"threadgroup_{TILE_FENCE}"


def ramp(*shape: int) -> torch.Tensor:
    """1, 2, 3, ...: sums of a few are exact in float32."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@dataclass(frozen=True)
class Program:
    """A kernel, the dispatch that runs it (buffers: x, y, further bytes) and what y must hold."""

    source: str
    x: torch.Tensor
    y: torch.Tensor
    threads: int
    group: int
    more: tuple[bytes, ...] = ()

    @property
    def name(self) -> str:
        return re.search(r"void (\w+)\(", self.source)[1]

    def run(self, kernel: moc.Kernel, **options) -> tuple[moc.Report, torch.Tensor]:
        y = torch.full_like(self.y, torch.nan)
        arguments = [self.x.clone(), y, *self.more]
        report = kernel.dispatch(threads=(self.threads, 1, 1), group=(self.group, 1, 1), arguments=arguments, **options)
        return report, y


REVERSE = Program(
    """
[[kernel]] void reverse(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                        constant uint* shape [[buffer(2)]], uint i [[thread_position_in_grid]],
                        uint t [[thread_index_in_threadgroup]]) {
    threadgroup float tile[64];
    tile[t] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = tile[shape[0] - 1 - t];
}
""",
    x=ramp(2, 64),
    y=ramp(2, 64).flip(1),
    threads=128,
    group=64,
    more=((64).to_bytes(4, "little"),),
)

ROW_SUM = Program(
    """
[[kernel]] void row_sum(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                        constant uint& columns [[buffer(2)]], uint row [[threadgroup_position_in_grid]],
                        uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]]) {
    threadgroup float partial[4];
    float sum = 0;
    for (uint column = t; column < columns; column += 128) {
        sum += x[row * columns + column];
    }
    sum = simd_sum(sum);
    if (lane == 0) {
        partial[simdgroup] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t == 0) {
        y[row] = partial[0] + partial[1] + partial[2] + partial[3];
    }
}
""",
    x=ramp(4, 200),
    y=ramp(4, 200).sum(1),
    threads=4 * 128,
    group=128,
    more=((200).to_bytes(4, "little"),),
)

# Each row is the sum of the tiles of x, reversed: the tile is written again while others may still read it.
TILES = Program(
    """
[[kernel]] void tiles(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                      uint t [[thread_index_in_threadgroup]]) {
    threadgroup float tile[64];
    float sum = 0;
    for (uint k = 0; k < 4; ++k) {
        tile[t] = x[k * 64 + t];
        threadgroup_barrier(mem_flags::mem_threadgroup);  // filled
        sum += tile[63 - t];
        threadgroup_barrier(mem_flags::mem_threadgroup);  // read
    }
    y[t] = sum;
}
""",
    x=ramp(4, 64),
    y=ramp(4, 64).flip(1).sum(0),
    threads=64,
    group=64,
)

# Each simdgroup rotates its own 32 elements by one.
ROTATE = Program(
    """
[[kernel]] void rotate_lanes(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                       uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    threadgroup float tile[64];
    tile[t] = x[t];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    y[t] = tile[t - lane + (lane + 1) % 32];
}
""",
    x=ramp(2, 32),
    y=ramp(2, 32).roll(-1, 1),
    threads=64,
    group=64,
)

# The same by threadgroup, through device memory.
EXCHANGE = Program(
    """
[[kernel]] void exchange(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                         uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    y[i] = x[i];
    threadgroup_barrier(mem_flags::mem_device);  // written
    const float next = y[i - t + (t + 1) % 64];
    threadgroup_barrier(mem_flags::mem_device);  // read
    y[i] = next;
}
""",
    x=ramp(2, 64),
    y=ramp(2, 64).roll(-1, 1),
    threads=128,
    group=64,
)

SQUARE = Program(
    """
[[kernel]] void square(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                       uint lane [[thread_index_in_simdgroup]]) {
    simdgroup_float8x8 matrix, product;
    simdgroup_load(matrix, x, 8);
    simdgroup_multiply(product, matrix, matrix);
    simdgroup_store(product, y, 8);
}
""",
    x=ramp(8, 8),
    y=ramp(8, 8) @ ramp(8, 8),
    threads=32,
    group=32,
)

# Two tiles, reached by index and by pointer, and an array of each thread.
PAIRS = Program(
    """
[[kernel]] void pairs(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                      uint t [[thread_index_in_threadgroup]]) {
    threadgroup float low[4][8];
    threadgroup float high[4][8];
    const threadgroup float* lows = &low[0][0];
    low[t / 8][t % 8] = x[t];
    high[t / 8][t % 8] = x[t + 32];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float both[2] = {lows[31 - t], high[t / 16][7 - t % 8]};
    y[t] = both[t & 1] + both[1 - (t & 1)];
}
""",
    x=ramp(64),
    y=ramp(32).flip(0) + 32 + (8 * (torch.arange(32) // 16) + 8 - torch.arange(32) % 8),
    threads=32,
    group=32,
)

# Seven elements of two bytes: the last 16 bytes are not full, and no guard page is near.
COPY = Program(
    """
[[kernel]] void copy(device const bfloat* x [[buffer(0)]], device bfloat* y [[buffer(1)]],
                     constant uint& count [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    if (i < count) {
        y[i] = x[i];
    }
}
""",
    x=ramp(7).bfloat16(),
    y=ramp(7).bfloat16(),
    threads=32,
    group=32,
    more=((7).to_bytes(4, "little"),),
)

PROGRAMS = [REVERSE, ROW_SUM, TILES, ROTATE, EXCHANGE, SQUARE, PAIRS, COPY]


@dataclass(frozen=True)
class Bug:
    """``right`` in the program's source becomes ``wrong``; a finding of one of ``kinds`` names a line with ``at``."""

    program: Program
    what: str
    right: str
    wrong: str
    kinds: str
    at: str
    fast: str
    source: str = field(init=False)

    def __post_init__(self) -> None:
        assert self.program.source.count(self.right) == 1
        object.__setattr__(self, "source", self.program.source.replace(self.right, self.wrong))

    @property
    def name(self) -> str:
        return f"{self.program.name}: {self.what}"


UNORDERED = "race or uninitialised"  # a read that may come before the write: which of the two depends on the order

# fmt: off
BUGS = [
    # ---- a barrier that is missing, or that orders other memory
    Bug(REVERSE, "no barrier", BARRIER, "", UNORDERED, "y[i] =", "wrong"),
    Bug(ROW_SUM, "no barrier", BARRIER, "", UNORDERED, "y[row] =", "wrong"),
    Bug(TILES, "no barrier after the reads", f"{BARRIER}  // read", "", "race", "tile[t] =", "wrong"),
    Bug(ROTATE, "no simdgroup barrier", f"simdgroup_{TILE_FENCE}", "", UNORDERED, "y[t] =", "wrong"),
    Bug(EXCHANGE, "no barrier after the writes", f"threadgroup_{DEVICE_FENCE}  // written", "", "race", "y[", "wrong"),
    Bug(REVERSE, "barrier of device memory", TILE_FENCE, DEVICE_FENCE, "race", "y[i] =", "right"),
    Bug(REVERSE, "barrier of no memory", TILE_FENCE, "barrier(mem_flags::mem_none);", "race", "y[i] =", "right"),
    Bug(ROTATE, "simdgroup barrier of device memory", TILE_FENCE, DEVICE_FENCE, "race", "y[t] =", "right"),
    Bug(EXCHANGE, "barrier of threadgroup memory", f"{DEVICE_FENCE}  // written", TILE_FENCE, "race", "next =",
        "right"),
    Bug(ROTATE, "simdgroup barrier across simdgroups", "t - lane + (lane + 1) % 32", "(t + 1) % 64", UNORDERED,
        "y[t] =", "wrong"),
    # ---- several threads store the same value
    Bug(ROW_SUM, "every lane stores the partial sum", "lane == 0", "true", "race", "partial[simdgroup] =", "right"),
    Bug(ROW_SUM, "every thread stores the sum", "t == 0", "true", "race", "y[row] =", "right"),
    # ---- races between threadgroups
    Bug(ROW_SUM, "every group stores y[0]", "y[row] =", "y[0] =", "group-race", "y[0] =", "wrong"),
    Bug(ROW_SUM, "pairs of groups share y", "y[row] =", "y[row / 2] =", "group-race", "y[row / 2] =", "wrong"),
    Bug(EXCHANGE, "every group stores the same", "y[i] = next;", "y[i] = next;\n    if (t == 0) y[0] = 2;",
        "group-race", "y[", "right"),
    Bug(EXCHANGE, "loads what another group stores", "i - t + (t + 1) % 64", "(i + 1) % 128", "group-race", "y[",
        "wrong"),
    Bug(ROW_SUM, "loads what another group stores", "partial[3];", "partial[3] + 0 * y[(row + 1) % 4];", "group-race",
        "y[row] =", "wrong"),
    Bug(ROW_SUM, "one group loads what another stores", "partial[3];", "partial[3] + (row == 3 ? 0 * y[0] : 0);",
        "group-race", "y[row] =", "right"),
    # ---- uninitialised threadgroup memory
    Bug(REVERSE, "one element unwritten", "tile[t] =", "if (t != 5) tile[t] =", "uninitialised", "y[i] =", "wrong"),
    Bug(ROW_SUM, "one sum unwritten", "lane == 0", "lane == 0 && t < 96", "uninitialised", "y[row] =", "wrong"),
    Bug(ROW_SUM, "unwritten, result untouched", "y[row] =",
        "threadgroup float spare[1];\n        y[row] = (spare[0] == 5) +", "uninitialised", "spare[0]", "right"),
    # ---- overruns
    Bug(REVERSE, "device store, one past", "y[i] =", "y[i + 1] =", "out-of-bounds", "y[i + 1] =", "stops"),
    Bug(REVERSE, "device store, far past", "y[i] =", "y[i + 4096] =", "out-of-bounds", "y[i + 4096] =", "stops"),
    Bug(REVERSE, "device store, one before", "y[i] =", "y[int(i) - 1] =", "out-of-bounds", "y[int(i) - 1] =", "wrong"),
    Bug(REVERSE, "device load, one past", "x[i]", "x[i + 1]", "out-of-bounds", "tile[t] =", "stops"),
    Bug(REVERSE, "device load, far past", "x[i]", "x[i + 4096]", "out-of-bounds", "tile[t] =", "stops"),
    Bug(SQUARE, "matrix load, one past", "x, 8", "x + 1, 8", "out-of-bounds", "simdgroup_load", "stops"),
    Bug(SQUARE, "matrix store, wrong stride", "y, 8", "y, 9", "out-of-bounds", "simdgroup_store", "stops"),
    Bug(REVERSE, "threadgroup store, one past", "tile[t] =", "tile[t + 1] =", "out-of-bounds", "tile[t + 1]", "wrong"),
    Bug(REVERSE, "threadgroup load, one past", "- 1 - t]", "- t]", "out-of-bounds", "y[i] =", "wrong"),
    Bug(REVERSE, "threadgroup load, far past", "- 1 - t]", "+ 200 - t]", "out-of-bounds", "y[i] =", "wrong"),
    Bug(REVERSE, "device load, megabytes past", "x[i]", "x[i + (1u << 20)]", "out-of-bounds", "tile[t] =", "stops"),
    Bug(REVERSE, "device store, gigabytes past", "y[i] =", "y[i + 0xf0000000] =", "out-of-bounds", "y[i +", "stops"),
    Bug(COPY, "short tail, one past", "i < count", "i <= count", "out-of-bounds", "y[i] =", "right"),
    Bug(COPY, "short tail, wide load", "y[i] = x[i];",
        "bfloat4 v = ((device const bfloat4*)x)[i / 4];\n        y[i] = v[0] + v[1] + v[2] + v[3];", "out-of-bounds",
        "bfloat4 v =", "wrong"),
    Bug(PAIRS, "threadgroup load by pointer, one past", "31 - t]", "32 - t]", "out-of-bounds", "both[2] =", "wrong"),
    Bug(PAIRS, "threadgroup load by pointer, in the other array", "31 - t]", "32 + 8 * 32 + t]", "out-of-bounds",
        "both[2] =", "wrong"),
    Bug(PAIRS, "end of a row, inside the tile", "7 - t % 8]", "8 - t % 8]", "out-of-bounds", "both[2] =", "wrong"),
    Bug(PAIRS, "array of a thread, one past", "both[1 -", "both[2 -", "out-of-bounds", "y[t] =", "wrong"),
    Bug(REVERSE, "constant load, one past", "shape[0]", "shape[1]", "out-of-bounds", "y[i] =", "stops"),
    Bug(REVERSE, "constant load, far past", "shape[0]", "shape[4096]", "out-of-bounds", "y[i] =", "stops"),
    # ---- divergence
    Bug(REVERSE, "one simdgroup skips the barrier", BARRIER, f"if (t < 32) {BARRIER}", "divergent-barrier", BARRIER,
        "stops"),
    Bug(REVERSE, "one lane skips the barrier", BARRIER, f"if (t != 3) {BARRIER}", "divergent-barrier", BARRIER,
        "stops"),
    Bug(REVERSE, "two barriers for one", BARRIER, f"if (t < 32) {{ {BARRIER} }}\n    else {{ {BARRIER} }}",
        "divergent-barrier", BARRIER, "stops"),
    Bug(ROTATE, "one lane skips the simdgroup barrier", "simdgroup_barrier", "if (lane) simdgroup_barrier",
        "divergent-barrier", "simdgroup_barrier", "stops"),
    Bug(ROW_SUM, "half of the lanes sum", "sum = simd", "if (lane < 16) sum = simd", "divergent-simd", "simd_sum",
        "stops"),
    Bug(ROW_SUM, "other half of the lanes sum", "sum = simd", "if (lane > 15) sum = simd", "divergent-simd", "simd_sum",
        "stops"),
    Bug(ROW_SUM, "sum in a loop that lanes leave", "sum += x[row * columns + column]",
        "sum += simd_sum(x[row * columns + column])", "divergent-simd", "simd_sum", "stops"),
    Bug(SQUARE, "one lane does not store", "simdgroup_store", "if (lane) simdgroup_store", "divergent-simd",
        "simdgroup_store", "stops"),
    Bug(SQUARE, "lanes load from different places", "matrix, x, 8", "matrix, x + lane / 31, 8", "divergent-simd",
        "simdgroup_load", "stops"),
]
# fmt: on


def numbered(index: int) -> str:
    return f"bug_{index}"


@pytest.fixture(scope="module")
def right() -> moc.Library:
    return moc.compile(HEADER + "".join(program.source for program in PROGRAMS), "programs", strict=True)


@pytest.fixture(scope="module")
def wrong() -> tuple[moc.Library, dict[int, str]]:
    """All the bugs in one library, and its source by line."""
    source = HEADER
    for index, bug in enumerate(BUGS):
        source += re.sub(r"void \w+\(", f"void {numbered(index)}(", bug.source, count=1)
    return moc.compile(source, "bugs", strict=True), dict(enumerate(source.split("\n"), 1))


each_bug = pytest.mark.parametrize("index", range(len(BUGS)), ids=[bug.name for bug in BUGS])
each_program = pytest.mark.parametrize("program", PROGRAMS, ids=[program.name for program in PROGRAMS])


@each_program
def test_repaired(program: Program, right: moc.Library) -> None:
    for order in ("forward", "reverse", "permuted"):
        for trace in (False, True):
            report, y = program.run(right[program.name], order=order, trace=trace)
            assert report.findings == []
            assert torch.equal(y, program.y)


@each_bug
def test_trace_finds(index: int, wrong: tuple[moc.Library, dict[int, str]]) -> None:
    bug, (library, lines) = BUGS[index], wrong
    for order in ("forward", "reverse", "permuted"):
        report, _ = bug.program.run(library[numbered(index)], order=order, trace=True)
        matching = [finding for finding in report.findings if finding.kind in bug.kinds.split(" or ")]
        assert matching, report.findings
        assert any(bug.at in lines[finding.line] for finding in matching), matching
        assert all(finding.kernel == numbered(index) for finding in matching)


@each_bug
def test_fast(index: int, wrong: tuple[moc.Library, dict[int, str]]) -> None:
    bug, kernel = BUGS[index], wrong[0][numbered(index)]
    if bug.fast == "stops":
        with pytest.raises(moc.ExecutionError):
            bug.program.run(kernel)
        return
    report, y = bug.program.run(kernel)
    assert report.findings == []
    assert torch.equal(y, bug.program.y) == (bug.fast == "right")
