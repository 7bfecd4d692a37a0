"""The kernels of metal/, executed as the launch plan of csrc/ says, against float64.

Bounds are those of `reference.Exact`: float32 sums of n products, then one rounding to the result's dtype where that
is a half type. `lora_delta` and `lora_decode` round once; h, z and the gradients round once to the adapters' dtype.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import ROOT
from tests.budget import examples
from tests.emulator import metal_on_cpu
from tests.kernels.launch_plan import Kernels, assemble
from tests.mutation import EDITS, METAL
from tests.reference import MIXED, Exact
from torch_fused_lora.ops.dropout.operator import gpu_mask, philox

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ORDERS = ("forward", "reverse", "permuted")
SEED, SCALING = 0x1234_5678_9ABC_DEF, 0.625


def dtype_id(value: object) -> str:
    return str(value).removeprefix("torch.")


all_dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED, ids=dtype_id)


def randn(*shape: int, dtype: torch.dtype = F32, layout: str = "contiguous") -> Tensor:
    """Normal numbers in one of the memory layouts that torch hands over."""
    *leading, rows, cols = shape
    if layout == "contiguous":
        return torch.randn(shape).to(dtype)
    if layout == "offset":  # a slice with an odd storage offset and row stride
        return torch.randn(*leading, rows, cols + 3).to(dtype)[..., 1 : cols + 1]
    if layout == "transposed":
        return torch.randn(*leading, cols, rows).to(dtype).transpose(-1, -2)
    assert layout == "expanded"
    return torch.randn(*leading, 1, cols).to(dtype).expand(shape)


LAYOUTS = ("contiguous", "offset", "transposed", "expanded")


def f64(x: Tensor) -> Tensor:
    return x.double().reshape(-1, x.shape[-1])


def masks(rows: int, cols: int, dropout_p: tuple[float, ...], ranks: tuple[int, ...], r: int):
    """(ranks of an adapter, what multiplies its side of an M x K matrix), as ops/dropout/ defines it."""
    if not dropout_p:
        return [(slice(0, r), 1.0)]
    found, begin = [], 0
    for stream, (p, rank) in enumerate(zip(dropout_p, ranks or (r,), strict=True)):
        keep = gpu_mask(SEED, stream, 0, rows * cols, round(p * 2**32)).view(rows, cols)
        mask = keep.double() / (1 - p) if p else 1.0
        found.append((slice(begin, begin + rank), mask))
        begin += rank
    return found


def exact_h(x: Tensor, lora_A: Tensor, dropout_p=(), ranks=()) -> Exact:
    x, A = f64(x), lora_A.double()
    groups = masks(*x.shape, dropout_p, ranks, len(A))
    value = torch.cat([(x * mask) @ A[rank].T for rank, mask in groups], 1)
    magnitude = torch.cat([(x * mask).abs() @ A[rank].abs().T for rank, mask in groups], 1)
    return Exact(value, magnitude, x.shape[1])


def exact_decode(x, weight, bias, lora_A, lora_B, s) -> Exact:
    h = exact_h(x, lora_A)
    x, W, B = f64(x), weight.double(), lora_B.double()
    b = bias.double() if bias is not None else x.new_zeros(len(W))
    magnitude = x.abs() @ W.abs().T + b.abs() + abs(s) * h.magnitude @ B.abs().T
    return Exact(x @ W.T + b + s * h.value @ B.T, magnitude, x.shape[1] + len(lora_A) + 1)


def exact_delta(y, x, lora_A, lora_B, s, dropout_p=(), ranks=()) -> Exact:
    """One rounding; where adapters drop apart, one a launch, so all but the last join what was rounded before."""
    h, B = exact_h(x, lora_A, dropout_p, ranks), lora_B.double()
    delta = abs(s) * h.magnitude @ B.abs().T
    launches = max(len(dropout_p), -(-len(lora_A) // 256))
    value, magnitude = y.double() + s * h.value @ B.T, y.double().abs() + delta
    return Exact(value, magnitude, x.shape[-1] + len(lora_A) + 1, (launches - 1) * magnitude)


def exact_dx(dx, dy, lora_A, lora_B, s, dropout_p=(), ranks=()) -> Exact:
    z = exact_h(dy, lora_B.T)
    groups = masks(*dx.shape, dropout_p, ranks, len(lora_A))
    A, value, magnitude = lora_A.double(), dx.double(), dx.double().abs()
    for rank, mask in groups:
        value = value + s * (z.value[:, rank] @ A[rank]) * mask
        magnitude = magnitude + abs(s) * (z.magnitude[:, rank] @ A[rank].abs()) * mask
    launches = max(len(dropout_p), -(-len(lora_A) // 256))
    return Exact(value, magnitude, dy.shape[-1] + len(lora_A) + 1, (launches - 1) * magnitude)


def exact_grads(x, z, dy, h, s, dropout_p=(), ranks=()) -> tuple[Exact, Exact]:
    x, z, dy, h = f64(x), z.double(), f64(dy), h.double()
    dA, dA_magnitude = [], []
    for rank, mask in masks(*x.shape, dropout_p, ranks, z.shape[1]):
        dA.append(s * z[:, rank].T @ (x * mask))
        dA_magnitude.append(abs(s) * z[:, rank].abs().T @ (x * mask).abs())
    dB, dB_magnitude = s * dy.T @ h, abs(s) * dy.abs().T @ h.abs()
    return Exact(torch.cat(dA), torch.cat(dA_magnitude), len(x)), Exact(dB, dB_magnitude, len(x))


def layer(M, K, N, r, dtype=F32, adapter_dtype=F32, layout="contiguous"):
    """x, weight, bias, lora_A, lora_B, dy."""
    return (
        randn(M, K, dtype=dtype, layout=layout),
        randn(N, K, dtype=dtype),
        torch.randn(N).to(dtype),
        randn(r, K, dtype=adapter_dtype) / 4,
        randn(N, r, dtype=adapter_dtype) / 4,
        randn(M, N, dtype=dtype, layout=layout),
    )


def run_all(kernels: Kernels, operands, dropout_p=(), ranks=(), scaling=SCALING) -> dict[str, Tensor]:
    """Forward and backward of one layer, kernel by kernel, as the extension launches them."""
    x, weight, bias, A, B, dy = operands
    M, K, N = f64(x).shape[0], weight.shape[1], weight.shape[0]
    found = {}
    if M <= 8 and not dropout_p and len(A) <= 256:
        found["decode"], found["decode h"] = kernels.decode(x, weight, bias, A, B, scaling, save_h=True)
    y, dx = start(M, N, x.dtype), start(M, K, x.dtype)
    found["h"] = kernels.delta(y, x, A, B, scaling, SEED, dropout_p, ranks, save_h=True)
    found["z"] = kernels.delta_dx(dx, dy, A, B, scaling, SEED, dropout_p, ranks, save_z=True)
    found["y"], found["dx"] = y, dx
    found["dA"], found["dB"] = kernels.grad(x, found["z"], dy, found["h"], A, B, scaling, SEED, dropout_p, ranks)
    return found


def start(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """What y and dx hold before the kernels add to them."""
    return torch.linspace(-3, 3, rows * cols).to(dtype).view(rows, cols)


def check_all(found: dict[str, Tensor], operands, dropout_p=(), ranks=(), scaling=SCALING) -> None:
    x, weight, bias, A, B, dy = operands
    M, K, N = f64(x).shape[0], weight.shape[1], weight.shape[0]
    if "decode" in found:
        exact_decode(x, weight, bias, A, B, scaling).check(found["decode"], "decode")
        exact_h(x, A).check(found["decode h"], "decode h")
    exact_h(x, A, dropout_p, ranks).check(found["h"], "h")
    exact_h(dy, B.T).check(found["z"], "z")
    exact_delta(start(M, N, x.dtype), x, A, B, scaling, dropout_p, ranks).check(found["y"], "y")
    exact_dx(start(M, K, x.dtype), dy, A, B, scaling, dropout_p, ranks).check(found["dx"], "dx")
    dA, dB = exact_grads(x, found["z"], dy, found["h"], scaling, dropout_p, ranks)
    dA.check(found["dA"], "dA")
    dB.check(found["dB"], "dB")
    for name in ("y", "decode", "dx", "dA", "dB"):
        if name in found and found[name].dtype == F32:
            assert normalised_error(name, found, operands, dropout_p, ranks, scaling) <= 1e-5


def normalised_error(name, found, operands, dropout_p, ranks, scaling) -> float:
    """Worst error over the largest exact magnitude of the result."""
    x, weight, bias, A, B, dy = operands
    M, K, N = f64(x).shape[0], weight.shape[1], weight.shape[0]
    exact = {
        "y": lambda: exact_delta(start(M, N, x.dtype), x, A, B, scaling, dropout_p, ranks),
        "dx": lambda: exact_dx(start(M, K, x.dtype), dy, A, B, scaling, dropout_p, ranks),
        "decode": lambda: exact_decode(x, weight, bias, A, B, scaling),
        "dA": lambda: exact_grads(x, found["z"], dy, found["h"], scaling, dropout_p, ranks)[0],
        "dB": lambda: exact_grads(x, found["z"], dy, found["h"], scaling, dropout_p, ranks)[1],
    }[name]().value
    return float((found[name].double() - exact).abs().max() / exact.abs().max())


# Tile edges, primes and every rank class; the widest ranks with the narrowest tiles.
SHAPES = [
    (1, 64, 64, 8),
    (1, 257, 127, 3),
    (3, 1000, 31, 16),
    (7, 33, 65, 1),
    (8, 4099, 67, 17),
    (9, 64, 130, 8),
    (31, 127, 33, 17),
    (33, 65, 1000, 3),
    (65, 101, 257, 64),
    (127, 131, 61, 200),
    (300, 72, 136, 16),
    (1000, 7, 31, 8),
    (40, 40, 48, 300),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@all_dtypes
def test_against_float64(shape, dtype, adapter_dtype):
    operands = layer(*shape, dtype, adapter_dtype)
    check_all(run_all(Kernels(), operands), operands)


@pytest.mark.parametrize(("dropout_p", "ranks"), [((0.3,), ()), ((0.1, 0.0, 0.6), (3, 8, 5))], ids=str)
@pytest.mark.parametrize("shape", [(5, 64, 72), (70, 129, 67)], ids=str)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (F16, F16)], ids=dtype_id)
def test_dropout_is_that_of_the_portable_kernels(shape, dtype, adapter_dtype, dropout_p, ranks):
    operands = layer(*shape, 16, dtype, adapter_dtype)
    check_all(run_all(Kernels(), operands, dropout_p, ranks), operands, dropout_p, ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("M", "K"), [(3, 2088), (70, 72)])  # lora_decode steps from column to column past 2048 of them
def test_layouts(M, K, layout):
    for name in range(6):
        operands = list(layer(M, K, 68, 12))
        if name == 2:
            operands[name] = torch.randn(136)[::2]
        else:
            operands[name] = randn(*operands[name].shape, layout=layout) / 4
        if name == 1 and layout == "transposed" and M <= 8:
            continue  # decodes() sends such a weight to torch's matmul
        check_all(run_all(Kernels(), operands), operands)


TWO_LEVELS = {
    "permuted": lambda: (randn(5, 9, 64).transpose(0, 1), randn(9, 7, 72)[:, :5]),
    "transposed": lambda: (randn(5, 64, 9).transpose(1, 2), randn(5, 72, 9).transpose(1, 2)),
    "few": lambda: (randn(3, 2, 64).transpose(0, 1), randn(2, 4, 72)[:, :3]),
}


@pytest.mark.parametrize("layout", TWO_LEVELS)
@pytest.mark.parametrize("dropout_p", [(), (0.4,)], ids=str)
def test_rows_in_two_levels(layout, dropout_p):
    x, dy = TWO_LEVELS[layout]()
    _, weight, bias, A, B, _ = layer(1, 64, 72, 8)
    operands, kernels = (x, weight, bias, A, B, dy), Kernels(trace=True)
    check_all(run_all(kernels, operands, dropout_p), operands, dropout_p)
    assert not [finding for _, report in kernels.runs for finding in report.findings]


@st.composite
def problems(draw):
    size = st.one_of(st.integers(1, 12), st.integers(1, 90))
    M, K, N, r = draw(size), draw(size), draw(size), draw(st.sampled_from([1, 2, 8, 9, 16]))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(4)]
    dropout_p = draw(st.sampled_from([(), (0.25,)]))
    dtypes = draw(st.sampled_from([(F32, F32), (F16, F16), (F16, F32)]))
    return M, K, N, r, layouts, dropout_p, draw(st.sampled_from([1, 8, 40])), dtypes


@given(problems())
@settings(max_examples=examples(40))
def test_any_shape_and_layout(problem):
    M, K, N, r, layouts, dropout_p, gpu_cores, dtypes = problem
    operands = list(layer(M, K, N, r, *dtypes))
    for name, layout in zip((0, 3, 4, 5), layouts, strict=True):
        operands[name] = randn(*operands[name].shape, dtype=operands[name].dtype, layout=layout)
    check_all(run_all(Kernels(gpu_cores), operands, dropout_p), operands, dropout_p)


# Every pair of dtypes with every class of rows and of ranks (the tiles' sizes), with and without dropout.
VARIANTS = [
    ((1, 300, 70, 5), (F16, F32), ()),
    ((2, 96, 130, 16), (F32, F32), ()),
    ((8, 640, 40, 33), (BF16, BF16), ()),
    ((3, 1100, 80, 8), (BF16, F32), ()),
    ((4, 300, 200, 100), (F16, F16), ()),
    ((6, 40, 30, 140), (F32, F32), (0.3,)),
    ((7, 40, 72, 3), (BF16, F32), (0.3,)),
    ((13, 72, 60, 8), (F16, F16), (0.5,)),
    ((12, 65, 33, 70), (F16, F32), (0.5,)),
    ((16, 40, 66, 17), (F32, F32), ()),
    ((10, 33, 129, 130), (BF16, F32), ()),
    ((15, 80, 70, 64), (BF16, BF16), (0.7,)),
    ((70, 150, 131, 16), (BF16, F32), (0.1,)),
    ((45, 40, 70, 72), (F32, F32), (0.2,)),
    ((33, 24, 40, 200), (F16, F32), ()),
    ((50, 66, 35, 256), (BF16, BF16), ()),
    ((40, 20, 90, 48), (F16, F16), ()),
    ((400, 70, 64, 9), (F32, F32), ()),
    ((260, 33, 30, 16), (F16, F16), (0.2, 0.3)),
    ((35, 30, 34, 300), (F32, F32), ()),
]


@pytest.mark.parametrize(("shape", "dtypes", "dropout_p"), VARIANTS, ids=str)
def test_trace_has_no_findings_and_lane_orders_agree_bit_for_bit(shape, dtypes, dropout_p):
    operands = layer(*shape, *dtypes)
    ranks = (shape[3] // 2, shape[3] - shape[3] // 2) if len(dropout_p) == 2 else ()
    results = []
    for order in ORDERS:
        kernels = Kernels(trace=True, order=order)
        results.append(run_all(kernels, operands, dropout_p, ranks))
        for name, report in kernels.runs:
            assert not report.findings, f"{name}: {report.findings[:3]}"
    check_all(results[0], operands, dropout_p, ranks)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


DRAW = """
[[kernel]] void draw(
    device uchar* kept [[buffer(0)]], constant uint2& seed [[buffer(1)]], constant ulong& first [[buffer(2)]],
    constant uint2& stream_threshold [[buffer(3)]], uint i [[thread_position_in_grid]]) {
  const tfl::Dropout dropout = {seed, stream_threshold.x, stream_threshold.y, 1.0f};
  kept[i] = dropout.keep_eight(first + i);
}
"""


def test_mask_of_a_tensor_past_4_gib_and_at_the_threshold():
    stream, first, counters = 3, (1 << 33) + 5, 64
    words = philox(SEED, stream, first, first + counters)
    threshold = int(words[17])  # met exactly: kept
    rotated = words << 16 | words >> 16
    expected = torch.tensor([word >= threshold for pair in zip(words, rotated, strict=True) for word in pair])
    kept = torch.zeros(counters, dtype=torch.uint8)
    kernel = metal_on_cpu.compile(assemble(ROOT / "metal" / "dropout.h") + DRAW, strict=True)["draw"]
    constants = [value.to_bytes(8, "little") for value in (SEED, first, stream | threshold << 32)]
    kernel.dispatch(threads=(counters, 1, 1), group=(counters, 1, 1), arguments=[kept, *constants])
    bits = kept.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
    assert torch.equal(bits.bool().flatten(), expected)


LOCATE = """
[[kernel]] void locate(
    device const half* data [[buffer(0)]], device ulong* offset [[buffer(1)]], constant uint2& levels [[buffer(2)]],
    constant uint2& strides [[buffer(3)]], constant uint2& row_col [[buffer(4)]]) {
  const tfl::Matrix<half> m = tfl::matrix_of(data, 9, 9, levels, strides, false);
  *offset = ulong(m.at(row_col.x, row_col.y) - data);
}
"""


@pytest.mark.parametrize(
    ("inner", "outer_stride", "row_stride", "col_stride"),
    [(9, 0, 2**31 + 5, 1), (9, 0, 1, 2**31 + 5), (2, 2**31 + 5, 7, 1), (2, 3, 2**31 + 5, 1)],
)
def test_offsets_are_64_bit(inner, outer_stride, row_stride, col_stride):
    """Where an element lies that is more than 4 GiB away, told without reading it."""
    row, col = 7, 6
    offset = torch.zeros(1, dtype=torch.int64)
    words = [pair[0] | pair[1] << 32 for pair in ((inner, outer_stride), (row_stride, col_stride), (row, col))]
    kernel = metal_on_cpu.compile(assemble(ROOT / "metal" / "operands.h") + LOCATE, strict=True)["locate"]
    arguments = [torch.zeros(8, dtype=F16), offset, *(word.to_bytes(8, "little") for word in words)]
    kernel.dispatch(threads=(1, 1, 1), group=(1, 1, 1), arguments=arguments)
    assert offset.item() == row // inner * outer_stride + row % inner * row_stride + col * col_stride


def test_only_z():
    _, _, _, A, B, dy = layer(50, 40, 130, 16)
    kernels = Kernels(trace=True)
    exact_h(dy, B.T).check(kernels.delta_dx(None, dy, A, B, 1.0, save_z=True), "z")
    assert len(kernels.runs) == 2
    assert not [finding for _, report in kernels.runs for finding in report.findings]


def test_only_one_gradient():
    x, _, _, A, B, dy = layer(50, 40, 130, 16)
    z, h = torch.randn(50, 16), torch.randn(50, 16)
    dA, dB = exact_grads(x, z, dy, h, SCALING)
    found, nothing = Kernels().grad(x, z, dy, None, A, B, SCALING, need_B=False)
    dA.check(found, "dA")
    assert nothing is None
    nothing, found = Kernels().grad(x, None, dy, h, A, B, SCALING, need_A=False)
    dB.check(found, "dB")
    assert nothing is None


def test_no_columns_of_x():
    """K = 0: nothing is added."""
    y = start(3, 40, F32)
    Kernels().delta(y, torch.empty(3, 0), torch.empty(8, 0), torch.randn(40, 8), 1.0)
    assert torch.equal(y, start(3, 40, F32))


def test_every_mutation_applies_to_the_kernels_as_they_stand():
    for edit in EDITS:
        assert edit.apply(source := (METAL / edit.file).read_text()) != source, edit
