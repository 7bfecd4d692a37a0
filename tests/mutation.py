"""Do the tests notice? Breaks the kernels of metal/ in one small place at a time: ``python -m tests.mutation``.

Each edit is made on the way into the compiler, in a process of its own, and the kernel tests run there until the first
failure. An edit that no test notices is a survivor; it fails the run unless it stands in EQUIVALENT with the proof that
it changes nothing. So does an edit that no longer applies or does not compile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import track

from tests import ROOT
from tests.emulator import metal_on_cpu

METAL = ROOT / "metal"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
DELTA, DECODE, GRAD, SUM = "lora_delta.metal", "lora_decode.metal", "lora_grad.metal", "sum_splits.metal"
GEMM, WEIGHTS = "lora_gemm.metal", "weights.h"
ROWS, NORM, SOFTMAX = "rows.h", "rms_norm.metal", "softmax.metal"
# What tests a kernel, for pytest. Trace mode first: it finds most in the fewest compilations.
Stages = tuple[tuple[str, ...], ...]
LORA_TESTS: Stages = (
    ("test_metal_kernels.py", "-k", "trace"),
    ("test_metal_kernels.py", "-k", "not trace"),
    ("test_traffic.py",),
)
PACKED_TESTS: Stages = (
    ("test_quantized_kernels.py", "-k", "trace"),
    ("test_quantized_kernels.py", "-k", "not trace"),
    ("test_traffic.py", "-k", "packed"),
)
ROW_TESTS: Stages = (
    ("test_row_kernels.py", "-k", "trace"),
    ("test_row_kernels.py", "-k", "not trace"),
    ("test_traffic.py", "-k", "row"),
)


@dataclasses.dataclass(frozen=True)
class Edit:
    """The nth occurrence of ``before`` in metal/``file`` becomes ``after``."""

    file: str
    before: str
    after: str
    nth: int = 0

    @property
    def tests(self) -> Stages:
        if self.file in (GEMM, WEIGHTS):
            return PACKED_TESTS
        if self.file == DECODE:
            return LORA_TESTS + PACKED_TESTS[:2]
        if self.file == SUM:  # of two results, and of many parts
            return LORA_TESTS[:1] + ROW_TESTS[1:2]
        return ROW_TESTS if self.file in (ROWS, NORM, SOFTMAX) else LORA_TESTS

    def apply(self, source: str) -> str:
        """The edit in an assembled source; what does not contain the file comes back as it is."""
        text = (METAL / self.file).read_text()
        text = text[text.index("\n\n", text.rindex("#include")) :]  # as it stands in assembled sources
        parts = text.split(self.before)
        if len(parts) < self.nth + 2:
            raise ValueError(f"{self}: does not apply")
        edited = self.before.join(parts[: self.nth + 1]) + self.after + self.before.join(parts[self.nth + 1 :])
        return source.replace(text, edited)

    def __str__(self) -> str:
        occurrence = f" ({self.nth + 1})" if self.nth else ""
        return f"{self.file}{occurrence}: {self.before.strip()!r} -> {self.after.strip()!r}"


EDITS = [
    # operands.h: bounds, strides, casts
    Edit("operands.h", "ulong(row / inner) * outer_stride", "ulong(row / inner) * row_stride"),
    Edit("operands.h", "ulong(row % inner) * row_stride", "ulong(row % inner) * col_stride"),
    Edit("operands.h", "data + level + ulong(col) * col_stride", "data + level + col"),
    Edit("operands.h", "ulong(row / inner)", "(row / inner)"),
    Edit("operands.h", "ulong(row % inner)", "(row % inner)"),
    Edit("operands.h", "ulong(row) * row_stride", "row * row_stride"),
    Edit("operands.h", "if (row >= inner)", "if (row > inner)"),
    Edit("operands.h", "source += stride;", "++source;"),
    Edit("operands.h", "first + i < splits ?", "first + i <= splits ?"),
    Edit("operands.h", "sum += parts[i]", "sum = parts[i]"),
    Edit("operands.h", "source += TOGETHER * stride", "source += stride"),
    Edit("operands.h", "ulong(col) * col_stride", "col * col_stride"),
    Edit("operands.h", "count >= uint(RUN)", "count >= uint(RUN - 1)"),
    Edit("operands.h", "count >= uint(RUN)", "count >= uint(RUN - 1)", 1),
    Edit("operands.h", "uint(i) < count", "uint(i) <= count"),
    Edit("operands.h", "uint(i) < count", "uint(i) <= count", 1),
    Edit("operands.h", "uint(i) < count", "uint(i) <= count", 2),
    Edit("operands.h", "as_type<vec<T, 4>>(raw.zw)", "as_type<vec<T, 4>>(raw.xy)"),
    Edit("operands.h", "uint4(low, high)", "uint4(low, low)"),
    Edit("operands.h", "matrix.inner >= matrix.rows", "matrix.inner <= matrix.rows"),
    Edit("operands.h", "begin < end ? end - begin : 0", "end - begin"),
    Edit("operands.h", "level_row += rows;", ""),
    Edit("operands.h", "data += next_level;", ""),
    # dropout.h
    Edit("dropout.h", "round < 7", "round < 6"),
    Edit("dropout.h", "high.y ^ counter.y ^ key.x", "high.x ^ counter.y ^ key.x"),
    Edit("dropout.h", "uint(counter >> 32)", "0u"),
    Edit("dropout.h", "rotate(words[i], 16u) >=", "words[i] >="),
    Edit("dropout.h", "words[i] >= threshold", "words[i] > threshold"),
    Edit("dropout.h", "first / RUN + 1", "first / RUN"),
    Edit("dropout.h", ">> shift;", ">> (shift + 1);"),
    Edit("dropout.h", "value * inverse_keep", "value"),
    Edit("dropout.h", "run.get(i) * inverse_keep", "run.get(i)"),
    # tiles.h
    Edit("tiles.h", "stride = COLS + 16 / sizeof(E)", "stride = COLS"),
    Edit("tiles.h", "stride, ulong2(0), true", "stride, ulong2(0), false"),
    Edit("tiles.h", "r < source.rows ?", "r <= source.rows ?"),
    Edit("tiles.h", "c < source.cols ?", "c <= source.cols ?"),
    Edit("tiles.h", "* matrix.cols + first_col + inside.y", "* matrix.cols + inside.y"),
    Edit("tiles.h", "thread_index + turn * THREADS;", "thread_index + 2 * turn * THREADS;"),
    Edit("tiles.h", "place += tile.stride", "place += 1"),
    Edit("tiles.h", "data -= source.across(columns)", "data -= columns"),
    Edit("tiles.h", "col -= columns;", ""),
    Edit("tiles.h", "col += COLS;", ""),
    Edit("tiles.h", "WHOLE ? LAYOUT == Layout::rows :", "WHOLE ? true :"),
    Edit("tiles.h", "data += ulong(ROWS) * source.row_stride", "data += ROWS"),
    Edit(
        "operands.h",
        "if (count > 0) {\n      run = fetch_eight(source);",
        "if (true) {\n      run = fetch_eight(source);",
    ),
    Edit("tiles.h", "row += ROWS;", ""),
    Edit("tiles.h", "elements[turn] += COLS;", ""),
    Edit("tiles.h", "elements[turn] += ulong(ROWS) * source.cols;", ""),
    # lora_delta.metal
    Edit(DELTA, BARRIER, ""),
    Edit(DELTA, BARRIER, "", 1),
    Edit(DELTA, BARRIER, "", 2),
    Edit(DELTA, BARRIER, "", 3),
    Edit(DELTA, BARRIER, "", 4),
    Edit(DELTA, BARRIER, "", 5),
    Edit(DELTA, BARRIER, "", 6),
    Edit(DELTA, "simdgroup_index / K_SLICES % RANK_GROUPS", "0"),
    Edit(DELTA, "simdgroup_index / (K_SLICES * RANK_GROUPS) * (BLOCKS * BLOCK)", "0"),
    Edit(DELTA, "if (k + WIDTH < k_end)", "if (true)"),
    Edit(DELTA, "if (k + WIDTH < k_end)", "if (k + 2 * WIDTH < k_end)"),
    Edit(DELTA, "k < k_end; k += WIDTH", "k + WIDTH <= k_end; k += WIDTH"),
    Edit(DELTA, "block += BLOCK * K_SLICES", "block += BLOCK"),
    Edit(DELTA, "first_row + BLOCK * b, block", "first_row, block"),
    Edit(DELTA, "(rank_group * OWN + i) * BLOCK, block", "i * BLOCK, block"),
    Edit(DELTA, "if (first + i < OWN)", "if (true)"),
    Edit(DELTA, "(first_row + BLOCK * b) * ACROSS", "first_row * ACROSS"),
    Edit(DELTA, "+ rank_group * SHARE + BLOCK * i", "+ BLOCK * i"),
    Edit(DELTA, "floats + slice * PART + place", "floats + place"),
    Edit(DELTA, "s < K_SLICES", "s < K_SLICES - 1"),
    Edit(DELTA, "sum += memory[s", "sum = memory[s"),
    Edit(DELTA, "rank = first * BLOCK + 4 * i % SHARE", "rank = 4 * i % SHARE"),
    Edit(DELTA, "row + m < x.rows && rank < OWN * BLOCK", "rank < OWN * BLOCK"),
    Edit(DELTA, "row + m < x.rows && rank < OWN * BLOCK", "row + m < x.rows"),
    Edit(DELTA, "(share * OWN * BLOCK + rank) / 4", "rank / 4"),
    Edit(DELTA, "BTile::size + (HELD ? 0 : SumTile::size)", "BTile::size"),
    Edit(DELTA, "r + STEP * turn < ROWS && m + STEP * turn < M", "m + STEP * turn < M"),
    Edit(DELTA, "r + STEP * turn < ROWS && m + STEP * turn < M", "r + STEP * turn < ROWS"),
    Edit(DELTA, "sum_tile.run(r + STEP * turn, c)", "sum_tile.run(r, c)"),
    Edit(DELTA, "dropout.apply(delta, element + turn * step)", "dropout.apply(delta, element)"),
    Edit(DELTA, "store_run<WHOLE>(target + turn * step", "store_run<WHOLE>(target"),
    Edit(DELTA, "if (row + h_row < M)", "if (true)"),
    Edit(DELTA, "save_h && uint(rank + j) < B.cols", "uint(rank + j) < B.cols"),
    Edit(DELTA, "save_h && uint(rank + j) < B.cols", "save_h"),
    Edit(DELTA, "partial + ulong(row) * RANKS", "partial"),
    Edit(DELTA, "ulong(M) * (RANKS / 4)", "(RANKS / 4)"),
    Edit(DELTA, "if (Sizes::HELD)", "if (false)"),
    Edit(DELTA, "if (!Sizes::HELD)", "if (false)"),
    Edit(DELTA, "first_row + BLOCK * b, rank + BLOCK * i", "first_row, rank + BLOCK * i"),
    Edit(DELTA, "first_row + BLOCK * b, rank + BLOCK * i", "first_row + BLOCK * b, BLOCK * i"),
    Edit(DELTA, "const uint count = n < column_end ? N - n : 0;", "const uint count = n < column_end ? RUN : 0;"),
    Edit(DELTA, "if (is_last) {\n        B_loader.next_rows();", "if (false) {\n        B_loader.next_rows();"),
    Edit(DELTA, "B_loader.back(RANKS);", ""),
    Edit(DELTA, "(target + WIDTH + turn * step, 1", "(target + turn * step, 1"),
    Edit(DELTA, "if (!is_last || column + WIDTH < column_end)", "if (true)"),
    Edit(DELTA, "if (!is_last || column + WIDTH < column_end)", "if (column + WIDTH < column_end)"),
    Edit(DELTA, "first_column + BLOCK * j, BLOCK * i", "first_column, BLOCK * i"),
    Edit(DELTA, "sum_tile.at(first_row + BLOCK * b,", "sum_tile.at(first_row,"),
    Edit(DELTA, "float4(scaling)", "float4(1.0f)"),
    Edit(DELTA, "float4(scaling)", "float4(1.0f)", 1),
    Edit(DELTA, "fma(delta.low, float4(scaling), sum.low)", "delta.low * scaling"),
    Edit(DELTA, "ulong element = ulong(m) * N + n;", "ulong element = ulong(r) * N + n;"),
    Edit(DELTA, "element += WIDTH;", ""),
    Edit(DELTA, "lora_A + ulong(ranks.x) * A_strides.x", "lora_A"),
    Edit(DELTA, "k = group.x * k_splits.x", "k = 0"),
    Edit(DELTA, "min(K, k + k_splits.x)", "K"),
    Edit(DELTA, "ulong(group.x) * M * DownSizes::RANKS", "0"),
    Edit(DELTA, "lora_B + ulong(ranks.x) * B_strides.y", "lora_B"),
    Edit(DELTA, "column = group.x * n_columns.y", "column = 0"),
    Edit(DELTA, "h + ranks.x, h_stride.x", "h, h_stride.x"),
    Edit(DELTA, "&& group.x == 0", ""),
    Edit(DELTA, "min(N, column + n_columns.y)", "N"),
    Edit(DELTA, "min(N, column + n_columns.y)", "column + n_columns.y"),
    # lora_decode.metal
    Edit(DECODE, BARRIER, ""),
    Edit(DECODE, BARRIER, "", 1),
    Edit(DECODE, BARRIER, "", 2),
    Edit(DECODE, "min(first + i, matrix.rows - 1)", "first + i"),
    Edit(DECODE, "ulong(columns) * stride", "columns"),
    Edit(DECODE, "x_place.add(x_next)", "x_place.add(next)"),
    Edit(DECODE, "place.add(next)", "place.add(0)"),
    Edit(DECODE, "wide ? K / RUN * RUN : 0", "wide ? K : 0"),
    Edit(DECODE, "wide ? K / RUN * RUN : 0", "K / RUN * RUN"),
    Edit(DECODE, "add_runs<RUNS, false>(rows, x, next, K, step);", ""),
    Edit(DECODE, "(slice.x * LANES + lane) * RUNS", "lane * RUNS"),
    Edit(DECODE, "step = slice.y * LANES * RUNS", "step = LANES * RUNS"),
    Edit(DECODE, "across<WIDE>(run * RUN)", "across<WIDE>(0)"),
    Edit(DECODE, "w[j] = rows.decode(held[j], run)", "w[j] = rows.decode(held[j], 0)"),
    Edit(DECODE, "sums[j * M + m] = sum", "sums[j + m] = sum"),
    Edit(DECODE, "if (lane == 0)", "if (true)"),
    Edit(DECODE, "up ? 0 : group * DECODE_W_ROWS", "0"),
    Edit(DECODE, "up ? r : min(r, first + DECODE_W_ROWS)", "up ? r : first + DECODE_W_ROWS"),
    Edit(DECODE, "sums[simdgroup_index] + (rank - first) * M", "sums[simdgroup_index]"),
    Edit(DECODE, "s < DECODE_SIMDGROUPS", "s < DECODE_SIMDGROUPS - 1"),
    Edit(DECODE, "thread_index < (last - first) * M", "true"),
    Edit(DECODE, "rank = first + thread_index / M", "rank = thread_index / M"),
    Edit(DECODE, "&& m < rows && (!up", "&& (!up"),
    Edit(DECODE, "(!up || group == 0)", "true"),
    Edit(DECODE, "simdgroup_index / slices * DECODE_W_ROWS;", "simdgroup_index * DECODE_W_ROWS;"),
    Edit(DECODE, "if (first < N)", "if (true)"),
    Edit(DECODE, "rank = slice * LANES + lane", "rank = lane"),
    Edit(DECODE, "rank += slices * LANES", "rank += LANES"),
    Edit(DECODE, "if (down) {\n            h_rank", "if (false) {\n            h_rank"),
    Edit(DECODE, "h_sums[rank * M + m];", "h_sums[rank];"),
    Edit(DECODE, "scaling * float(B_rows", "float(B_rows"),
    Edit(DECODE, "across<false>(slices * LANES)", "across<false>(LANES)"),
    Edit(DECODE, "m < rows && n < N", "m < M && n < N"),
    Edit(DECODE, "m < rows && n < N", "m < rows"),
    Edit(DECODE, "ulong(n) * flags_bias_stride.y", "n"),
    Edit(DECODE, "s < slices", "s < 1"),
    Edit(DECODE, "place / DECODE_W_ROWS * slices + s", "place / DECODE_W_ROWS + s"),
    # weights.h
    Edit(WEIGHTS, "words[bit / 32]", "words[0]"),
    Edit(WEIGHTS, ">> (bit % 32)", ">> (bit % 16)"),
    Edit(WEIGHTS, "(index * RUN + CODES::place(i)) * BITS", "CODES::place(i) * BITS"),
    Edit(WEIGHTS, "& ((1u << BITS) - 1)", ""),
    Edit(WEIGHTS, "float(scale), float(bias))", "float(scale), 0.0f)"),
    Edit(WEIGHTS, "scales + groups,", "scales,"),
    Edit(WEIGHTS, "{biases + group}", "{biases}"),
    Edit(WEIGHTS, "words + ulong(row) * row_words", "words"),
    Edit(WEIGHTS, "left(row, rows)", "rows"),
    Edit(WEIGHTS, "scales[col >> shift]", "scales[0]"),
    Edit(WEIGHTS, "biases[group]", "biases[0]"),
    Edit(WEIGHTS, "i ^ 1", "i"),
    Edit(WEIGHTS, "return table[code]", "return table[code ^ 1]"),
    Edit(WEIGHTS, "thread_index < ENTRIES", "thread_index < ENTRIES - 1"),
    Edit(WEIGHTS, BARRIER, ""),
    Edit(WEIGHTS, "col / RUN * (runs.WORDS / RUNS)", "col / RUN"),
    Edit(WEIGHTS, "first + thread_index % (COLS / RUN) * RUN", "thread_index % (COLS / RUN) * RUN"),
    Edit(WEIGHTS, "place.rows > 0 && col < place.cols", "place.rows > 0"),
    Edit(WEIGHTS, "place.rows > 0 && col < place.cols", "col < place.cols"),
    Edit(WEIGHTS, "col += COLS;", ""),
    Edit(WEIGHTS, "place = place.from_row(ROWS);", ""),
    # lora_gemm.metal
    Edit(GEMM, BARRIER, ""),
    Edit(GEMM, BARRIER, "", 1),
    Edit(GEMM, BARRIER, "", 2),
    Edit(GEMM, "simdgroup_barrier(mem_flags::mem_threadgroup);", ""),
    Edit(GEMM, "simdgroup_barrier(mem_flags::mem_threadgroup);", "", 1),
    Edit(GEMM, "simdgroup_barrier(mem_flags::mem_threadgroup);", "", 2),
    Edit(GEMM, "d < GEMM_DEPTH", "d < GEMM_DEPTH - BLOCK"),
    Edit(GEMM, "row + BLOCK * i, d", "row, d"),
    Edit(GEMM, "right.read(right_block, d, col + BLOCK * j)", "right.read(right_block, d, col)"),
    Edit(GEMM, "right.read_transposed(right_block, col + BLOCK * j, d)", "right.read_transposed(right_block, col, d)"),
    Edit(GEMM, "k < terms; k += GEMM_DEPTH", "k + GEMM_DEPTH <= terms; k += GEMM_DEPTH"),
    Edit(GEMM, "left_loader.next_columns();", ""),
    Edit(GEMM, "right_loader.next_rows();", ""),
    Edit(GEMM, "right_loader.next_columns();", ""),
    Edit(GEMM, "if (k + GEMM_DEPTH < terms)", "if (true)"),
    Edit(GEMM, "if (k + GEMM_DEPTH < terms)", "if (k + 2 * GEMM_DEPTH < terms)"),
    Edit(GEMM, "row(simdgroup_index / 2 * (ROWS / 2))", "row(simdgroup_index / 2 * BLOCK)"),
    Edit(GEMM, "strip_col(lane % (LANES / RUN) * RUN)", "strip_col(lane % (LANES / RUN))"),
    Edit(GEMM, "GEMM_HAS_BIAS) != 0", "GEMM_HAS_BIAS) == 0"),
    Edit(GEMM, "ulong(n) * flags_bias_stride.y", "ulong(n)"),
    Edit(GEMM, "element += ulong(BLOCK) * columns;", ""),
    Edit(GEMM, "ulong element = ulong(m) * columns + n", "ulong element = ulong(m) * columns"),
    Edit(GEMM, "float4(scaling), added.low", "float4(1.0f), added.low"),
    Edit(GEMM, "float4(scaling), added.high", "float4(scaling), float4(0)"),
    Edit(GEMM, "if (m + BLOCK * i < M)", "if (true)"),
    Edit(GEMM, "store_run(target, run, count,", "store_run(target, run, RUN,"),
    Edit(GEMM, "if (split == 0)", "if (true)"),
    Edit(GEMM, "first = split * split_terms.x", "first = 0"),
    Edit(GEMM, "min(split_terms.x, left(first, terms))", "split_terms.x"),
    Edit(GEMM, "min(split_terms.x, left(first, terms))", "left(first, terms)"),
    Edit(GEMM, "x_loader(x_matrix, row, first, thread_index)", "x_loader(x_matrix, row, 0, thread_index)"),
    Edit(GEMM, "BACKWARD ? first : right_row", "right_row"),
    Edit(GEMM, "BACKWARD ? right_col : first", "right_col"),
    Edit(GEMM, "y + ulong(split) * M * columns", "y"),
    # lora_grad.metal
    Edit(GRAD, BARRIER, ""),
    Edit(GRAD, BARRIER, "", 1),
    Edit(GRAD, BARRIER, "", 2),
    Edit(GRAD, "simdgroup_barrier(mem_flags::mem_threadgroup);", ""),
    Edit(GRAD, "simdgroup_barrier(mem_flags::mem_threadgroup);", "", 1),
    Edit(GRAD, "; row < big.rows; row += DEPTH", "; row + DEPTH <= big.rows; row += DEPTH"),
    Edit(GRAD, "if (row + DEPTH < big.rows)", "if (true)"),
    Edit(GRAD, "if (row + DEPTH < big.rows)", "if (row + 2 * DEPTH < big.rows)"),
    Edit(GRAD, "min(rows.x, row + rows.y)", "rows.x"),
    Edit(GRAD, "scaling * block", "block"),
    Edit(GRAD, "matrix_of(h + rank", "matrix_of(h"),
    Edit(GRAD, "matrix_of(z + rank", "matrix_of(z"),
    Edit(GRAD, "n < columns && j < ranks.y", "j < ranks.y"),
    Edit(GRAD, "n < columns && j < ranks.y", "n < columns"),
    Edit(GRAD, "ulong(group.y) * r_tiles.x * columns", "0"),
    Edit(GRAD, "(simdgroup_index * BLOCKS + c) * BLOCK", "(simdgroup_index + c) * BLOCK"),
    # sum_splits.metal
    Edit(SUM, BARRIER, ""),
    Edit(SUM, "ulong(slice) * count + i", "i"),
    Edit(SUM, "ulong(slices) * count", "count"),
    Edit(SUM, "(left(slice, splits) + slices - 1) / slices", "splits / slices"),
    Edit(SUM, "sum += sums[other]", "sum = sums[other]"),
    Edit(SUM, "group * places", "group * SUM_THREADS"),
    Edit(SUM, "index - elements.x", "index"),
    Edit(SUM, "if (i < count)", "if (true)"),
    Edit(SUM, "slice == 0 && i < count", "slice == 0"),
    Edit(SUM, "slice == 0 && i < count", "i < count"),
    # rows.h
    Edit(ROWS, BARRIER, ""),
    Edit(ROWS, "block * ROWS + simdgroup_index / SIMDGROUPS", "block * ROWS"),
    Edit(ROWS, "thread_index % ROW_THREADS * RUN", "thread_index * RUN"),
    Edit(ROWS, "if (lane == 0)", "if (true)"),
    Edit(ROWS, "lane < SIMDGROUPS ? shared[first + lane] : 0.0f", "shared[first + lane]"),
    Edit(ROWS, "shared[first + lane]", "shared[lane]"),
    Edit(ROWS, "(sums.z + sums.w)", "sums.z"),
    Edit(ROWS, "column < end ? (WIDE", "true ? (WIDE"),
    Edit(ROWS, "WIDE ? RUN : end - column", "RUN"),
    Edit(ROWS, "place += matrix.across(STEP);", "place += STEP;"),
    Edit(ROWS, "run_count<WIDE>(column + i * STEP, end)", "run_count<WIDE>(column, end)"),
    Edit(ROWS, "HELD ? c == first : c < end", "c == first"),
    Edit(ROWS, "place += step;", ""),
    Edit(ROWS, "level_row += level_step;", ""),
    Edit(ROWS, "level_step >= left_of_level", "level_step > left_of_level"),
    Edit(ROWS, "level_row -= matrix.inner;", ""),
    Edit(ROWS, "place += next_level;", ""),
    Edit(ROWS, "ulong(rows / matrix.inner) * matrix.outer_stride +", ""),
    Edit(ROWS, "rest = rows % matrix.inner", "rest = rows"),
    Edit(ROWS, "matrix.at(row, column), row % matrix.inner", "matrix.at(row, column), 0"),
    # rms_norm.metal
    Edit(NORM, "turn ^= 1", "turn = 0"),
    Edit(NORM, "turn ^= 1", "turn = 0", 1),
    Edit(NORM, "block += groups", "block += 2 * groups"),
    Edit(NORM, "block += groups", "block += 2 * groups", 1),
    Edit(NORM, "row < M ? H : 0", "H"),
    Edit(NORM, "row < M ? H : 0", "H", 1),
    Edit(NORM, "+ as_type<float>(weight_stride_eps.y)", ""),
    Edit(NORM, "/ H;", ";"),
    Edit(NORM, "/ H;", ";", 1),
    Edit(NORM, "column == 0 && row < M", "row < M"),
    Edit(NORM, "column == 0 && row < M", "column == 0"),
    Edit(NORM, "scale * widened(weight_runs.runs[i])", "scale"),
    Edit(NORM, "y_place + i * STEP", "y_place"),
    Edit(NORM, "first_y += y_step", "first_y += 1"),
    Edit(NORM, "first_dx += dx_step", "first_dx += 1"),
    Edit(NORM, "weight.rows == 0 ?", "false ?"),
    Edit(NORM, "if (weight.rows == 0)", "if (false)"),
    Edit(NORM, "Pair(0, stride)", "Pair(0, 1)"),
    Edit(NORM, "fetch_weight<WIDE>(weight_runs, weights, weight_place, c);", ""),
    Edit(NORM, "fetch_weight<WIDE>(weight_runs, weights, weight_place, c);", "", 1),
    Edit(NORM, "fetch_weight<WIDE>(weight_runs, weights, weight_place, c);", "", 2),
    Edit(NORM, "place.row(block + groups)", "place.row(block)"),
    Edit(NORM, "place.row(block + groups)", "place.row(block)", 1),
    Edit(NORM, "lane == 0 && row < x_rows.rows ?", "row < x_rows.rows ?"),
    Edit(NORM, "lane == 0 && row < x_rows.rows ?", "lane == 0 ?"),
    Edit(NORM, "widened(own.grad.runs[i]) * widened(weight_runs.runs[i])", "widened(own.grad.runs[i])"),
    Edit(NORM, "- normal * mean", ""),
    Edit(NORM, "need_weight && block != group;", "need_weight;"),
    Edit(NORM, "need_weight && block != group;", "false;"),
    Edit(NORM, "need_weight && block != group;", "block != group;"),
    Edit(NORM, "if (need_x)", "if (true)"),
    Edit(NORM, "if (!HELD && need_weight)", "if (!HELD)"),
    Edit(NORM, "if (HELD && need_weight)", "if (HELD)"),
    Edit(NORM, "sums.runs[i] = sums.runs[i] + grad_run * normal", "sums.runs[i] = grad_run * normal"),
    Edit(NORM, "dweight + ulong(group) * H", "dweight"),
    Edit(NORM, BARRIER, ""),
    Edit(NORM, BARRIER, "", 1),
    Edit(NORM, "other < ROWS * ROW_THREADS", "other < ROW_THREADS"),
    Edit(NORM, "if (thread_index < ROW_THREADS)", "if (true)"),
    Edit(NORM, "sum, run_count<WIDE>(column + i * STEP, H)", "sum, RUN"),
    # softmax.metal
    Edit(SOFTMAX, "turn ^= 1", "turn = 0"),
    Edit(SOFTMAX, "turn ^= 1", "turn = 0", 1),
    Edit(SOFTMAX, "block += groups", "block += 2 * groups"),
    Edit(SOFTMAX, "block += groups", "block += 2 * groups", 1),
    Edit(SOFTMAX, "place.row(block) < M ? H : 0", "H"),
    Edit(SOFTMAX, "place.row(block) < M ? H : 0", "H", 1),
    Edit(SOFTMAX, "LOWEST = -FLT_MAX", "LOWEST = -INFINITY"),
    Edit(SOFTMAX, "set(j, -INFINITY)", "set(j, 0.0f)"),
    Edit(SOFTMAX, "uint(j) >= count", "uint(j) > count"),
    Edit(SOFTMAX, "part.sum * precise::exp(part.maximum - maximum)", "part.sum"),
    Edit(SOFTMAX, "own.sum * precise::exp(own.maximum - maximum)}", "0.0f}"),
    Edit(SOFTMAX, "own.sum * precise::exp(own.maximum - maximum)}", "own.sum}"),
    Edit(SOFTMAX, "own.sum += total(", "own.sum = total("),
    Edit(SOFTMAX, "float maximum = own.maximum;", "float maximum = LOWEST;"),
    Edit(SOFTMAX, "return max(maximum, ", "return ("),
    Edit(SOFTMAX, "max(max(maxima.x, maxima.y), max(maxima.z, maxima.w))", "max(maxima.x, maxima.y)"),
    Edit(SOFTMAX, "max(run.low, run.high)", "run.low"),
    Edit(SOFTMAX, BARRIER, ""),
    Edit(SOFTMAX, "if (lane == 0)", "if (true)"),
    Edit(SOFTMAX, "all = {LOWEST, 0.0f};", ""),
    Edit(SOFTMAX, "if (lane < SIMDGROUPS)", "if (true)"),
    Edit(SOFTMAX, "simdgroup_index / SIMDGROUPS * SIMDGROUPS + lane", "lane"),
    Edit(SOFTMAX, "precise::exp(own.maximum - all.maximum) *", ""),
    Edit(SOFTMAX, "exponentials(run, own.maximum)", "exponentials(run, all.maximum)"),
    Edit(SOFTMAX, "- filled(sum)", ""),
]
EQUIVALENT = {
    Edit(
        "tiles.h", "stride = COLS + 16 / sizeof(E)", "stride = COLS"
    ): "EQUIVALENT: every access to a tile goes through its stride; the padding serves the memory banks alone",
    Edit("operands.h", "count >= uint(RUN)", "count >= uint(RUN - 1)", 1): "EQUIVALENT: a wide row of y has a multiple "
    "of four elements (launch plan) and a run starts at a multiple of eight: the count is four, or eight and more",
    Edit(DELTA, "if (first + i < OWN)", "if (true)"): "EQUIVALENT: in all numbers, as nothing past OWN is read of what "
    "is stored; `sums` is read past its end, of which the executor sees nothing where matrices are in registers",
    Edit(GRAD, "if (row + DEPTH < big.rows)", "if (true)"): "EQUIVALENT: both operands end at the split's last row, a "
    "loader reads nothing past the end, and what it fetches then is never stored",
}


class Failures:
    """A pytest plugin: the first test that failed."""

    first: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.first is None:
            self.first = report.nodeid.removeprefix("tests/kernels/")


def first_failure(tests: Stages, edit: Edit | None) -> str | None:
    """The first test that fails with the edit made (None: without one), or None where all pass."""
    compile_source, failures = metal_on_cpu.compile, Failures()
    refusals = []

    def compile_edited(source: str, *arguments, **options):
        try:
            return compile_source(edit.apply(source) if edit else source, *arguments, **options)
        except (metal_on_cpu.CompileError, ValueError) as error:
            refusals.append(f"{edit}: {error}")
            raise

    metal_on_cpu.compile = compile_edited
    for file, *selection in tests:
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            code = pytest.main([str(ROOT / "tests" / "kernels" / file), *selection, *options], [failures])
        if refusals or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(refusals[0] if refusals else f"{edit}: pytest could not run\n{output.getvalue()}")
        if failures.first:
            break
    return failures.first


def run(edits: list[Edit], jobs: int, console: Console) -> list[Edit]:
    """The edits that no test notices."""
    survivors = []
    noticed: dict[str, None] = {}  # the tests that caught an edit
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        results = [pool.apply_async(first_failure, (edit.tests, edit)) for edit in edits]
        for edit, result in track(zip(edits, results, strict=True), "mutations", len(edits), console=console):
            test = result.get()
            verdict = f"caught by {test.partition('::')[2]}" if test else EQUIVALENT.get(edit, "SURVIVED")
            console.print(f"{edit}\n    {verdict}", markup=False, highlight=False, soft_wrap=True)
            if test is None:
                survivors.append(edit)
            else:
                noticed[test] = None
        if noticed and (failed := pool.apply(first_failure, (tuple((test,) for test in noticed), None))):
            raise SystemExit(f"{failed} fails without any edit")
    return survivors


def changed_files() -> set[str]:
    """The files of metal/ that differ from the commit before; none where git cannot tell."""
    command = ["git", "diff", "--name-only", "HEAD~1", "--", "metal"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {Path(line).name for line in listed.stdout.splitlines()} if listed.returncode == 0 else set()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="edits whose description contains this")
    parser.add_argument(
        "--changed", action="store_true", help="edits of the files of metal/ that the last commit changed"
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="N of them, drawn by the commit; of all if none is left"
    )
    parser.add_argument("-j", "--jobs", type=int, default=2)
    options = parser.parse_args()
    edits = [edit for edit in EDITS if options.only in str(edit)]
    if options.changed:
        changed = changed_files()
        edits = [edit for edit in edits if edit.file in changed] or edits
    if options.sample and len(edits) > options.sample:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        edits = random.Random(head).sample(edits, options.sample)
    console = Console()
    survivors = run(edits, options.jobs, console)
    proven = [edit for edit in survivors if edit in EQUIVALENT]
    console.print(f"{len(edits) - len(survivors)} of {len(edits)} caught, {len(proven)} proven equivalent")
    return int(len(survivors) > len(proven))


if __name__ == "__main__":
    sys.exit(main())
