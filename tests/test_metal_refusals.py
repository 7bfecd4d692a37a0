"""What the executor refuses before a kernel runs: dispatches beyond a limit, source that mixes address spaces.

What the lint refuses stands in test_metal_lint.py.
"""

from __future__ import annotations

import pytest
import torch

import metal_on_cpu as moc

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


def test_strict_runs_the_lint() -> None:
    source = HEADER + "[[kernel]] void strict(device bfloat* y, constant float& x) {\n    *y = x;\n}\n"
    with pytest.raises(moc.CompileError, match=r"strict:4: bfloat"):
        moc.compile(source, "strict", strict=True)
    assert "strict" in moc.compile(source, "strict")
