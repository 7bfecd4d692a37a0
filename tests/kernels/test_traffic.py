"""Bytes, dispatches and scratch, counted by the executor, and the formulas of bytes held to the counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels import traffic
from tests.kernels.launch_plan import Kernels, overridden
from tests.kernels.traffic import ROW_OPERATORS, Case, RowCase

F32, F16 = torch.float32, torch.float16
CASES = [
    Case(1024, 96, 160, 16),
    Case(1024, 130, 70, 9, F32, F32),
    Case(64, 512, 512, 16),
    Case(17, 96, 300, 72, adapter_dtype=F32),
    Case(9, 1024, 1024, 8, F32, F32, gpu_cores=8),
    Case(40, 128, 1000, 16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formulas_are_what_the_executor_counts(case):
    assert traffic.count_delta(case) == traffic.model_delta(case)
    assert traffic.count_grad(case) == traffic.model_grad(case)


DECODED = [Case(1, 1024, 1000, 16), Case(3, 3000, 130, 5, F32, F32, 8), Case(2, 256, 131, 3), Case(7, 520, 64, 5)]


@pytest.mark.parametrize("dispatches", [1, 2])
@pytest.mark.parametrize("case", DECODED, ids=str)
def test_decode_formula(case, dispatches):
    with overridden(f"lora_decode.dispatches={dispatches}"):
        moved = traffic.count_decode(case)
        assert moved == traffic.model_decode(case)
    assert (moved["partial"] == (0, 0)) == (dispatches == 1 and case.M < 7)


PACKED = [
    Case(1, 1024, 1000, 16, bits=4),
    Case(2, 256, 132, 3, F32, F32, bits=8),
    Case(7, 512, 64, 64, bits=4),
    Case(1, 1024, 1000, 16, bits=4, has_table=True),
    Case(7, 512, 64, 64, bits=4, has_table=True),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_words_are_read_once_for_few_rows(case):
    moved = traffic.count_decode(case)
    assert moved == traffic.model_decode(case)
    assert moved["weight"] == (case.N * case.K * case.bits // 8, 0)


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(70, 128, 200, 16, bits=4),
        Case(300, 192, 70, 40, F32, F32, 1, 8),
        Case(33, 1024, 1024, 5, bits=4),  # split
        Case(33, 1024, 256, 5, bits=4, has_table=True),  # split
    ],
    ids=str,
)
def test_packed_and_plain_gemm_formula(case, is_backward):
    for one in (case, dataclasses.replace(case, bits=0, has_table=False)):
        moved = traffic.count_gemm(one, is_backward)
        assert moved == traffic.model_gemm(one, is_backward)
        assert moved["weight"][0] == -(-case.M // (64 if case.gpu_cores == 1 else 32)) * one.bytes("weight")


@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize(("N", "r"), [(1024, 8), (4096, 16), (4096, 256), (14336, 64)])
def test_decode_touches_all_but_x_once_and_has_256_groups(M, N, r):
    case = Case(M, 4096, N, r)
    x, weight, bias, A, B, _ = traffic.operands_meta(case)
    first, second = Kernels(40).plan_decode(x, weight, bias, A, B)
    assert second.threads[0] // second.group[0] >= 256
    assert first.threads[0] // first.group[0] == r / 4
    moved = traffic.model_decode(case)
    for name in ("weight", "lora_A", "lora_B"):
        assert moved[name] == (case.bytes(name), 0)
    assert moved["y"] == (0, case.bytes("y"))
    assert moved["partial"][1] == 4 * M * r
    assert moved["x"][0] == pytest.approx(M / 4 * case.bytes("weight"), rel=0.1)


@pytest.mark.parametrize("case", [Case(1024, 256, 384, 16, gpu_cores=16), Case(1030, 64, 64, 64, F32, F32)], ids=str)
def test_delta_reads_x_once_and_a_and_b_once_a_tile_of_32_rows(case):
    moved = traffic.count_delta(case)
    tiles = -(-case.M // 32)
    assert moved["x"] == (case.bytes("x"), 0)
    assert moved["y"] == (case.bytes("y"), case.bytes("y"))
    assert moved["lora_A"] == (tiles * case.bytes("lora_A"), 0)
    assert moved["lora_B"] == (tiles * case.bytes("lora_B"), 0)


@pytest.mark.parametrize("M", [9, 16, 33, 64, 200, 500, 1000, 4096])
@pytest.mark.parametrize(("K", "N", "r"), [(4096, 4096, 16), (1024, 4096, 8), (4096, 1024, 64), (4096, 4096, 256)])
@pytest.mark.parametrize("gpu_cores", [8, 40])
def test_delta_fills_the_gpu_and_touches_x_and_y_once(M, K, N, r, gpu_cores):
    case = Case(M, K, N, r, gpu_cores=gpu_cores)
    x, _, _, A, B, y = traffic.operands_meta(case)
    (down, up), partial = Kernels(gpu_cores)._plan_pass(False, y, x, A, B, (), (), False)
    width, most_splits = (128, 16) if r <= 16 else (64 if r <= 64 else 16, 32)
    for launch, most in ((down, min(-(-K // width), most_splits)), (up, -(-N // 64))):
        row_tiles = launch.threads[1]
        groups = launch.threads[0] // launch.group[0] * row_tiles
        assert min(gpu_cores, most * row_tiles) <= groups <= max(4 * gpu_cores, row_tiles)
    moved = traffic.model_delta(case)
    assert moved["x"] == (case.bytes("x"), 0)
    assert moved["y"] == (case.bytes("y"), case.bytes("y"))
    splits, elements = partial.shape
    assert splits <= most_splits
    assert partial.nbytes == moved["partial"][1]
    assert elements == M * r


def test_dispatches_and_scratch():
    case = Case(4096, 512, 512, 16)
    x, weight, bias, A, B, y = traffic.operands_meta(case)
    kernels = Kernels(40)
    assert len(kernels.plan_delta(y[:9], x[:9], A, B)) == 2
    assert len(kernels.plan_decode(x[:1], weight, bias, A, B)) == 1
    assert len(kernels.plan_decode(x[:2], weight, bias, A, B)) == 1
    assert len(kernels.plan_decode(x[:8], weight, bias, A, B)) == 2
    assert len(kernels.plan_decode(x[:1], weight.expand(32, *weight.shape).flatten(0, 1), bias, A, B)) == 2
    assert len(kernels.plan_delta(y, x, A, B)) == 2
    assert len(kernels.plan_delta(y, x, A, B, dropout_p=(0.1,))) == 2
    launches, splits = kernels.plan_grad(x, y, A, B)
    assert len(launches) == 2
    partial = splits * (case.K + case.N) * case.r * 4
    assert partial <= (case.bytes("x") + case.bytes("dy")) / 4
    # With dx and z from two dispatches that makes four, the most that a backward takes.


@pytest.mark.parametrize(
    "case",
    [
        RowCase(70, 100, gpu_cores=1),
        RowCase(40, 700, torch.bfloat16, F32, 1),
        RowCase(12, 2048, F32, F32),
        RowCase(36, 4096, gpu_cores=1),
        RowCase(33, 4104, gpu_cores=1),
        RowCase(5, 10000, F32, F32),
    ],
    ids=str,
)
@pytest.mark.parametrize("operator", ROW_OPERATORS)
def test_row_formulas_are_what_the_executor_counts(operator, case):
    assert traffic.count_rows(operator, case) == traffic.model_rows(operator, case)


@pytest.mark.parametrize("H", [128, 1024, 4096])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F16, F32), (F16, F16), (F32, F32)], ids=str)
@pytest.mark.parametrize("gpu_cores", [8, 40])
@pytest.mark.parametrize("operator", ROW_OPERATORS)
def test_rows_that_fit_move_at_most_5_percent_more_than_the_least(operator, H, dtype, weight_dtype, gpu_cores):
    """From 60 rows on for each that a core has at once: 4800 rows of 4096 on 40 cores."""
    case = RowCase(60 * gpu_cores * min(8192 // H, 32), H, dtype, weight_dtype, gpu_cores)
    moved = traffic.model_rows(operator, case)
    assert traffic.total(case, moved) <= 1.05 * traffic.least(case, moved)


@pytest.mark.parametrize("operator", ROW_OPERATORS)
def test_the_5_percent_executed(operator):
    case = RowCase(2048, 1024, gpu_cores=8)
    moved = traffic.count_rows(operator, case)
    assert traffic.total(case, moved) <= 1.05 * traffic.least(case, moved)


@pytest.mark.parametrize("operator", ROW_OPERATORS)
def test_longer_rows_are_read_twice_and_written_once(operator):
    case = RowCase(20, 9000)
    for name, (loaded, stored) in traffic.count_rows(operator, case).items():
        if name in ("x", "grad", "y", "dx"):
            assert loaded in (0, 2 * case.bytes(name))
            assert stored in (0, case.bytes(name))
