"""The model of time: what it counts, and its order of what was measured. All of it: time_model --check."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tests.emulator.metal_on_gpu import times
from tests.kernels import time_model
from tests.kernels.launch_plan import overridden
from tests.kernels.time_model import Counts, chips, counts, judged

HALF = torch.float16


def empty(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=HALF) for shape in shapes]


@pytest.mark.parametrize(("K", "N", "r", "width"), [(256, 192, 16, 128), (640, 64, 40, 64), (640, 128, 72, 32)])
def test_delta_s_chain_is_its_tiles(K, N, r, width):
    """A step a tile of x, one a chunk of a tile of y, the first of them together with a thread's first four ranks of
    h, and one for each other such four; one multiply a block and rank block."""
    y, x, A, B = empty((16, N), (16, K), (r, K), (N, r))
    with overridden("lora_delta.k_splits=1,lora_delta.splits=1"):
        down, up = counts(1, lambda kernels: kernels.delta(y, x, A, B, 1.0))
    rank_blocks = -(-r // 32) * 4 if r > 32 else -(-r // 8)
    rank_groups, chunks = (2, rank_blocks // 4) if r > 64 else (1, 1)
    turns_of_h = -(-16 * 8 * rank_blocks // (4 * 256))
    assert down.longest_steps == K // width
    assert down.longest_multiplies == K // 8 // (8 // rank_groups) * 2 * rank_blocks // rank_groups
    assert up.longest_steps == N // 64 * chunks + turns_of_h - 1
    assert up.longest_multiplies == N // 64 * 2 * rank_blocks


def test_decode_s_chain_is_its_passes():
    """Over A in one dispatch, over W in the other, and a last step: h, then B; simdgroups share the columns."""
    x, W, A, B = empty((1, 4096), (32, 4096), (16, 4096), (32, 16))
    with overridden("lora_decode.slices=2,lora_decode.dispatches=2"):
        down, up = counts(1, lambda kernels: kernels.decode(x, W, None, A, B, 1.0))
    assert (down.longest_steps, up.longest_steps) == (4096 // 2048, 4096 // 512)
    assert (down.threadgroups, up.threadgroups) == (16 // 4, 32 // 16)
    assert down.longest_collectives == up.longest_collectives == 4


@pytest.mark.parametrize("chip", time_model.MACS)
def test_packed_words_are_read_at_the_bandwidth_of_as_many_bytes(chip):
    """One row by lora_decode: the share of the memory's bandwidth over 8192 x 8192 in 4 bits, 38 MB, and 4096 x 4096
    halves, 34 MB."""
    half, packed = (time_model.Layer(chips()[chip], 1, N, 16) for N in (4096, 8192))
    of_half = half.chip.bandwidth_us(4096**2 * 2) / half.forward()["ours"]
    of_words = packed.chip.bandwidth_us(8192**2 * (4 + 32 / 64) / 8) / packed.packed()["ours"]
    assert of_half - 0.02 < of_words < 1


def test_bytes_once_and_as_requested():
    y, x, A, B = empty((64, 64), (64, 128), (16, 128), (64, 16))
    with overridden("lora_delta.k_splits=1,lora_delta.splits=1"):
        down, up = counts(1, lambda kernels: kernels.delta(y, x, A, B, 1.0))
    h = 64 * 16 * 4
    assert down.threadgroups == up.threadgroups == 2
    assert down.least == x.nbytes + A.nbytes + h
    assert up.least == B.nbytes + h + 2 * y.nbytes
    assert down.requested == down.least + A.nbytes  # once a threadgroup
    assert up.requested == up.least + B.nbytes


COUNTS = Counts("no kernel", 10, 256, 32, *[0] * 8)


@pytest.mark.parametrize(
    ("part", "more"),
    [
        ("memory", {"least": 10**9}),
        ("cache", {"requested": 10**10}),
        ("multiplies", {"multiplies": 10**9}),
        ("chain", {"longest_steps": 10**6}),
        ("chain", {"threadgroup_accessed": 10**11}),
    ],
)
def test_each_part_can_be_the_longest(part, more):
    chip, found = chips()["M1"], dataclasses.replace(COUNTS, **more)
    parts = found.parts(chip)
    assert max(parts, key=parts.get) == part
    assert found.microseconds(chip) == chip.launch_us + parts[part] > 1000


def test_few_threadgroups_leave_cores_idle_and_many_wait_for_their_turn():
    chip = chips()["M1 Max"]
    few = dataclasses.replace(COUNTS, threadgroups=2, multiplies=10**6)
    assert few.microseconds(chip) > 4 * dataclasses.replace(few, threadgroups=20).microseconds(chip)
    room = chip.cores * COUNTS.resident(chip)
    once, twice = (dataclasses.replace(COUNTS, threadgroups=int(n), longest_steps=100) for n in (room, room + 1))
    assert twice.parts(chip)["chain"] == 2 * once.parts(chip)["chain"]


def test_a_wrong_order_is_seen():
    assert judged([("a", 1, 1), ("b", 1.4, 2), ("c", 3, 4)]) == (3, 0, 3)
    assert judged([("a", 2, 1), ("b", 2, 2)]) == (1, 1, 1)


def test_small_launches_are_within_what_was_measured(monkeypatch):
    """Some of --check, which takes a minute."""
    chosen = [c for c in times.CASES if c.kernel == "lora_grad" and c.shape.startswith("512 ")]
    monkeypatch.setattr(times, "CASES", [*chosen, times.CASES[0], times.CASES[-1]])
    for (column, chip, kernels), least in zip(time_model.COLUMNS[:2], (4, 2), strict=True):
        found = list(time_model.compared(column, chips()[chip], kernels))
        within, wrong, pairs = judged(found)
        assert within == len(found) >= least
        assert (wrong, pairs > 0) == (0, True)


def test_what_is_launched_otherwise_than_when_it_was_measured_is_not_compared(monkeypatch):
    case = next(c for c in times.CASES if c.kernel == "lora_grad")
    monkeypatch.setattr(times, "CASES", [case])
    assert len(list(time_model.compared("us", chips()["H200"]))) == 1
    with overridden("lora_grad.splits=1"):
        assert not list(time_model.compared("us", chips()["H200"]))


def test_what_was_measured_is_of_all_that_is_timed():
    measured = json.loads(time_model.MEASURED.read_text())["times"]
    assert measured["label"] == times.LABEL
    assert [(case["kernel"], case["shape"]) for case in measured["cases"]] == [(c.kernel, c.shape) for c in times.CASES]
