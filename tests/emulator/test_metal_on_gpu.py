"""Metal on an NVIDIA GPU: every family becomes machine code here. What it computes, and how fast, is told where there
is such a GPU: python -m tests.emulator.metal_on_gpu."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping

import pytest
import torch

from tests import ROOT
from tests.emulator.metal_on_gpu import faults, library, ptx, times
from tests.emulator.metal_on_gpu.__main__ import wrong
from tests.kernels.launch_plan import Launch
from tests.kernels.row_plan import RowKernels

missing = ptx.why_unavailable()
if missing:
    pytest.skip(missing, allow_module_level=True)


@pytest.fixture(scope="module")
def families() -> Mapping[str, Launch]:
    """A launch of each family, among those that are timed."""
    with torch.device("meta"):
        planned = [times.plan(case, case.make(), 40)[0] for case in times.CASES]
    launches = [launch for dispatches in planned for launch, _ in dispatches]
    return {library.family(launch.kernel.decode()): launch for launch in launches}


def test_all_families_are_timed(families):
    assert sorted(families) == [
        *("lora_decode", "lora_delta", "lora_grad", "rms_norm", "rms_norm_backward"),
        *("softmax", "softmax_backward", "sum_splits"),
    ]


def test_every_family_becomes_machine_code(families):
    for name, launch in families.items():
        check(launch, {"lora_delta": "fma", "lora_grad": "fast"}.get(name, "exact"))


def check(launch: Launch, variant: str) -> None:
    module = ptx.build(launch.source.decode(), variant=variant)
    assert module.code.startswith(b"\x7fELF")
    (kernel,) = module.kernels.values()
    assert kernel.max_total_threads == launch.group[0]
    assert kernel.constants == list(range(kernel.constants[0], launch.tensors + launch.word_count))
    assert kernel.written


REVERSE = """
#include <metal_stdlib>
using namespace metal;
constant constexpr uint COUNT = 64;
[[kernel]] [[max_total_threads_per_threadgroup(COUNT)]]
void reverse(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant float& factor [[buffer(2)]],
             uint i [[thread_index_in_threadgroup]]) {
  threadgroup float shared[COUNT];
  shared[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = factor * shared[COUNT - 1 - i] + simd_sum(1.0f);
}
"""


def test_what_a_module_says_of_its_kernel():
    kernel = ptx.build(REVERSE).kernels["reverse"]
    assert (kernel.constants, kernel.written, kernel.max_total_threads) == ([2], [1], 64)
    assert kernel.shared_bytes == 4 * 64


def test_every_fault_can_be_planted():
    planted = "".join(faults.sources())
    assert all(f"fault_{i}_" in planted for i, _ in enumerate(faults.FAULTS))


def test_what_is_wrong_in_the_results():
    found = json.loads((ROOT / "docs" / "metal_on_an_nvidia_gpu.json").read_text())
    assert wrong(found) == []
    found["tests"]["tests"]["failed"] = 1
    found["tests"]["lora_grad"]["other bits"] = 2
    found["faults"]["clean 0"] = "wrong numbers"
    found["compute-sanitizer"]["racecheck"]["faults"].remove("one buffer for two sums")
    found["compute-sanitizer"]["memcheck"]["clean kernels"].append("softmax")
    found["times"]["cases"][0]["relative_error"] = float("nan")
    assert len(wrong(found)) == 6


def test_on_a_gpu(families):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("no NVIDIA GPU: the kernels were compiled for one and not launched")
    x = torch.randn(9, 300)
    y = torch.full_like(x, torch.nan)
    (launch,) = RowKernels().plan_softmax(x)
    module = ptx.build(launch.source.decode())
    ((name, entry),) = module.kernels.items()
    kernel = library.Kernel(module.code, name, entry)
    kernel.dispatch(threads=launch.threads, group=launch.group, arguments=[x, y, *launch.constants()])
    torch.testing.assert_close(y, x.softmax(1), rtol=1e-6, atol=1e-6)
