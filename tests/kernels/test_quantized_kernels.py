"""lora_gemm over weights of 4 bits, of 8 bits, of NF4 and of elements, as the launch plan has it, against float64.

What the words stand for is taken from tests/reference.py, in float64. Bounds are those of `reference.Exact`:
all is summed in float32 and rounded once, h and z being given. A decoded element is rounded to float32, which the
terms that `Exact.bound` adds cover.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.launch_plan import Kernels, overridden
from tests.kernels.test_metal_kernels import (
    BF16,
    F16,
    F32,
    LAYOUTS,
    ORDERS,
    SCALING,
    SEED,
    TWO_LEVELS,
    exact_decode,
    exact_h,
    f64,
    masks,
    randn,
)
from tests.reference import Exact, dequantized, with_table
from torch_fused_lora.affine import Packed

Format = tuple[int | str, int, torch.dtype]  # bits, group size, dtype of the scales
PLAIN = (0, 0, F32)
NF4 = "NF4"  # as `bits`


def weight_in(format: Format, N: int, K: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor | Packed:
    """A weight of random words, with scales of either sign; or of elements."""
    bits, group_size, scale_dtype = format
    if bits == NF4:
        return with_table(N, K, group_size)
    if not bits:
        return randn(N, K, dtype=dtype, layout=layout)
    words = torch.randint(256, (N, K * bits // 8)).to(torch.uint8).view(torch.uint32)
    scales, biases = torch.randn(2, N, K // group_size).to(scale_dtype)
    return Packed(words, scales / 2**bits, biases, bits, group_size)


def whole(weight: Tensor | Packed) -> Tensor:
    """In float64."""
    return weight.double() if isinstance(weight, Tensor) else dequantized(weight)[0]


def layer(M, K, N, r, dtype=F32, adapter_dtype=F32, format=PLAIN, layout="contiguous"):
    """x, weight, bias, lora_A, lora_B, dy, h, z."""
    return (
        randn(M, K, dtype=dtype, layout=layout),
        weight_in(format, N, K, dtype),
        torch.randn(N).to(dtype),
        randn(r, K, dtype=adapter_dtype) / 4,
        randn(N, r, dtype=adapter_dtype) / 4,
        randn(M, N, dtype=dtype, layout=layout),
        randn(M, r, dtype=adapter_dtype),
        randn(M, r, dtype=adapter_dtype),
    )


def run(kernels: Kernels, operands, dropout_p=0.0) -> tuple[Tensor, Tensor]:
    """y and dx."""
    x, weight, bias, A, B, dy, h, z = operands
    y = kernels.gemm(x, weight, bias, B, h, SCALING)
    return y, kernels.gemm_dx(dy, weight, A, z, SCALING, SEED, dropout_p)


def check(found: tuple[Tensor, Tensor], operands, dropout_p=0.0) -> None:
    x, weight, bias, A, B, dy, h, z = operands
    W, x, dy, y_delta, dx_delta = whole(weight), f64(x), f64(dy), 0.0, 0.0
    b = bias.double() if bias is not None else torch.zeros(len(W), dtype=torch.float64)
    y_magnitude, dx_magnitude, r = x.abs() @ W.abs().T + b.abs(), dy.abs() @ W.abs(), 0
    if h is not None:
        ((_, mask),) = masks(*x.shape, (dropout_p,) if dropout_p else (), (), r := h.shape[1])
        h, z, A, B = h.double(), z.double(), A.double(), B.double()
        y_delta, dx_delta = SCALING * h @ B.T, SCALING * mask * (z @ A)
        y_magnitude += SCALING * h.abs() @ B.abs().T
        dx_magnitude += SCALING * mask * (z.abs() @ A.abs())
    Exact(x @ W.T + b + y_delta, y_magnitude, W.shape[1] + r + 1).check(found[0], "y")
    Exact(dy @ W + dx_delta, dx_magnitude, len(W) + r).check(found[1], "dx")


def without_findings(kernels: Kernels) -> None:
    for name, report in kernels.runs:
        assert not report.findings, f"{name}: {report.findings[:3]}"


# Every format and pair of dtypes, tiles of 32 rows and of 64, and edges of all tiles; a rank over several tiles.
CASES = [
    ((70, 128, 100, 16), (F16, F32), (4, 64, F16), 0.0),
    ((9, 96, 67, 5), (BF16, BF16), (8, 32, F32), 0.0),
    ((33, 160, 130, 40), (F32, F32), (4, 32, BF16), 0.3),
    ((200, 256, 65, 8), (BF16, F32), (4, 128, BF16), 0.0),
    ((1, 32, 1, 1), (F16, F16), (8, 32, F16), 0.5),
    ((65, 384, 40, 3), (F32, F32), (8, 128, F32), 0.0),
    ((129, 64, 192, 17), (BF16, F32), (4, 64, F32), 0.6),
    ((70, 192, 100, 16), (F16, F32), (NF4, 64, F32), 0.0),
    ((9, 96, 67, 5), (BF16, BF16), (NF4, 32, F32), 0.4),
    ((130, 256, 65, 8), (F32, F32), (NF4, 128, F32), 0.0),
    ((150, 65, 131, 9), (F16, F32), PLAIN, 0.4),
    ((34, 33, 70, 24), (BF16, BF16), PLAIN, 0.0),
    ((66, 128, 64, 300), (F32, F32), PLAIN, 0.0),
]


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize(("shape", "dtypes", "format", "dropout_p"), CASES, ids=str)
def test_against_float64(shape, dtypes, format, dropout_p, rows):
    operands = layer(*shape, *dtypes, format)
    with overridden(f"lora_gemm.rows={rows}"):
        check(run(Kernels(), operands, dropout_p), operands, dropout_p)


@pytest.mark.parametrize(("shape", "dtypes", "format", "dropout_p"), CASES, ids=str)
def test_trace_has_no_findings_and_lane_orders_agree_bit_for_bit(shape, dtypes, format, dropout_p):
    operands, results = layer(*shape, *dtypes, format), []
    for order in ORDERS:
        kernels = Kernels(gpu_cores=1, trace=True, order=order)
        results.append(run(kernels, operands, dropout_p))
        without_findings(kernels)
    check(results[0], operands, dropout_p)
    for other in results[1:]:
        assert all(torch.equal(*both) for both in zip(results[0], other, strict=True))


def multiplies(kernels: Kernels) -> list[int]:
    return [report.counters.matrix_multiplies for name, report in kernels.runs if name.startswith("lora_gemm")]


SPLIT = [
    ((9, 96, 67, 5), (BF16, BF16), (8, 32, F32), 0.5),
    ((33, 160, 130, 40), (F16, F32), (4, 32, BF16), 0.0),
    ((34, 100, 70, 24), (F32, F32), PLAIN, 0.3),
    ((20, 192, 70, 8), (F16, F16), (NF4, 64, F32), 0.0),
]


@pytest.mark.parametrize(("shape", "dtypes", "format", "dropout_p"), SPLIT, ids=str)
def test_split_terms_in_trace_mode_and_all_lane_orders(shape, dtypes, format, dropout_p):
    """Of both products, the last one shorter: one rounding still, the adapter and the bias once, no tile of nothing."""
    operands, results = layer(*shape, *dtypes, format), []
    whole = Kernels(gpu_cores=1, trace=True)
    with overridden("lora_gemm.splits=1"):
        run(whole, operands, dropout_p)
    for order in ORDERS:
        kernels = Kernels(gpu_cores=1, trace=True, order=order)
        with overridden("lora_gemm.splits=3"):
            results.append(run(kernels, operands, dropout_p))
        assert [name.startswith("sum_splits") for name, _ in kernels.runs] == [False, True] * 2
        assert multiplies(kernels) == multiplies(whole)
        without_findings(kernels)
    check(results[0], operands, dropout_p)
    for other in results[1:]:
        assert all(torch.equal(*both) for both in zip(results[0], other, strict=True))


@pytest.mark.parametrize("M", [9, 32, 64, 128, 512, 4096])
@pytest.mark.parametrize("cores", [8, 32, 80])
@pytest.mark.parametrize("is_backward", [False, True])
def test_terms_are_split_where_tiles_leave_room_on_the_gpu(is_backward, cores, M):
    """And no further, so that the scratch is a tile for each of the threadgroups that run at once, at most."""
    with torch.device("meta"):
        x, weight, factor = torch.empty(M, 4096), torch.empty(4096, 4096), torch.empty(16, 4096)
    factor = factor if is_backward else factor.T
    launches, splits = Kernels(cores)._plan_gemm(is_backward, x, weight, None, factor, 0.0)
    (threads, row_tiles, found), group = launches[0].threads, launches[0].group[0]
    tiles, room = threads // group * row_tiles, cores * (4 if b"_32_forward" in launches[0].kernel else 3)
    assert found == splits
    assert len(launches) == (1 if splits == 1 else 2)
    assert splits == 1 or splits * tiles <= room
    assert splits == 8 or (splits + 1) * tiles > room


@pytest.mark.parametrize("format", [(4, 64, F16), PLAIN], ids=["4-bit", "plain"])
def test_rows_are_64_where_they_fill_the_gpu(format):
    names = []
    for M, cores in ((32, 1), (33, 1), (256, 2), (256, 3)):
        x, weight, *_ = layer(M, 64, 64, 1, format=format)
        (launch,) = Kernels(cores).plan_gemm(False, x, weight, None, None)
        names.append(launch.kernel.decode())
    assert ["_64_" in name for name in names] == [False, False, True, False]


@pytest.mark.parametrize("format", [(4, 64, F16), PLAIN], ids=["4-bit", "plain"])
def test_without_an_adapter(format):
    x, weight, bias, _, _, dy, _, _ = layer(40, 128, 70, 1, F16, F16, format)
    operands, kernels = (x, weight, bias, None, None, dy, None, None), Kernels(trace=True)
    check(run(kernels, operands), operands)
    operands = (x, weight, None, None, None, dy, None, None)
    check(run(kernels, operands), operands)
    without_findings(kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B", "dy"])
def test_layouts(name, layout):
    operands = list(layer(40, 96, 68, 12, F16, F16, PLAIN if name == "weight" else (4, 32, F16)))
    i = ["x", "weight", "bias", "lora_A", "lora_B", "dy"].index(name)
    if name == "bias":
        operands[i] = torch.randn(136).half()[::2]
    else:
        operands[i] = randn(*operands[i].shape, dtype=F16, layout=layout) / 4
    check(run(Kernels(), operands), operands)


@pytest.mark.parametrize("layout", TWO_LEVELS)
def test_rows_in_two_levels(layout):
    x, dy = TWO_LEVELS[layout]()
    operands = list(layer(len(f64(x)), 64, 72, 8, format=(8, 64, F32)))
    operands[0], operands[5] = x, dy
    kernels = Kernels(trace=True)
    check(run(kernels, operands), operands)
    without_findings(kernels)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_of_every_place_is_decoded(bits):
    """The identity times W is W, rounded once."""
    codes = torch.arange(256).repeat(4 * 128 // 256).view(4, 128).roll(3, 1) % (1 << bits)
    held = codes.to(torch.uint8)
    held = held[:, ::2] | held[:, 1::2] << 4 if bits == 4 else held
    scales, biases = torch.tensor([[0.5, -0.25]]).expand(4, 2), torch.tensor([[-3.0, 7.0]]).expand(4, 2)
    weight = Packed(held.contiguous().view(torch.uint32), scales.contiguous(), biases.contiguous(), bits, 64)
    expected = codes.float() * scales.repeat_interleave(64, 1) + biases.repeat_interleave(64, 1)
    assert torch.equal(Kernels().gemm_dx(torch.eye(4), weight, None, None, 1.0), expected)
    assert torch.equal(Kernels().gemm(torch.eye(128), weight, None, None, None, 1.0), expected.T)


def test_every_entry_of_a_table_is_looked_up_in_every_place():
    codes = torch.arange(4 * 128).view(4, 128).roll(3, 1) % 16
    codes += torch.arange(4).view(4, 1) * 5 % 16
    codes = (codes % 16).to(torch.uint8)
    table, scales = torch.randn(16), torch.tensor([[0.5, -0.25]]).repeat(4, 1) * torch.arange(1, 5).view(4, 1)
    weight = Packed(codes[:, ::2] << 4 | codes[:, 1::2], scales, table, 4, 64)
    expected = table[codes.long()] * scales.repeat_interleave(64, 1)
    assert torch.equal(Kernels().gemm_dx(torch.eye(4), weight, None, None, 1.0), expected)
    assert torch.equal(Kernels().gemm(torch.eye(128), weight, None, None, None, 1.0), expected.T)
    rows = [Kernels().decode(row[None], weight, None, None, None, 1.0)[0] for row in torch.eye(128)[:24]]
    assert torch.equal(torch.cat(rows), expected.T[:24])


# -------------------------------------------------------------------------------------------- few rows, by lora_decode


def check_decode(kernels: Kernels, x, weight, bias, A, B) -> Tensor:
    """y, of a call that saves h, too."""
    W, N = whole(weight), weight.scales.shape[0]
    y, h = kernels.decode(x, weight, bias, A, B, SCALING, save_h=A is not None)
    if A is None:
        A, B = torch.zeros(1, W.shape[1]), torch.zeros(N, 1)
    else:
        exact_h(x, A).check(h, "h")
    exact_decode(x, W, bias, A, B, SCALING).check(y, "y")
    return y


DECODED = [
    ((1, 128, 70, 16), (F16, F32), (4, 64, F16)),
    ((2, 1024, 40, 5), (BF16, BF16), (8, 32, F32)),
    ((3, 96, 67, 64), (F32, F32), (4, 32, BF16)),
    ((8, 640, 33, 130), (BF16, F32), (4, 128, BF16)),
    ((5, 32, 1, 1), (F16, F16), (8, 32, F16)),
    ((1, 4352, 260, 8), (F16, F16), (8, 64, F16)),
    ((1, 1088, 70, 16), (F16, F32), (NF4, 64, F32)),
    ((4, 256, 33, 5), (BF16, BF16), (NF4, 128, F32)),
    ((7, 96, 40, 3), (F32, F32), (NF4, 32, F32)),
]


@pytest.mark.parametrize(("shape", "dtypes", "format"), DECODED, ids=str)
def test_few_rows_in_trace_mode_and_all_lane_orders(shape, dtypes, format):
    x, weight, bias, A, B, *_ = layer(*shape, *dtypes, format)
    results = []
    for order in ORDERS:
        kernels = Kernels(trace=True, order=order)
        results.append(check_decode(kernels, x, weight, bias, A, B))
        without_findings(kernels)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_rows_without_an_adapter_and_in_any_layout(layout):
    _, weight, bias, *_ = layer(3, 512, 70, 1, F16, F16, (4, 64, F16))
    kernels = Kernels(trace=True)
    check_decode(kernels, randn(3, 512, dtype=F16, layout=layout), weight, bias, None, None)
    without_findings(kernels)
    assert len(kernels.runs) == 1
