"""What the optimiser makes of the kernels, and that metal_on_cpu/codegen.py finds what it is there to find."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.emulator.metal_on_cpu.codegen import Code, inspect
from tests.emulator.metal_on_cpu.llvm_ir import DEFINITION, Function
from tests.kernels import kernel_code

UNROLL = '_Pragma("clang loop unroll(full)")'
VARIANTS = [
    "lora_decode_half_float_4",
    "lora_delta_half_float_down_16_4_drop_any",
    "lora_delta_half_float_up_16_4_drop_any",
    "lora_gemm_half_float_half_affine4_half_64_backward_drop",
    "lora_grad_half_float_float_8_drop_any",
    "rms_norm_half_float_8_1_looped_any",
    "rms_norm_backward_half_float_float_4_2_held_wide",
    "softmax_bfloat_8_1_held_any",
    "softmax_backward_half_4_1_held_wide",
    "sum_splits_half",
]


@pytest.fixture(scope="module")
def launches():
    return kernel_code.variants()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_each_kernel(launches, name):
    codes = kernel_code.generate({name: launches[name]})
    assert kernel_code.faults(codes, kernel_code.committed()) == []


def test_every_kernel_and_figure_is_there(launches):
    assert {kernel_code.shape(name) for name in launches} == kernel_code.committed().keys()
    function = {name: re.search(rb"decltype\((\S+?)<", launch.source)[1] for name, launch in launches.items()}
    assert {function[name] for name in VARIANTS} == set(function.values())


@pytest.mark.parametrize("name", VARIANTS[:4])
@pytest.mark.parametrize(("edit", "kind"), [((UNROLL, ""), "private memory"), (("METAL_FUNC", "inline"), "call")])
def test_the_kernels_without_their_pragmas(launches, name, edit, kind):
    source = launches[name].source.decode()
    assert edit[0] in source
    assert any(finding.startswith(kind) for finding in inspect(source.replace(*edit))[name].findings)


class Case(NamedTuple):
    """A kernel's body, over ``x``, ``y``, ``n`` and ``stride``; ``wrong`` takes the place of ``right`` in it."""

    kind: str
    body: str
    right: str
    wrong: str
    helpers: str = ""


CASES = {
    "array of sums": Case(
        "private memory",
        """
        float sums[4] = {};
        for (uint k = 0; k < n; ++k) {
          UNROLL for (short i = 0; i < 4; ++i) { sums[i] += x[4 * k + i]; }
        }
        UNROLL for (short i = 0; i < 4; ++i) { y[i] = sums[i]; }
        """,
        "UNROLL for (short i = 0; i < 4; ++i) { sums",
        "for (short i = 0; i < 4; ++i) { sums",
    ),
    "array of matrices": Case(
        "private memory",
        """
        simdgroup_float8x8 sums[4], block;
        UNROLL for (short i = 0; i < 4; ++i) { sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }
        for (uint k = 0; k < n; ++k) {
          simdgroup_load(block, tile + k, 8);
          UNROLL for (short i = 0; i < 4; ++i) { simdgroup_multiply_accumulate(sums[i], block, block, sums[i]); }
        }
        UNROLL for (short i = 0; i < 4; ++i) { simdgroup_store(sums[i], tile + 64 * i, 8); }
        """,
        "UNROLL for (short i = 0; i < 4; ++i) { simdgroup_store",
        "for (short i = 0; i < 4; ++i) { simdgroup_store",
    ),
    "outer loop": Case(
        "private memory",
        """
        float sums[4][2] = {};
        for (uint k = 0; k < n; ++k) {
          UNROLL for (short i = 0; i < 4; ++i) {
            UNROLL for (short j = 0; j < 2; ++j) { sums[i][j] += x[2 * i + j + k]; }
          }
        }
        y[n] = sums[0][0] * sums[1][1] + sums[2][0] * sums[3][1];
        """,
        "UNROLL for (short i",
        "for (short i",
    ),
    "component of a vector": Case(
        "component by variable index",
        """
        float4 run = 0.0f;
        UNROLL for (short i = 0; i < 4; ++i) { if (uint(i) < n) { run[i] = x[i]; } }
        *reinterpret_cast<device float4*>(y) = run;
        """,
        "UNROLL for",
        "for",
    ),
    "helper": Case(
        "call",
        "y[n] = squared(x[n]);",
        "METAL_FUNC",
        "inline",
        "METAL_FUNC float squared(float x) { return x * x; }",
    ),
    "helper with an array by reference": Case(
        "private memory",
        "float sums[2] = {}; add(sums, x[n]); y[n] = sums[0] + sums[1];",
        "METAL_FUNC",
        "inline",
        "METAL_FUNC void add(thread float (&sums)[2], float x) { sums[0] += x; sums[1] -= x; }",
    ),
    "place": Case(
        "64-bit multiply",
        """
        device const float* place = x;
        for (uint k = 0; k < n; ++k) { y[k] = *place; place += stride; }
        """,
        "= *place",
        "= x[ulong(k) * stride]",
    ),
    "product in an inner loop": Case(
        "64-bit multiply",
        """
        for (uint m = 0; m < n; ++m) {
          device const float* const row = x + ulong(m) * stride;
          for (uint k = 0; k < stride; ++k) { y[k] += row[k]; }
        }
        """,
        "y[k] += row[k];",
        "y[k] += row[ulong(k) * n];",
    ),
    "product of two longs": Case(
        "64-bit multiply",
        "ulong product = n; for (uint k = 0; k < n; ++k) { product = product + stride; y[product] = k; }",
        "product + stride",
        "product * stride",
    ),
    "product with a constant": Case(
        "64-bit multiply",
        "for (uint k = 0; k < n; ++k) { y[ulong(k) * 3] = x[k]; }",
        "ulong(k) * 3",
        "ulong(k) * stride",
    ),
    "product that is the same each time": Case(
        "64-bit multiply",
        "for (uint k = 0; k < n; ++k) { y[ulong(n) * stride + k] = x[k]; }",
        "ulong(n) * stride",
        "ulong(k) * stride",
    ),
}
KERNEL = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
#define UNROLL _Pragma("clang loop unroll(full)")
{helpers}
kernel void planted(
    device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant uint2& n_stride [[buffer(2)]]) {{
  threadgroup float tile[1024];
  const uint n = n_stride.x, stride = n_stride.y;
  {body}
}}
"""


def planted(body: str, helpers: str = "") -> Code:
    return inspect(KERNEL.format(body=body, helpers=helpers))["planted"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_planted_and_repaired(case):
    texts = case.body, case.helpers
    assert case.right in "".join(texts)
    assert planted(*texts).findings == []
    wrong = planted(*(text.replace(case.right, case.wrong) for text in texts)).findings
    assert any(finding.startswith(case.kind) and ": line " in finding.replace("; ", ": ") for finding in wrong), wrong


def test_a_value_more_is_live():
    """What ``kept`` reads before a barrier, and is used behind it, is live across it."""

    def live(kept: str, used: str) -> int:
        return planted(f"{kept} threadgroup_barrier(mem_flags::mem_threadgroup); {used}").live_registers

    matrix = "simdgroup_float8x8 m{0}; simdgroup_load(m{0}, tile + 64 * {0}, 8);"
    put = "simdgroup_store(m{0}, tile + 64 * {0}, 8);"
    assert [live("".join(map(matrix.format, range(n))), "".join(map(put.format, range(n)))) for n in (8, 9)] == [17, 19]
    device_words = "device const uint4* const words = reinterpret_cast<device const uint4*>(x);"
    assert live(f"{device_words} const uint4 a = words[0];", "*reinterpret_cast<device uint4*>(y) = a;") == 4
    assert live("const uint a = n;", "y[0] = a;") == 1


def test_live_registers_and_loops_of_a_function():
    ir = """
define void @f(ptr addrspace(1) %y, i32 noundef %n, i64 %step) local_unnamed_addr #0 !dbg !1 {
entry:
  %p = getelementptr inbounds i8, ptr addrspace(1) %y, i64 4
  br label %outer

outer:                                            ; preds = %outer.end, %entry
  %i = phi i32 [ 0, %entry ], [ %i.next, %outer.end ]
  br label %inner

inner:                                            ; preds = %inner, %outer
  %j = phi i64 [ 0, %outer ], [ %j.next, %inner ]
  %k = phi <4 x i32> [ zeroinitializer, %outer ], [ %k.next, %inner ]
  %k.next = add <4 x i32> %k, splat (i32 1)
  %j.next = add i64 %j, %step
  %more = icmp ult i64 %j.next, 100
  br i1 %more, label %inner, label %outer.end

outer.end:                                        ; preds = %inner
  store i64 %j.next, ptr addrspace(1) %p, align 8, !dbg !2
  %i.next = add i32 %i, 1
  switch i32 %i.next, label %outer [
    i32 7, label %end
    i32 9, label %end
  ]

end:                                              ; preds = %outer.end, %outer.end
  ret void
}
"""
    function = Function(*DEFINITION.search(ir).groups()[1:])
    assert function.innermost_loops() == [{"inner"}]
    # At the end of `inner`: i, step, j.next, k.next, more. n is dead, y the address of a buffer, p an offset from it.
    assert function.live_registers() == 1 + 2 + 2 + 4 + 1


def test_a_figure_that_grew():
    codes = {"f_half_2": Code([], 9), "f_float_2": Code([], 11)}
    assert kernel_code.faults(codes, {"f_2": 11}) == []
    assert len(kernel_code.faults(codes, {"f_2": 10})) == len(kernel_code.faults(codes, {})) == 1
