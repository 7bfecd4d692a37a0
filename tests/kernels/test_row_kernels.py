"""The row kernels of metal/, executed as csrc/plan/rows.cpp says, against float64.

Bounds: a sum by a tree of some depth is within depth * u of the sum of magnitudes (Higham, section 4.2), so that depth
takes the place of the number of terms in `reference.Exact`. Here a thread adds the sums of its runs, of which it has
two in 4096 elements, then come the lanes of a simdgroup, then the simdgroups.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import ROOT
from tests.budget import examples
from tests.emulator import metal_on_cpu
from tests.kernels.launch_plan import assemble, overridden
from tests.kernels.row_plan import RowKernels
from tests.kernels.test_metal_kernels import LAYOUTS, ORDERS, TWO_LEVELS, dtype_id, randn
from tests.reference import HALF, NARROW, SMALLEST, UNIT, Exact

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = NARROW
WEIGHTED = [(F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]
EPS = 1e-5
# Rows and length: every number of simdgroups a row, full and not; held, and looped over twice to ten times.
SHAPES = [
    *[(9, 1), (3, 7), (70, 8), (9, 64), (1, 100), (70, 128), (3, 255), (17, 256)],
    *[(9, 257), (5, 512), (3, 1000), (3, 2048), (3, 4096)],
    *[(3, 4097), (1, 5000), (1, 8192), (2, 8200), (2, 10001), (1, 40000)],
]


def depth(H: int) -> int:
    return 8 * -(-H // 4096) + 5 + 5


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def check_rms_norm(kernels: RowKernels, x: Tensor, weight: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward against float64; what was found."""
    H = x.shape[-1]
    y, rstd = kernels.rms_norm(x, weight, EPS)
    dx, dweight = kernels.rms_norm_backward(grad, x, weight, rstd, need_weight=weight is not None)
    found = {"y": y, "rstd": rstd, "dx": dx, "dweight": dweight}

    x64, g = rows(x).double(), rows(grad).double()
    w = (weight if weight is not None else torch.ones(H)).double()
    exact_rstd = (x64.square().mean(1, keepdim=True) + EPS).rsqrt()
    normal = x64 * exact_rstd
    exact = normal * w
    relative = 1e-6 + (UNIT[x.dtype] if x.dtype in HALF else 0)
    assert ((y.double() - exact).abs() <= relative * exact.abs() + SMALLEST[x.dtype]).all()
    assert ((rstd.double() - exact_rstd[:, 0]).abs() <= 1e-6 * exact_rstd[:, 0]).all()
    if x.dtype in HALF:
        on_cpu = F.rms_norm(x.float(), (H,), weight.float() if weight is not None else None, EPS)
        assert ulps_apart(y, rows(on_cpu).to(x.dtype)) <= 1

    # rstd comes in up to three times, each time with the rounding of a sum like the one that backward adds.
    product = g * w * normal
    exact_dx = exact_rstd * (g * w - normal * product.mean(1, keepdim=True))
    magnitude = exact_rstd * ((g * w).abs() + normal.abs() * product.abs().mean(1, keepdim=True))
    Exact(exact_dx, magnitude, 3 * depth(H)).check(dx, "dx")
    if weight is not None:
        Exact((g * normal).sum(0), (g * normal).abs().sum(0), depth(H) + len(g)).check(dweight, "dweight")
    return found


def check_softmax(kernels: RowKernels, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    y = kernels.softmax(x)
    dx = kernels.softmax_backward(grad, y)
    x64, g = rows(x).double(), rows(grad).double()
    exact, u = x64.softmax(1), UNIT[F32]
    # An argument of exp is rounded twice, against the thread's maximum and against the row's.
    relative = u * (depth(x.shape[-1]) + 16 + 2 * (x64.amax(1, keepdim=True) - x64))
    half = UNIT[x.dtype] if x.dtype in HALF else 0.0
    error = (y.double() - exact).abs()
    assert (error <= (relative + half) * exact + SMALLEST[x.dtype] + 2.0**-126).all()
    assert x.dtype != F32 or error.max() <= 1e-6
    if x.dtype in HALF:
        assert ulps_apart(y, rows(x).float().softmax(1).to(x.dtype)) <= 1
    y64 = y.double()
    sums, magnitude = (y64 * g).sum(1, keepdim=True), (y64 * g).abs().sum(1, keepdim=True)
    Exact(y64 * (g - sums), y64 * (g.abs() + magnitude), depth(x.shape[-1])).check(dx, "dx")
    return {"y": y, "dx": dx}


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """How many numbers of their type lie between two tensors, at most."""
    bits = [t.contiguous().view(torch.int16).int() for t in (a, b)]
    first, second = (torch.where(i < 0, -32768 - i, i) for i in bits)
    return int((first - second).abs().max())


def findings(kernels: RowKernels) -> list:
    return [finding for _, report in kernels.runs for finding in report.findings]


@pytest.mark.parametrize("family", ["rms_norm", "softmax"])
def test_the_lint_takes_every_instantiation(family):
    """Both types that convert differently, rows of one simdgroup and of several, held and looped."""
    launches, kernels = [], RowKernels()
    for H, dtype, weight_dtype in ((7, BF16, F32), (5000, F16, F16)):
        x, weight = torch.empty(9, H, dtype=dtype), torch.empty(H, dtype=weight_dtype)
        if family == "rms_norm":
            launches += [*kernels.plan_rms_norm(x, weight), *kernels.plan_rms_norm_backward(x, x, weight)[0][:1]]
        else:
            launches += [*kernels.plan_softmax(x), *kernels.plan_softmax_backward(x, x)]
    text = assemble(ROOT / "metal" / f"{family}.metal")
    instantiations = [launch.source.decode().removeprefix(text) for launch in launches]
    assert len(set(instantiations)) == 4
    assert metal_on_cpu.lint(text + "".join(instantiations)) == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTED, ids=dtype_id)
def test_rms_norm_against_float64(shape, dtype, weight_dtype):
    x, grad, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), torch.randn(shape[1]).to(weight_dtype)
    check_rms_norm(RowKernels(), x, weight, grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_softmax_against_float64(shape, dtype):
    check_softmax(RowKernels(), randn(*shape, dtype=dtype) * 3, randn(*shape, dtype=dtype))


@pytest.mark.parametrize("H", [100, 5000])
def test_rms_norm_without_weight(H):
    x, grad = randn(9, H, dtype=F16), randn(9, H, dtype=F16)
    check_rms_norm(RowKernels(), x, None, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("H", [72, 1000, 4100])
def test_layouts(H, layout):
    """Each operand apart, so that no one's strides or alignment pass for another's."""
    for other in ("x", "grad", "weight"):
        shape = (4, H)  # a multiple of what an aligned run has, also where rows are one element apart
        x, grad = randn(*shape, layout=layout if other == "x" else "contiguous"), randn(*shape)
        weight = torch.randn(H)
        if other == "grad":
            grad = randn(*shape, layout=layout)
        if other == "weight":
            weight = torch.randn(2 * H)[::2] if layout == "transposed" else torch.randn(H + 1)[1:]
        check_rms_norm(RowKernels(), x, weight, grad)
        if other != "weight":
            check_softmax(RowKernels(), x, grad)
            y = RowKernels().softmax(x)
            strided = randn(*shape, layout=layout) if layout != "expanded" else randn(*shape)
            strided.copy_(y)
            assert torch.equal(RowKernels().softmax_backward(grad, strided), RowKernels().softmax_backward(grad, y))


@pytest.mark.parametrize("layout", TWO_LEVELS)
def test_rows_in_two_levels(layout):
    kernels = RowKernels(trace=True)
    x, _ = TWO_LEVELS[layout]()
    grad, _ = TWO_LEVELS[layout]()
    check_rms_norm(kernels, x, torch.randn(x.shape[-1]), grad)
    check_softmax(kernels, x, grad)
    assert not findings(kernels)


@pytest.mark.parametrize("inner", [6, 7])
@pytest.mark.parametrize("H", [100, 700, 4100])
def test_a_walk_over_rows_in_two_levels(H, inner):
    """One group comes to every row, where a step ends within a level, with it and beyond it; x and grad differ in
    where a level begins."""
    x, grad = randn(4, inner + 2, H)[:, :inner], randn(4, inner + 3, H)[:, 1 : inner + 1]
    kernels = RowKernels(trace=True)
    families = "rms_norm", "rms_norm_backward", "softmax", "softmax_backward"
    with overridden(",".join(f"{family}.groups=1" for family in families)):
        check_rms_norm(kernels, x, torch.randn(H), grad)
        check_softmax(kernels, x, grad)
        (launch,) = kernels.plan_softmax(x)
    assert launch.threads[0] == launch.group[0]
    assert not findings(kernels)


# Shapes whose groups walk over several blocks on one core, the last of them not full.
WALKED = [
    ((70, 100), F16, F32),
    ((67, 8), F32, F32),
    ((37, 300), BF16, BF16),
    ((37, 700), F32, F32),
    ((35, 1200), F16, F16),
    ((35, 2052), BF16, F32),
    ((35, 4100), F16, F16),
    ((12, 4104), F16, F16),
    ((5, 8197), F32, F32),
    ((5, 8200), F16, F16),
]


@pytest.mark.parametrize(("shape", "dtype", "weight_dtype"), WALKED, ids=str)
def test_trace_has_no_findings_and_lane_orders_agree_bit_for_bit(shape, dtype, weight_dtype):
    x, grad, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), torch.randn(shape[1]).to(weight_dtype)
    results = []
    for order in ORDERS:
        kernels = RowKernels(gpu_cores=1, trace=True, order=order)
        norm, soft = check_rms_norm(kernels, x, weight, grad), check_softmax(kernels, x, grad)
        results.append({**norm, "softmax": soft["y"], "softmax dx": soft["dx"]})
        assert not findings(kernels), findings(kernels)[:3]
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("gpu_cores", [1, 10, 40])
@pytest.mark.parametrize("shape", [(1, 100), (70, 100), (200, 1000), (33, 4096), (40, 4097)], ids=str)
def test_rows_over_any_number_of_cores(shape, gpu_cores):
    x, grad, weight = randn(*shape), randn(*shape), torch.randn(shape[1])
    kernels = RowKernels(gpu_cores, trace=True)
    check_rms_norm(kernels, x, weight, grad)
    assert not findings(kernels)


@pytest.mark.parametrize("H", [100, 700, 4100])
def test_softmax_walks_over_rows_where_groups_are_few(H):
    """The plan does so from 2**20 groups on; here one group has all rows."""
    kernels, x, grad = RowKernels(trace=True), randn(19, H), randn(19, H)
    y, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    (forward,), (backward,) = kernels.plan_softmax(x), kernels.plan_softmax_backward(grad, x)
    for launch, tensors in ((forward, (x, y)), (backward, (grad, y, dx))):
        launch.threads[0] = launch.group[0]
        kernels._dispatch(launch, tensors)
    assert torch.equal(y, RowKernels().softmax(x))
    assert torch.equal(dx, RowKernels().softmax_backward(grad, y))
    assert not findings(kernels)


INF, NAN = torch.inf, torch.nan
SPECIAL = {
    "all -inf": lambda x: x.fill_(-INF),
    "-inf here and there": lambda x: x.masked_fill_(torch.arange(len(x)) % 3 != 1, -INF),
    "-inf but for the last": lambda x: x[:-1].fill_(-INF),
    "-inf but for the first": lambda x: x[1:].fill_(-INF),
    "a NaN": lambda x: x[len(x) * 2 // 3 :][:1].fill_(NAN),
    "a NaN among -inf": lambda x: x.fill_(-INF)[-1:].fill_(NAN),
    "inf": lambda x: x[len(x) // 3 :][:1].fill_(INF),
    "inf among -inf": lambda x: x.fill_(-INF)[-1:].fill_(INF),
    "1e4": lambda x: x.mul_(1e4),
    "one value": lambda x: x.fill_(-1e4),
    "the lowest": lambda x: x.fill_(torch.finfo(x.dtype).min),
    "the whole range": lambda x: x.fill_(torch.finfo(x.dtype).min)[-1:].fill_(torch.finfo(x.dtype).max),
}


@pytest.mark.parametrize("H", [5, 250, 700, 2300, 4095, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_softmax_of_special_values_is_torch_s(H, dtype):
    x = randn(len(SPECIAL), H, dtype=dtype)
    for row, make in zip(x, SPECIAL.values(), strict=True):
        make(row)
    y, expected = RowKernels().softmax(x), x.float().softmax(1)
    for name, found, reference, row in zip(SPECIAL, y, expected, x, strict=True):
        assert torch.equal(found.isnan(), reference.isnan()), name
        assert (found[(row == -INF) & ~reference.isnan()] == 0).all(), name
        torch.testing.assert_close(
            found.float(), reference, rtol=UNIT[dtype] * 2, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_softmax_backward_of_masked_elements_is_zero():
    x = randn(4, 300)
    x[:, ::2] = -INF
    y = RowKernels().softmax(x)
    dx = RowKernels().softmax_backward(randn(4, 300), y)
    assert (dx[:, ::2] == 0).all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5, 1e6])
def test_eps(eps):
    x, weight = randn(3, 40) * 1e-3, torch.randn(40)
    y, _ = RowKernels().rms_norm(x, weight, eps)
    torch.testing.assert_close(y.double(), F.rms_norm(x.double(), (40,), weight.double(), eps), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_rms_norm_backward_of_tiny_and_huge_rows(scale):
    """rstd^3 would leave the range of float32."""
    x, grad, weight = randn(3, 40) * scale, randn(3, 40), torch.randn(40)
    _, rstd = RowKernels().rms_norm(x, weight, 0.0)
    dx, dweight = RowKernels().rms_norm_backward(grad, x, weight, rstd)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(F.rms_norm(leaves[0], (40,), leaves[1], 0.0), leaves, grad.double())
    torch.testing.assert_close(dx.double() * scale, expected[0] * scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 300), (40, 4097)], ids=str)
def test_only_what_is_needed(shape):
    x, grad, weight = randn(*shape, dtype=F16), randn(*shape, dtype=F16), torch.randn(shape[1]).half()
    kernels = RowKernels(trace=True)
    _, rstd = kernels.rms_norm(x, weight, EPS)
    dx, dweight = kernels.rms_norm_backward(grad, x, weight, rstd)
    only_dx, nothing = kernels.rms_norm_backward(grad, x, weight, rstd, need_weight=False)
    assert nothing is None
    assert torch.equal(only_dx, dx)
    nothing, only_dweight = kernels.rms_norm_backward(grad, x, weight, rstd, need_x=False)
    assert nothing is None
    assert torch.equal(only_dweight, dweight)
    assert not findings(kernels)


def test_no_elements_no_launch():
    kernels, weight = RowKernels(), torch.randn(8)
    for x in (torch.empty(0, 8), torch.empty(8, 0)):
        assert kernels.plan_rms_norm(x, weight[: x.shape[1]]) == []
        assert kernels.plan_rms_norm_backward(x, x, weight[: x.shape[1]]) == ([], 1)
        assert kernels.plan_softmax(x) == []
        assert kernels.plan_softmax_backward(x, x) == []


def test_dispatches():
    x, weight = torch.empty(4096, 1024, dtype=F16), torch.empty(1024, dtype=F16)
    kernels = RowKernels(gpu_cores=40)
    assert len(kernels.plan_rms_norm(x, weight)) == 1
    assert len(kernels.plan_rms_norm_backward(x, x, weight, need_weight=False)[0]) == 1
    launches, splits = kernels.plan_rms_norm_backward(x, x, weight)
    assert len(launches) == 2
    assert 40 <= splits <= 4096 // 16
    assert len(kernels.plan_rms_norm_backward(x[:2], x[:2], weight)[0]) == 1  # one group has all rows
    assert len(kernels.plan_softmax(x)) == len(kernels.plan_softmax_backward(x, x)) == 1


@pytest.mark.parametrize("shape", [(2**32 - 1, 1), (2**31, 3), (2**20 + 1, 300), (3, 2**31 - 1)], ids=str)
def test_grids_of_huge_problems_fit(shape):
    with torch.device("meta"):
        x = torch.empty(1, 1, dtype=F16).expand(shape)
    kernels = RowKernels(gpu_cores=80)
    for launch in (*kernels.plan_softmax(x), *kernels.plan_rms_norm(x, None)):
        groups, blocks = launch.threads[0] // launch.group[0], launch.words[1] & 0xFFFFFFFF
        assert launch.threads[0] == groups * launch.group[0]
        assert 0 < groups <= blocks
        assert blocks + groups < 2**32, "a group's walk has to end"


@pytest.mark.parametrize("operand", ["y", "grad"])
def test_too_long_strides_are_refused(operand):
    x = {name: torch.empty(8, 8, device="meta") for name in ("y", "grad")}
    x[operand] = torch.empty(1, 1, device="meta").as_strided((8, 8), (2**32, 1))
    with pytest.raises(ValueError, match=f"{operand}: a dimension or stride"):
        RowKernels().plan_softmax_backward(x["grad"], x["y"])


def test_too_long_rows_are_refused():
    """A column and the step to the next one have to fit 32 bits."""
    with pytest.raises(ValueError, match="x: a row of"):
        RowKernels().plan_softmax(torch.empty(1, 1, device="meta").expand(1, 2**31))


@st.composite
def problems(draw):
    M = draw(st.one_of(st.integers(1, 12), st.integers(1, 90)))
    H = draw(st.one_of(st.integers(1, 300), st.integers(1, 1200), st.sampled_from([4095, 4096, 4097, 4104])))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(2)]
    return min(M, 10_000 // H + 1), H, layouts, draw(st.sampled_from([1, 8, 40])), draw(st.sampled_from(WEIGHTED))


@given(problems())
@settings(max_examples=examples(40))
def test_any_shape_and_layout(problem):
    M, H, layouts, gpu_cores, (dtype, weight_dtype) = problem
    x, grad = (randn(M, H, dtype=dtype, layout=layout) for layout in layouts)
    kernels = RowKernels(gpu_cores)
    check_rms_norm(kernels, x, torch.randn(H).to(weight_dtype), grad)
    check_softmax(kernels, x, grad)
