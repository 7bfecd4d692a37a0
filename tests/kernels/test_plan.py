"""Overrides of launch configurations: what is refused, and that what is accepted changes launches and no numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch

from tests.kernels.launch_plan import Kernels, overridden
from tests.kernels.row_plan import RowKernels
from tests.kernels.test_metal_kernels import check_all, layer, run_all
from tests.kernels.test_row_kernels import check_rms_norm, check_softmax, randn
from tests.kernels.traffic import Case, operands_meta

KERNELS = (
    "lora_linear, lora_decode, lora_delta, lora_gemm, lora_grad, rms_norm, rms_norm_backward, softmax, softmax_backward"
)
DELTA_FIELDS = "row_blocks, k_splits, splits"
ROW_FIELDS = "row_simdgroups, rows, groups"
REFUSED = {
    "lora_delta": "lora_delta: expected kernel.field=number",
    "lora_delta.splits": "lora_delta.splits: expected kernel.field=number",
    "splits=4": "splits=4: expected kernel.field=number",
    "lora_delta.splits=4,,": ": expected kernel.field=number",
    "lora_dleta.splits=4": f"lora_dleta.splits=4: expected a kernel of {KERNELS}$",
    "lora_delta.split=4": f"lora_delta.split=4: expected a field of that kernel: {DELTA_FIELDS}$",
    "softmax.splits=4": f"softmax.splits=4: expected a field of that kernel: {ROW_FIELDS}$",
    "lora_delta.splits=0": "lora_delta.splits=0: expected a whole number from 1 on$",
    "lora_delta.splits=": "lora_delta.splits=: expected a whole number from 1 on$",
    "lora_delta.splits=-1": "lora_delta.splits=-1: expected a whole number from 1 on$",
    "lora_delta.splits=2.5": "lora_delta.splits=2.5: expected a whole number from 1 on$",
    "lora_delta.splits=4294967296": "lora_delta.splits=4294967296: expected a whole number from 1 on$",
    "lora_delta.row_blocks=3": "lora_delta.row_blocks=3: expected one of 1, 2, 4$",
    "lora_decode.slices=3": "lora_decode.slices=3: expected one of 1, 2, 4, 8$",
    "lora_gemm.rows=48": "lora_gemm.rows=48: expected one of 32, 64$",
    "lora_decode.slices=4,lora_grad.splits=x": "lora_grad.splits=x: expected a whole number from 1 on$",
    "lora_delta.width=64": "lora_delta.width=64: expected a field that is chosen; width follows from the problem$",
    "rms_norm.held=1": "rms_norm.held=1: expected a field that is chosen; held follows from the problem$",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text):
    with pytest.raises(ValueError, match=f"^TORCH_FUSED_LORA_PLAN: {REFUSED[text]}"), overridden(text):
        pass
    assert launches(Kernels()) == launches(Kernels())


def launches(kernels: Kernels) -> list[tuple]:
    """Kernel, grid and words of every launch of a small layer."""
    x, weight, bias, A, B, dy = layer(5, 512, 640, 16)
    found = kernels.plan_decode(x, weight, bias, A, B)
    found += kernels.plan_delta(dy, x, A, B) + kernels.plan_grad(x, dy, A, B)[0]
    return [(launch.kernel, *launch.threads, *launch.group, *launch.words) for launch in found]


LORA = [
    "lora_decode.slices=1",
    "lora_decode.slices=4,lora_decode.dispatches=2",
    "lora_decode.slices=8",
    "lora_decode.dispatches=1",
    "lora_decode.dispatches=2",
    "lora_delta.row_blocks=1",
    "lora_delta.row_blocks=2",
    "lora_delta.row_blocks=4",
    "lora_delta.k_splits=1",
    "lora_delta.k_splits=3,lora_delta.splits=2",
    "lora_delta.k_splits=4294967295",
    "lora_delta.splits=3",
    "lora_delta.k_splits=1,lora_delta.splits=4294967295",
    "lora_grad.splits=2",
    "lora_grad.splits=4294967295",
]
SHAPES = [  # M, K, N, r; every override changes a launch of one of them at least
    (5, 512, 640, 16),
    (1, 2052, 40, 16),  # A is too large to be read by every threadgroup of lora_decode
    (2, 516, 40, 8),
    (70, 264, 200, 16),
    (20, 72, 136, 200),  # a rank of narrow tiles
    (3, 65, 67, 5),  # no vector fits
]


@pytest.mark.parametrize("text", LORA)
def test_an_overridden_layer_gives_the_same_numbers(text):
    changed = 0
    for shape in SHAPES:
        operands = layer(*shape, torch.float16, torch.float32)
        chosen, kernels = Kernels(), Kernels(trace=True)
        run_all(chosen, operands)
        with overridden(text):
            check_all(run_all(kernels, operands), operands)
        assert not [finding for _, report in kernels.runs for finding in report.findings]
        changed += describe(chosen) != describe(kernels)
    assert changed


def kernels_of(lengths: Iterable[int], K: int, N: int, r: int, gpu_cores: int) -> set[bytes]:
    """That a layer's forward and backward launch, with dropout and without."""
    found, kernels = [], Kernels(gpu_cores)
    for M, dropout_p in itertools.product(lengths, ((), (0.1,))):
        x, weight, bias, A, B, dy = operands_meta(Case(M, K, N, r))
        few = M <= 8 and not dropout_p
        found += kernels.plan_decode(x, weight, bias, A, B) if few else kernels.plan_delta(dy, x, A, B, dropout_p)
        found += kernels.plan_delta_dx(x, dy, A, B, dropout_p) + kernels.plan_grad(x, dy, A, B, dropout_p)[0]
    return {launch.kernel for launch in found}


@pytest.mark.parametrize("gpu_cores", [8, 40, 80])
@pytest.mark.parametrize(("K", "N", "r"), [(4096, 4096, 16), (2048, 8192, 8), (4096, 14336, 64), (768, 768, 256)])
def test_a_layer_has_few_kernels_from_1_to_8192_tokens(K, N, r, gpu_cores):
    of_powers = kernels_of([2**i for i in range(14)], K, N, r, gpu_cores)
    assert len(of_powers) <= 24
    assert kernels_of([*range(3, 40), *range(41, 8192, 397)], K, N, r, gpu_cores) <= of_powers


ROWS = [
    "rms_norm.row_simdgroups=1,rms_norm_backward.row_simdgroups=1,softmax.row_simdgroups=1",
    "rms_norm.row_simdgroups=16,rms_norm_backward.row_simdgroups=16,softmax_backward.row_simdgroups=16",
    "rms_norm.rows=16,rms_norm_backward.rows=16,softmax.rows=16,softmax_backward.rows=16",
    "rms_norm.rows=1,rms_norm_backward.rows=2,softmax.rows=2,softmax_backward.rows=1",
    "rms_norm.groups=1,rms_norm_backward.groups=1,softmax.groups=1,softmax_backward.groups=1",
    "rms_norm.groups=4294967295,rms_norm_backward.groups=4294967295,softmax.groups=4294967295",
]


@pytest.mark.parametrize("text", ROWS)
def test_overridden_row_kernels_give_the_same_numbers(text):
    changed = 0
    for M, H in ((170, 300), (7, 4104), (3, 8)):  # more rows than are walked over at once, and fewer
        x, grad, weight = randn(M, H, dtype=torch.float16), randn(M, H, dtype=torch.float16), randn(1, H)[0].half()
        chosen, kernels = RowKernels(), RowKernels(trace=True)
        check_rms_norm(chosen, x, weight, grad)
        check_softmax(chosen, x, grad)
        with overridden(text):
            check_rms_norm(kernels, x, weight, grad)
            check_softmax(kernels, x, grad)
        assert not [finding for _, report in kernels.runs for finding in report.findings]
        changed += describe(chosen) != describe(kernels)
    assert changed


def describe(kernels: Kernels | RowKernels) -> list[tuple]:
    return [(name, report.counters.threadgroups) for name, report in kernels.runs]
