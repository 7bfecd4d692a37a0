"""What the executor refuses before a kernel runs: dispatches beyond a limit, source that mixes address spaces.

What the lint refuses stands in test_metal_lint.py.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests.emulator import metal_on_cpu as moc

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"

# ---- limits

LIMITS = (
    HEADER
    + """
[[kernel, max_total_threads_per_threadgroup(64)]] void sixty_four(device float* y, uint i [[thread_position_in_grid]]) {
    y[i] = 1;
}
template <uint SIZE, uint MORE> [[kernel]] void scratch(device float* y, uint t [[thread_index_in_threadgroup]]) {
    threadgroup float tile[SIZE];
    threadgroup float more[MORE];
    tile[SIZE - 1] = 1;
    more[MORE - 1] = 2;
    y[t] = tile[SIZE - 1] + more[MORE - 1];
}
template [[host_name("full")]] [[kernel]] decltype(scratch<8000, 192>) scratch<8000, 192>;
template [[host_name("one_array_over")]] [[kernel]] decltype(scratch<8192, 1>) scratch<8192, 1>;
template [[host_name("together_over")]] [[kernel]] decltype(scratch<8000, 193>) scratch<8000, 193>;
"""
)


@pytest.mark.parametrize(
    ("kernel", "group", "buffers"),
    [
        ("sixty_four", 65, 1),
        ("sixty_four", 1024, 1),
        ("full", 1025, 1),
        ("full", 2048, 1),
        ("one_array_over", 1, 1),
        ("together_over", 1, 1),
        ("full", 1, 32),
    ],
)
@pytest.mark.parametrize("trace", [False, True])
def test_limit_exceeded(kernel: str, group: int, buffers: int, trace: bool) -> None:
    library = moc.compile(LIMITS, "limits", strict=True)
    arguments = [torch.zeros(2048)] + [None] * (buffers - 1)
    with pytest.raises(moc.LimitError, match=kernel):
        library[kernel].dispatch(threads=(group, 1, 1), group=(group, 1, 1), arguments=arguments, trace=trace)


@pytest.mark.parametrize(("kernel", "group", "buffers"), [("sixty_four", 64, 1), ("full", 1, 31), ("full", 1, 1)])
def test_limit_reached(kernel: str, group: int, buffers: int) -> None:
    y = torch.full((64,), torch.nan)
    arguments = [y] + [None] * (buffers - 1)
    kernel = moc.compile(LIMITS, "limits", strict=True)[kernel]
    report = kernel.dispatch(threads=(group, 1, 1), group=(group, 1, 1), arguments=arguments, trace=True)
    assert report.findings == []
    assert not y[:group].isnan().any()


# ---- what the compiler refuses

REFUSED = {
    "device pointer to threadgroup memory": ("device float* p = tile;", "threadgroup float* p = tile;"),
    "threadgroup pointer to a buffer": ("threadgroup float* p = y;", "device float* p = y;"),
    "device pointer to a constant": ("device const float* p = c;", "constant float* p = c;"),
    "device pointer to a variable": ("device float* p = &local;", "thread float* p = &local;"),
    "store to a constant": ("c[0] = 1;", "y[0] = c[0];"),
    "constant as a device argument": ("take(c);", "take(y);"),
    "half as bfloat": ("bfloat b = half(local);", "bfloat b = bfloat(float(half(local)));"),
    "buffer 31": (
        "} [[kernel]] void other(device float* z [[buffer(31)]]) {",
        "} [[kernel]] void other(device float* z [[buffer(30)]]) {",
    ),
}
REFUSED_IN = (
    HEADER
    + """
void take(device const float* p) {}
[[kernel]] void mixed(device float* y [[buffer(0)]], constant float* c [[buffer(1)]]) {
    threadgroup float tile[8];
    float local = 0;
    LINE
}
"""
)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    line = REFUSED_IN.count("\n", 0, REFUSED_IN.index("LINE")) + 1
    with pytest.raises(moc.CompileError, match=f"mixed:{line}:"):
        moc.compile(REFUSED_IN.replace("LINE", REFUSED[what][0]), "mixed")


def test_repaired_compiles() -> None:
    blocks = "".join(right if "kernel" in right else f"{{ {right} }}\n" for _, right in REFUSED.values())
    assert "mixed" in moc.compile(REFUSED_IN.replace("LINE", blocks), "repaired", strict=True)


# ---- what Metal has no overload for

OVERLOADS = {
    "min(u, i)": "min(u, uint(i))",
    "max(s, 1)": "max(s, short(1))",
    "min(u, us)": "min(u, uint(us))",
    "max(f, 0)": "max(f, 0.0f)",
    "max(h, 0.0f)": "max(h, 0.0h)",
    "min(ul, u)": "min(ul, ulong(u))",
    "max(b, b)": "max(float(b), float(b))",
    "min<float>(f, f)": "min(f4, 1.0f)",
    "clamp(u, 0, 1)": "clamp(u, 0u, 1u)",
    "clamp(h, 0.0h, 1.0f)": "clamp(f4, 0.0f, 1.0f)",
    "rotate(u, 16)": "rotate(u, 16u)",
    "rotate(f, f)": "rotate(us, ushort(3))",
    "fma(f, f, h)": "fma(f, f, float(h))",
    "rsqrt(u)": "rsqrt(float(u))",
    "exp(i)": "exp(float(i))",
    "precise::exp(i)": "precise::exp(f4)",
    "popcount(f)": "popcount(u)",
    "dot(b4, b4)": "dot(float4(b4), float4(b4))",
    "simd_sum(b)": "simd_sum(float(b))",
    "simd_sum(b4)": "simd_sum(f4)",
    "simd_max(u > 1)": "simd_max(uint(u > 1))",
    "simd_sum(ul)": "simd_sum(us)",
    "simd_prefix_exclusive_sum(ul)": "simd_prefix_exclusive_sum(u)",
    "simd_shuffle(ul, 1)": "simd_shuffle(h, 1)",
    "simd_shuffle_xor(u > 1, 1)": "simd_shuffle_xor(u, 1)",
    "simd_shuffle_down(b, 1)": "simd_shuffle_down(float(b), 1)",
    "simd_broadcast_first(long2(1))": "simd_broadcast_first(int2(1))",
    "quad_sum(b)": "quad_sum(f)",
    "metal::as_type<uint>(f)": "as_type<uint>(f) + nested::bits(f) + metal::min(u, 1u)",
    "simdgroup_multiply_accumulate(m, simdgroup_float8x8(1), n, m)": "simdgroup_multiply_accumulate(m, n, n, m)",
    "simdgroup_multiply_accumulate(m, n, c, m)": "simdgroup_multiply_accumulate(m, n, n, n)",
    "simdgroup_multiply(m, n, c)": "simdgroup_multiply(m, n, n)",
}
OVERLOADS_IN = (
    HEADER.replace("using", "#include <metal_simdgroup_matrix>\nusing")
    + """
namespace nested { uint bits(float x) { return as_type<uint>(x); } }
[[kernel]] void calls(device float* y, device uint* z, device half* w) {
    uint u = *z; int i = u; short s = i; ushort us = u; ulong ul = u;
    float f = *y; half h = *w; bfloat b = bfloat(f);
    float4 f4(f); bfloat4 b4(b);
    simdgroup_float8x8 m(1), n(1);
    const simdgroup_float8x8 c(1);
LINES
}
"""
)


@pytest.fixture(scope="module")
def ambiguous() -> set[str]:
    """The calls that the compiler refuses, all compiled at once."""
    first = OVERLOADS_IN.count("\n", 0, OVERLOADS_IN.index("LINES")) + 1
    with pytest.raises(moc.CompileError) as refused:
        moc.compile(OVERLOADS_IN.replace("LINES", "\n".join(f"{call};" for call in OVERLOADS)), "calls")
    lines = {int(line) for line in re.findall(r"^calls:(\d+):\d+: error: ", str(refused.value), re.MULTILINE)}
    calls = list(OVERLOADS)
    return {calls[line - first] for line in lines}


@pytest.mark.parametrize("call", OVERLOADS)
def test_call_without_an_overload_is_refused(call: str, ambiguous: set[str]) -> None:
    assert call in ambiguous


def test_calls_with_an_overload_compile() -> None:
    lines = "".join(f"{call};\n" for call in OVERLOADS.values())
    assert "calls" in moc.compile(OVERLOADS_IN.replace("LINES", lines), "calls", strict=True)


def test_strict_runs_the_lint() -> None:
    source = HEADER + "[[kernel]] void strict(device bfloat* y, constant float& x) {\n    *y = x;\n}\n"
    with pytest.raises(moc.CompileError, match=r"strict:4: bfloat"):
        moc.compile(source, "strict", strict=True)
    assert "strict" in moc.compile(source, "strict")
