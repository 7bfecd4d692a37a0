"""The executor of metal_on_cpu: small kernels whose results, counters and refusals are known."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.emulator import metal_on_cpu as moc
from tests.emulator.metal_on_cpu import toolchain

HEADER = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
METAL_NAMES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
HALVES = [torch.float16, torch.bfloat16]


def kernel(parameters: str, body: str, before: str = "", name: str = "k") -> moc.Kernel:
    return moc.compile(f"{HEADER}{before} [[kernel]] void {name}({parameters}) {{\n{body}\n}}\n")[name]


def run(k: moc.Kernel, threads: int, *arguments: torch.Tensor | bytes | None, group: int = 32, **options) -> moc.Report:
    return k.dispatch(threads=(threads, 1, 1), group=(group, 1, 1), arguments=arguments, **options)


def per_lane(expression: str, type_name: str = "float", before: str = "") -> torch.Tensor:
    """What each of the 32 lanes of a simdgroup computes; `lane` is its index, `x` is lane + 1."""
    y = torch.full((32,), -1, dtype={"float": torch.float32, "uint": torch.int32}[type_name])
    body = f"const {type_name} x = lane + 1;\n{before}\ny[lane] = {expression};"
    run(kernel(f"device {type_name}* y [[buffer(0)]], ushort lane [[thread_index_in_simdgroup]]", body), 32, y)
    return y


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but any NaN equals any other."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())).all())


# Types and conversions


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_to_float(dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    y = torch.empty(1 << 16)
    k = kernel(f"device const {METAL_NAMES[dtype]}* x, device float* y, uint i [[thread_position_in_grid]]",
               "y[i] = static_cast<float>(x[i]);")  # fmt: skip
    run(k, 1 << 16, x, y, group=1024)
    assert same_bits(y, x.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("convert", ["static_cast<T>(x[i])", "T(x[i])"])
def test_float_to_half_rounds_to_nearest_even(dtype, convert):
    """All halves, the middles between neighbours, and one unit to either side of each; overflow, subnormals, NaN."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()].sort().values
    middles = (halves[1:].double() + halves[:-1].double()).div(2).float()
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 65519.996, 65520.0, 3.4e38, 1e-45, -0.0])
    x = torch.cat([t for m in (halves, middles) for t in (m, m.nextafter(m + 1), m.nextafter(m - 1))] + [special])
    y = torch.empty(len(x), dtype=dtype)
    k = kernel("device const float* x, device T* y, uint i [[thread_position_in_grid]]", f"y[i] = {convert};",
               before=f"typedef {METAL_NAMES[dtype]} T;")  # fmt: skip
    run(k, len(x), x, y, group=1024)
    assert same_bits(y, x.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("operator", ["+", "-", "*", "/"])
def test_half_arithmetic_rounds_each_operation(dtype, operator):
    a, b, c = torch.randn(3, 4096).to(dtype)
    y = torch.empty(4096, dtype=dtype)
    k = kernel("device const T* a, device const T* b, device const T* c, device T* y, "
               "uint i [[thread_position_in_grid]]",
               f"y[i] = a[i] {operator} b[i] + c[i];", before=f"typedef {METAL_NAMES[dtype]} T;")  # fmt: skip
    run(k, 4096, a, b, c, y, group=256)
    operation = {"+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div}[operator]
    assert same_bits(y, operation(a, b) + c)


@pytest.mark.parametrize("dtype", METAL_NAMES, ids=str)
def test_vector_load_convert_store(dtype):
    x = torch.randn(256).to(dtype)
    y = torch.empty(256, dtype=dtype)
    k = kernel("device const T* x [[buffer(1)]], device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]",
               "float4 v = float4(reinterpret_cast<device const vec<T, 4>*>(x)[i]);\n"
               "v.xy = v.yx;\n"
               "reinterpret_cast<device vec<T, 4>*>(y)[i] = static_cast<vec<T, 4>>(v);",
               before=f"using T = {METAL_NAMES[dtype]};")  # fmt: skip
    run(k, 64, y, x)
    assert torch.equal(y.view(-1, 4), x.view(-1, 4)[:, [1, 0, 2, 3]])


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("dot(float4(1, 2, 3, 4), float4(x))", lambda x: 10 * x),
        ("float4(float2(x, 2), 3, 4).x", lambda x: x),
        ("float3(1, float2(2, x)).z", lambda x: x),
        ("float2(uint2(7, 9)).y", lambda x: 9 + 0 * x),
        ("as_type<float>(as_type<uint>(x) ^ 0x80000000u)", lambda x: -x),
        ("float(mulhi(0x80000000u, uint(x) * 2))", lambda x: x),
        ("float(mulhi(uint2(0xFFFFFFFFu), uint2(uint(x))).y)", lambda x: x - 1),
        ("float(mulhi(0x8000000000000000ul, ulong(x) * 2))", lambda x: x),
        ("float(rotate(uint(x), 32u))", lambda x: x),
        ("float(popcount(uint(x)) + clz(uint(1)))", lambda x: torch.tensor([bin(int(v)).count("1") for v in x]) + 31),
        ("select(1.0f, 2.0f, x > 16)", lambda x: torch.where(x > 16, 2.0, 1.0)),
        ("clamp(x, 3.0f, 30.0f) + min(x, 2.0f) * max(x, 5.0f)", lambda x: x.clamp(3, 30) + x.clamp(max=2) * x.clamp(5)),
        ("any(float2(x, 1) > 31.5f) ? 1.0f : 0.0f", lambda x: (x > 31.5).float()),
        ("all(float2(x, 40) > 31.5f) ? 1.0f : 0.0f", lambda x: (x > 31.5).float()),
        ("fma(x, x, 0.5f)", lambda x: x * x + 0.5),
        ("precise::sqrt(x * x) + fast::floor(x / 2)", lambda x: x + (x / 2).floor()),
        ("1.0 / x * 2", lambda x: 1 / x * 2),
    ],
)
def test_expression(expression, expected):
    x = torch.arange(1, 33).float()
    assert torch.equal(per_lane(expression), expected(x).float())


@pytest.mark.parametrize("function", ["exp", "log", "rsqrt", "tanh", "sin"])
def test_math_is_accurate(function):
    x = torch.arange(1, 33).double() / 8
    torch.testing.assert_close(per_lane(f"{function}(x / 8)").double(), getattr(x, function)(), rtol=2.0**-22, atol=0)


def test_uninitialised_variable_is_nan():
    assert per_lane("v[lane % 4] * (x > 0 ? 1 : v[0])", before="float v[4]; if (x < 0) v[0] = 1;").isnan().all()


def test_constants_templates_and_methods():
    k = kernel(
        "device float* y, constant Params& p, uint i [[thread_position_in_grid]]",
        "Scale<3> scale{p.factor.y};\ny[i] = scale.apply(TABLE[i % 4]) + LAST[1];",
        before="constant constexpr float TABLE[4] = {1, 2, 3, 4};\nconstant float LAST[] = {5, 6};\n"
        "struct Params { uint n; float2 factor; };\n"
        "template <int N> struct Scale { float by; float apply(float v) const { return v * by * N; } };",
    )
    y = torch.empty(8)
    run(k, 8, y, struct.pack("I4x2f", 8, 1.0, 0.5))
    assert torch.equal(y, torch.tensor([1.0, 2, 3, 4] * 2) * 1.5 + 6)


# Threads and SIMD groups


def test_thread_attributes_of_a_ragged_grid():
    body = "\n".join(
        f"out[at * 8 + {i}] = {value};"
        for i, value in enumerate(["p.x", "p.y", "t.x", "t.y", "g.x", "g.y", "index", "size.x * 100 + size.y"])
    )
    k = kernel(
        "device uint* out [[buffer(3)]], uint2 p [[thread_position_in_grid]], "
        "ushort2 t [[thread_position_in_threadgroup]], uint3 g [[threadgroup_position_in_grid]], "
        "uint index [[thread_index_in_threadgroup]], uint2 size [[threads_per_threadgroup]], "
        "uint2 grid [[threads_per_grid]]",
        f"const uint at = p.y * grid.x + p.x;\n{body}",
    )
    out = torch.zeros(3, 5, 8, dtype=torch.int32)
    report = k.dispatch(threads=(5, 3, 1), group=(4, 2, 1), arguments=[None, None, None, out])
    assert report.counters.threadgroups == 4
    for y in range(3):
        for x in range(5):
            width, height = (4, 1)[x // 4], (2, 1)[y // 2]
            index = y % 2 * width + x % 4
            assert out[y, x].tolist() == [x, y, x % 4, y % 2, x // 4, y // 2, index, width * 100 + height]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_sum(x)", [528] * 32),
        ("simd_max(x)", [32] * 32),
        ("simd_min(x)", [1] * 32),
        ("simd_xor(x)", [32] * 32),
        ("simd_or(x)", [63] * 32),
        ("simd_prefix_inclusive_sum(x)", [n * (n + 1) // 2 for n in range(1, 33)]),
        ("simd_prefix_exclusive_sum(x)", [n * (n - 1) // 2 for n in range(1, 33)]),
        ("simd_broadcast(x, 7)", [8] * 32),
        ("simd_shuffle(x, 31 - lane)", list(range(32, 0, -1))),
        ("simd_shuffle_xor(x, 1)", [(n ^ 1) + 1 for n in range(32)]),
        ("simd_shuffle_down(x, 4)", [n + 5 if n < 28 else n + 1 for n in range(32)]),
        ("simd_shuffle_up(x, 4)", [n - 3 if n >= 4 else n + 1 for n in range(32)]),
        ("simd_shuffle_rotate_down(x, 4)", [(n + 4) % 32 + 1 for n in range(32)]),
        ("quad_sum(x)", [n // 4 * 16 + 10 for n in range(32)]),
        ("uint(simd_vote::vote_t(simd_ballot(lane < 3)))", [7] * 32),
        ("simd_all(x > 0) + 2 * simd_any(x == 33) + 4 * simd_is_first()", [5] + [1] * 31),
    ],
)
def test_simd_operation(expression, expected):
    assert per_lane(expression, "uint").tolist() == expected


def test_partial_simdgroup_sums_the_lanes_it_has():
    y = torch.zeros(40)
    run(kernel("device float* y, uint i [[thread_position_in_grid]]", "y[i] = simd_sum(1.0f);"), 40, y, group=40)
    assert y.tolist() == [32.0] * 32 + [8.0] * 8


MATRIX = """
template <typename T>
[[kernel]] void product(device const T* a, device const T* b, device float* c, device T* out,
                        constant bool& transpose) {
    threadgroup T tile[8][12];
    simdgroup_matrix<T, 8, 8> ma, mb;
    simdgroup_float8x8 mc;
    simdgroup_load(ma, a, 10);
    simdgroup_load(mb, b, 16, ulong2(3, 1), transpose);
    simdgroup_load(mc, c);
    simdgroup_multiply_accumulate(mc, ma, mb, mc);
    simdgroup_store(mc, c);
    simdgroup_store(ma, &tile[0][1], 12);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(ma, &tile[0][1], 12, ulong2(0, 0), true);
    simdgroup_store(ma, out);
}
template [[host_name("float")]] [[kernel]] decltype(product<float>) product<float>;
template [[host_name("half")]] [[kernel]] decltype(product<half>) product<half>;
template [[host_name("bfloat")]] [[kernel]] decltype(product<bfloat>) product<bfloat>;
"""


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", METAL_NAMES, ids=str)
def test_simdgroup_matrix(dtype, transpose, trace):
    """Integers, so that sums are exact in any order."""
    a, b = torch.randint(-8, 9, (8, 10)).to(dtype), torch.randint(-8, 9, (16, 16)).to(dtype)
    c = torch.randint(-8, 9, (8, 8)).float()
    block = b[1:9, 3:11].float()
    expected = c + a[:, :8].float() @ (block.T if transpose else block)
    out = torch.empty(8, 8, dtype=dtype)
    k = moc.compile(HEADER + MATRIX)[METAL_NAMES[dtype]]
    report = run(k, 32, a, b, c, out, bytes([transpose]), trace=trace)
    assert report.findings == []
    assert torch.equal(c, expected)
    assert torch.equal(out, a[:, :8].T)
    assert report.counters.matrix_multiplies == 1


# Modes, counters, limits


SUMS = """
[[kernel]] [[max_total_threads_per_threadgroup(128)]]
void sums(device const float* x [[buffer(0)]], device float* y [[buffer(2)]], constant uint& columns [[buffer(1)]],
          uint row [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]],
          uint size [[threads_per_threadgroup]], uint group [[simdgroup_index_in_threadgroup]],
          uint lane [[thread_index_in_simdgroup]]) {
    threadgroup float partial[32], total;
    float sum = 0;
    for (uint i = t; i < columns; i += size) sum += x[row * columns + i];
    sum = simd_sum(sum);
    if (lane == 0) partial[group] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t == 0) {
        total = 0;
        for (uint i = 0; i < size / 32; ++i) total += partial[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[row * size + t] = total;
}
"""


@pytest.mark.parametrize("order", ["forward", "reverse", "permuted"])
@pytest.mark.parametrize("trace", [False, True])
def test_orders_and_modes_agree(order, trace):
    x, y = torch.randn(7, 1000), torch.full((7, 128), float("nan"))
    k = moc.compile(HEADER + SUMS)["sums"]
    report = run(k, 7 * 128, x, struct.pack("I", 1000), y, group=128, trace=trace, order=order)
    assert report.findings == []
    reference = torch.empty_like(y)
    run(k, 7 * 128, x, struct.pack("I", 1000), reference, group=128)
    assert torch.equal(y, reference)
    torch.testing.assert_close(y, x.sum(1, keepdim=True).expand(7, 128))


def test_counters_are_exact():
    x, y = torch.randn(7, 1000), torch.empty(7, 128)
    counters = run(moc.compile(HEADER + SUMS)["sums"], 7 * 128, x, struct.pack("I", 1000), y, group=128,
                   trace=True).counters  # fmt: skip
    assert counters.loaded[0] == x.nbytes
    assert counters.stored[2] == y.nbytes
    assert sum(counters.loaded) == x.nbytes
    assert sum(counters.stored) == y.nbytes
    assert counters.constant_loaded > 0
    assert counters.constant_loaded % 4 == 0
    assert counters.threadgroups == 7
    assert counters.barriers == 7 * 2
    assert counters.threadgroup_bytes == 33 * 4


CHAIN = """
[[kernel]] void chain(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                      constant uint& passes [[buffer(2)]], uint t [[thread_index_in_threadgroup]],
                      uint group [[threadgroup_position_in_grid]],
                      ushort simdgroup [[simdgroup_index_in_threadgroup]]) {
    threadgroup float shared[64];
    simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), b = a, sum = a;
    float total = 0;
    for (uint i = 0; i < passes; ++i) total += x[t + i] + x[t + 64 + i];
    for (uint i = 0; i < 3 * simdgroup; ++i) simdgroup_multiply_accumulate(sum, a, b, sum);
    shared[t] = simd_sum(total) + sum.thread_elements()[0];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[group * 64 + t] = shared[63 - t] + (group == 1 ? x[t] : 0.0f);
}
"""


def test_the_longest_chain():
    """Loads of one pass of a loop are one step, a barrier ends it; of the threadgroup and simdgroup that have most."""
    x, y, passes = torch.randn(200), torch.full((3, 64), torch.nan), struct.pack("I", 5)
    k = moc.compile(HEADER + CHAIN)["chain"]
    counters = run(k, 3 * 64, x, y, passes, group=64, trace=True).counters
    assert (counters.longest_steps, counters.longest_multiplies, counters.longest_collectives) == (5 + 1, 3, 1)
    assert counters.threadgroup_accessed == 3 * 64 * 2 * 4
    y.fill_(torch.nan)
    counters = run(k, 3 * 64, x, y, passes, group=64, trace=True, most_groups=1).counters
    assert (counters.threadgroups, counters.longest_steps) == (1, 5)
    assert y.isnan().all(1).tolist() == [False, True, True]


def test_load_and_store_of_one_element_both_count():
    k = kernel("device float* y, uint i [[thread_position_in_grid]]", "y[i] += 1;")
    counters = run(k, 32, torch.zeros(32), trace=True).counters
    assert (counters.loaded[0], counters.stored[0]) == (128, 128)


def test_tensor_is_bound_from_its_first_element():
    storage = torch.zeros(10)
    run(kernel("device float* y, uint i [[thread_position_in_grid]]", "y[i] += i + 1;"), 3, storage[4:6])
    assert storage.tolist() == [0, 0, 0, 0, 1, 2, 3, 0, 0, 0]


@pytest.mark.parametrize("trace", [False, True])
def test_overlapping_tensors_stay_one_memory(trace):
    storage = torch.arange(8.0)
    k = kernel("device float* y, device const float* x, uint i [[thread_position_in_grid]]", "y[i] = x[i] * 2;")
    run(k, 4, storage[4:], storage, trace=trace)
    assert storage.tolist() == [0, 1, 2, 3, 0, 2, 4, 6]


def test_overlapping_tensors_of_two_types_are_checked_by_the_smaller():
    storage = torch.zeros(8)
    k = kernel("device half* y, device const float* x, uint i [[thread_position_in_grid]]", "y[i] = i;")
    assert run(k, 16, storage.view(torch.float16), storage, trace=True).findings == []
    assert storage.view(torch.float16).tolist() == list(range(16))


SHARED = "threadgroup float s[1];\nif (t == 0) s[0] = 1;\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
SIMDGROUP_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);\n"


@pytest.mark.parametrize("order", ["forward", "reverse", "permuted"])
@pytest.mark.parametrize(
    ("body", "races"),
    [
        # The last reader stores: what races with it is a reader before.
        ("if (t < 2) y[t] = s[0];\nif (t == 1) s[0] = 2;", True),
        ("if (t % 32 == 0) y[t] = s[0];\nif (t == 32) s[0] = 2;", True),
        ("if (t % 32 == 0) y[t] = s[0];\nif (t == 0) s[0] = 2;", True),
        # A simdgroup barrier orders its own simdgroup, not a reader of the other.
        (f"if (t % 32 == 0) y[t] = s[0];\n{SIMDGROUP_BARRIER}if (t == 33) s[0] = 2;", True),
        (f"if (t < 32) y[t] = s[0];\n{SIMDGROUP_BARRIER}if (t == 1) s[0] = 2;", False),
        (f"if (t < 32) y[t] = s[0];\n{SIMDGROUP_BARRIER}if (t == 32) s[0] = 2;", True),
        ("if (t == 1) y[t] = s[0];\nif (t == 1) s[0] = 2;", False),
    ],
)
def test_store_after_loads(body, races, order):
    k = kernel("device float* y, uint t [[thread_index_in_threadgroup]]", SHARED + body)
    kinds = {finding.kind for finding in run(k, 64, torch.zeros(64), group=64, trace=True, order=order).findings}
    assert kinds == ({"race"} if races else set())


@pytest.mark.parametrize("order", ["forward", "reverse", "permuted"])
def test_store_after_loads_of_two_threadgroups(order):
    body = "y[1 + g] = y[0];\nif (g == 1) y[0] = 1;"
    k = kernel("device float* y, uint g [[threadgroup_position_in_grid]]", body)
    findings = run(k, 2, torch.zeros(3), group=1, trace=True, order=order).findings
    assert {finding.kind for finding in findings} == {"group-race"}


def test_store_through_a_cast_to_a_constant_buffer():
    k = kernel("device const float* x, uint i [[thread_position_in_grid]]", "((device float*)x)[i] = 1;")
    (finding,) = run(k, 8, torch.zeros(8), trace=True).findings
    assert (finding.kind, finding.line) == ("out-of-bounds", 5)
    assert "which the kernel may not store to" in finding.message


def test_threadgroup_memory_is_fresh_in_every_threadgroup():
    body = "threadgroup float s[32];\nif (g == 0) s[t] = 1;\ny[g * 32 + t] = s[t];"
    k = kernel("device float* y, uint g [[threadgroup_position_in_grid]], "
               "uint t [[thread_index_in_threadgroup]]", body)  # fmt: skip
    y = torch.zeros(2, 32)
    run(k, 64, y)
    assert (y[0] == 1).all()
    assert y[1].isnan().all()


def test_finding_names_line_thread_and_threadgroup():
    k = kernel(
        "device float* y, uint i [[thread_position_in_grid]]", "y[i] = 1;\ny[i == 70 ? 200 : i] = 2;", name="late"
    )
    report = run(k, 100, torch.zeros(100), trace=True)
    (finding,) = report.findings
    assert (finding.kind, finding.kernel, finding.line) == ("out-of-bounds", "late", 6)
    assert (finding.thread, finding.threadgroup) == ((6, 0, 0), (2, 0, 0))
    assert "byte 800 of buffer 0 (y), which has 400 bytes" in finding.message
    with pytest.raises(moc.ExecutionError, match=r"late:6: out-of-bounds.*byte 800 of buffer 0 \(y\)"):
        run(k, 100, torch.zeros(100))


def test_overrun_of_a_program_scope_constant():
    table = "constant constexpr float TABLE[6] = {1, 2, 3, 4, 5, 6};\nconstant float OTHER[4] = {1, 2, 3, 4};\n"
    body = "constant const float* table = TABLE;\ny[i] = table[i] + OTHER[i % 4];"
    k = kernel("device float* y, uint i [[thread_position_in_grid]]", body, table)
    y = torch.zeros(6)
    assert run(k, 6, y, trace=True).findings == []
    assert y.tolist() == [2, 4, 6, 8, 6, 8]
    (finding,) = run(k, 7, torch.zeros(7), trace=True).findings
    assert (finding.kind, finding.line, finding.thread) == ("out-of-bounds", 8, (6, 0, 0))
    assert "byte 24 of constant TABLE, which has 24 bytes" in finding.message


def test_dispatch_after_a_fatal_finding():
    k = kernel("device float* y, uint i [[thread_position_in_grid]]", "y[i] = 1;")
    with pytest.raises(moc.ExecutionError):
        run(k, 64, torch.zeros(8))
    y = torch.zeros(64)
    run(k, 64, y)
    assert y.sum() == 64


def test_limits():
    k = moc.compile(HEADER + SUMS)["sums"]
    assert k.max_total_threads == 128
    with pytest.raises(moc.LimitError, match="160 threads a threadgroup; its max_total_threads_per_threadgroup is 128"):
        run(k, 160, torch.zeros(1), bytes(4), torch.zeros(160), group=160)
    fill = kernel("device float* y, uint i [[thread_position_in_grid]]", "y[i] = 1;")
    with pytest.raises(moc.LimitError, match="1056 threads"):
        run(fill, 1056, torch.zeros(1056), group=1056)
    with pytest.raises(moc.LimitError, match="32 buffers"):
        run(fill, 1, *[None] * 32)
    big = "threadgroup float a[4096], b[4096]; threadgroup half c;\na[i] = b[i] = c = 0;\ny[i] = 0;"
    with pytest.raises(moc.LimitError, match="32770 bytes of threadgroup memory with c"):
        run(kernel("device float* y, uint i [[thread_position_in_grid]]", big), 1, torch.zeros(1))
    with pytest.raises(moc.CompileError, match=r"metal:5: buffer index 31"):
        kernel("\ndevice float* y [[buffer(31)]]", "y[0] = 1;")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([bytes(64), bytes(8)], TypeError, "buffer 0 is written by the kernel"),
        ([torch.zeros(8), bytes(4)], ValueError, "buffer 1 takes 8 bytes"),
        ([torch.zeros(8), bytes(8), bytes(8)], ValueError, "has no buffer 2"),
        ([torch.zeros(8), 3], TypeError, "buffer 1 is a tensor, bytes or None, not int"),
        ([torch.zeros(8, device="meta"), bytes(8)], TypeError, "buffer 0 is a tensor on meta"),
    ],
)
def test_argument_errors(arguments, error, message):
    k = kernel("device float* y, constant uint2& n, uint i [[thread_position_in_grid]]", "y[i] = n.x;")
    with pytest.raises(error, match=message):
        run(k, 8, *arguments)


def test_dispatch_errors():
    k = kernel("device float* y, uint i [[thread_position_in_grid]]", "y[i] = 1;")
    with pytest.raises(ValueError, match="order is one of"):
        run(k, 1, torch.zeros(1), order="backward")
    with pytest.raises(ValueError, match="three extents"):
        k.dispatch(threads=(1, 1), group=(1, 1, 1), arguments=[torch.zeros(1)])
    with pytest.raises(KeyError, match="no kernel 'z' in metal; it has k"):
        moc.compile(f"{HEADER}[[kernel]] void k(device float* y) {{ y[0] = 1; }}")["z"]


def test_kernel_describes_its_arguments():
    k = moc.compile(HEADER + SUMS)["sums"]
    assert [(a.index, a.name, a.space, a.type) for a in k.arguments] == [
        (0, "x", "device", "const float"),
        (1, "columns", "constant", "uint"),
        (2, "y", "device", "float"),
    ]


AMBIGUOUS = "namespace a { enum { twice }; } namespace b { enum { first, twice }; }"


@pytest.mark.parametrize(
    ("parameters", "body", "message"),
    [
        ("device float* y", "y[0] = z;", "metal:5:8: error: use of undeclared identifier 'z'"),
        ("device float* y, uint i", "y[i] = 1;", "metal:4: parameter needs an attribute"),
        ("device float* y [[buffer(0)]], device float* z [[buffer(0)]]", "", "two parameters have buffer index 0"),
        ("device float* y [[buffer(twice)]]", "", "metal:4: a buffer index is .* not 'twice'"),
        ("device float* y [[buffer(other)]]", "", "metal:4: a buffer index is .* not 'other'"),
        ("device float* y, uint i [[vertex_id]]", "", "unsupported parameter attribute"),
        ("device float* y", "double d = 1; y[0] = d;", "metal:5.*double"),
        ("device float* y", "threadgroup float* p = y; p[0] = 1;", "metal:5.*__local"),
        ("constant float* y", "y[0] = 1;", "metal:5.*read-only"),
        ("device float* y", "float4 v = float4(1, 2, 3);", "wrong number of vector components"),
    ],
)
def test_compile_errors_name_the_line(parameters, body, message):
    with pytest.raises(moc.CompileError, match=message):
        kernel(parameters, body, AMBIGUOUS)


def test_strict_checks_thread_pointers_and_lints():
    source = HEADER + "[[kernel]] void k(device float* y) {\nthread float* p = y;\np[0] = 1;\n}\n"
    assert moc.compile(source)["k"].max_total_threads == 1024
    with pytest.raises(moc.CompileError, match="metal:5"):
        moc.compile(source, strict=True)
    with pytest.raises(moc.CompileError, match="metal:5: static-local"):
        moc.compile(source.replace("thread float* p = y;", "static int s; float p[1];"), strict=True)


IN_NAMESPACES = """
namespace ours {
using namespace metal;
enum class Mask { none, all };
template <typename T, Mask mask> [[kernel, max_total_threads_per_threadgroup(64)]]
void scaled(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    y[i] = mask == Mask::all ? max(T(3), T(2)) : T(1);
}
}
namespace theirs {
template <typename T, int n> [[kernel]] void scaled(constant uint& m [[buffer(0)]], device T* y [[buffer(1)]]) {
    y[m] = n;
}
}
template [[host_name("all")]] [[kernel]] decltype(ours::scaled<float, ours::Mask::all>)
    ours::scaled<float, ours::Mask::all>;
template [[host_name("none")]] [[kernel]] decltype(::ours::scaled<half, ours::Mask::none>)
    ::ours::scaled<half, ours::Mask::none>;
template [[host_name("theirs")]] [[kernel]] decltype(theirs::scaled<float, 2>) theirs::scaled<float, 2>;
"""


def test_buffer_indices_are_enumerators():
    """Counted on, written out, and a product."""
    k = kernel(
        "device uint* y [[buffer(Y)]], constant uint& a [[buffer(A)]], constant uint& b [[buffer(B)]]",
        "y[0] = 10 * a + b;",
        "namespace n { enum Sizes { TWO = 2, }; enum Buffers { B, Y, A = 3*TWO, }; } using namespace n;",
    )
    assert [(a.index, a.name) for a in k.arguments] == [(0, "b"), (1, "y"), (6, "a")]
    y, a, b = torch.zeros(1, dtype=torch.int32), struct.pack("I", 4), struct.pack("I", 2)
    run(k, 1, b, y, None, None, None, None, a)
    assert y.tolist() == [42]


def test_instantiations_that_name_a_namespace():
    """Each finds the kernel of its namespace, also where two have one name."""
    library = moc.compile("#include <metal_stdlib>" + IN_NAMESPACES, "spaces", strict=True)
    y, halves, other = torch.zeros(8), torch.zeros(8, dtype=torch.float16), torch.zeros(8)
    run(library["all"], 8, y)
    run(library["none"], 8, halves)
    run(library["theirs"], 1, struct.pack("I", 5), other)
    assert y.tolist() == [3] * 8
    assert halves.tolist() == [1] * 8
    assert other.tolist() == [0] * 5 + [2] + [0] * 2
    assert (library["all"].max_total_threads, library["theirs"].max_total_threads) == (64, 1024)
    (finding,) = run(library["all"], 9, torch.zeros(8), trace=True).findings
    assert (finding.kind, finding.line) == ("out-of-bounds", 7)


@pytest.mark.parametrize("name", ["scaled", "others::scaled", "ours::other"])
def test_instantiations_must_name_the_namespace(name):
    wrong = IN_NAMESPACES.replace("ours::scaled<float,", f"{name}<float,")
    with pytest.raises(moc.CompileError, match=f"spaces:15: no kernel is defined before this instantiation: {name}<"):
        moc.compile("#include <metal_stdlib>" + wrong, "spaces")


# The cache


def test_compiled_kernels_are_found_again_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FUSED_LORA_CACHE", str(tmp_path))
    text = f"{HEADER}[[kernel]] void k(device float* y) {{ y[0] = {os.getpid()}; }}\n"
    first = moc.compile.__wrapped__(text, "cached").source.fast[0]
    stamp = first.stat().st_mtime_ns
    assert first.parent == tmp_path
    assert moc.compile.__wrapped__(text, "cached").source.fast[0] == first
    assert first.stat().st_mtime_ns == stamp
    assert moc.compile.__wrapped__(text.replace("y[0]", "y[1]"), "cached").source.fast[0] != first


def test_processes_may_build_the_same_kernel_at_once(tmp_path):
    program = (
        "import torch\nfrom tests.emulator import metal_on_cpu as moc\ny = torch.zeros(4)\n"
        "k = moc.compile('[[kernel]] void k(device float* y, uint i [[thread_position_in_grid]]) { y[i] = i; }')['k']\n"
        "k.dispatch(threads=(4, 1, 1), group=(4, 1, 1), arguments=[y])\nassert y.tolist() == [0, 1, 2, 3]\n"
    )
    environment = {**os.environ, "TORCH_FUSED_LORA_CACHE": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".so"}


def test_other_machines_get_one_clear_error(monkeypatch):
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "aarch64")
    with pytest.raises(moc.ToolError, match="x86-64 Linux only; this is linux aarch64"):
        toolchain.compiler_version.__wrapped__()
