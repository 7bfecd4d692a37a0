"""The portable kernels on an NVIDIA GPU: same bounds, same masks as on the CPU. CI has no GPU and skips this."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F

import torch_fused_lora as tfl
from tests.operators.test_lora_delta import DTYPES as DELTA_DTYPES
from tests.operators.test_lora_delta import NAMES, operands
from tests.operators.test_lora_linear import DTYPES, laid_out, seeded_masks
from tests.operators.test_quantized import call as quantized_call
from tests.operators.test_rms_norm import DTYPES as ROW_DTYPES
from tests.operators.test_rms_norm import EPS
from tests.operators.test_rms_norm import exact as exact_rms_norm
from tests.reference import HALF, UNIT, Delta, Layer, QuantizedLayer
from torch_fused_lora.affine import Packed, quantize
from torch_fused_lora.doctor import self_test
from torch_fused_lora.ops.dropout import keep_mask
from torch_fused_lora.ops.dropout.operator import gpu_mask
from torch_fused_lora.ops.lora_linear import ways
from torch_fused_lora.ops.lora_linear.operator import lora_linear_stacked
from torch_fused_lora.ops.lora_linear_quantized import portable as quantized_portable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _base_products_rounded_once():
    """By default cuBLAS may round the parts of a long sum to half before it adds them up: at 2100 x 1104 x 264 F.linear
    with a bias is 5 times as far off as one rounding is. That is torch's setting, and no part of the bounds."""
    of, names = torch.backends.cuda.matmul, [f"allow_{half}_reduced_precision_reduction" for half in ("bf16", "fp16")]
    before = [getattr(of, name) for name in names]
    for name in names:
        setattr(of, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(of, name, value)


@pytest.fixture(scope="module", autouse=True)
def _context_of_the_autograd_thread():
    """Torch warns once when the first cuBLAS call of a process is made in backward; warnings are errors here."""
    x = torch.randn(2, 2, device=CUDA, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x.mm(x).sum().backward()


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [1, 77, 1500])
@pytest.mark.parametrize("columns", [136, 130])  # with dropout Triton's kernels take multiples of 8
def test_against_float64(dtype, adapter_dtype, dropout_p, rows, columns):
    K, N, r = columns, 96, 5
    x, W, b = ((torch.randn(s) * K**-0.25).to(dtype) for s in ((rows, K), (N, K), (N,)))
    A, B = ((torch.randn(s) * K**-0.25).to(adapter_dtype) for s in ((r, K), (N, r)))
    layer = Layer(x, W, b, A, B, 0.5, seeded_masks(3, x.to(CUDA), [r], [dropout_p]))
    leaves = [t.to(CUDA).requires_grad_() for t in (x, W, b, A, B)]
    y = tfl.lora_linear(*leaves, 0.5, dropout_p, training=True)
    grad = torch.randn(rows, N).to(dtype)
    found = {"y": y.detach()} | dict(
        zip(("x", "weight", "bias", "lora_A", "lora_B"), torch.autograd.grad(y, leaves, grad.to(CUDA)), strict=True)
    )
    by_triton = ways.choose(leaves[0], leaves[3], leaves[4], dropout_p > 0)[0] is ways.BY_TRITON
    layer.followed = adapter_dtype is dtype and not (dropout_p or by_triton)
    assert (y.grad_fn.name() == "RecordedBackward") != layer.followed
    for name, exact in (layer.gradients(grad) | {"y": layer.output()}).items():
        if name in found:
            if by_triton:  # `triton._dot`: h or z, then what is made of it
                exact.terms += (2 + 3) * 2**8  # 2**-16 is 2**8 units of float32
            if dtype in HALF and name == "y":  # of a single row, torch's own product is rounded before the bias
                exact.rounded = exact.rounded + (x.double() @ W.double().T).abs()
            exact.check(found[name].cpu(), name)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("shape", "ranks", "dropouts", "layout", "adapters_are_half"),
    [
        ((9, 1104, 600), (5,), (), "strided", True),
        ((9, 1104, 600), (33,), (), "transposed", False),
        ((9, 1104, 2056), (5,), (), "contiguous", False),  # on Hopper one pass over the weight, as it streams
        ((50, 520, 2056), (33,), (), "strided", False),
        ((600, 1104, 200), (70,), (), "transposed", False),
        ((1300, 520, 200), (66, 4, 3), (0.3, 0.0, 0.6), "strided", True),
        ((2100, 1104, 264), (16,), (0.1,), "offset", False),
    ],
)
def test_views_and_poisoned_memory(dtype, shape, ranks, dropouts, layout, adapters_are_half):
    """By Triton's kernels, in parts and splits, where what is allocated begins as NaN."""
    check_stacked(dtype, shape, ranks, dropouts, layout, adapters_are_half)


def check_stacked(dtype, shape, ranks, dropouts, layout, adapters_are_half):
    (M, K, N), r, adapter_dtype = shape, sum(ranks), dtype if adapters_are_half else torch.float32
    sizes = ((M, K), (N, K), (N,), (r, K), (N, r))
    x, _, _, A, B = leaves = [
        laid_out(size, of, layout, K**-0.25, CUDA).requires_grad_()
        for size, of in zip(sizes, [dtype] * 3 + [adapter_dtype] * 2, strict=True)
    ]
    grad = laid_out((M, N), dtype, layout, device=CUDA)
    masks = seeded_masks(3, x, ranks, dropouts) if dropouts else [(slice(None), None)]
    layer = Layer(*leaves, 0.5, masks, launches=len(ranks))
    poison = [torch.full((size,), torch.nan, device=CUDA) for size in [2**12] * 100 + [2**24]]
    del poison
    y = lora_linear_stacked(*leaves, 0.5, dropouts, ranks)
    exact = layer.gradients(grad) | {"y": layer.output()}
    found = zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y, (x, A, B), grad), strict=True)
    for name, actual in (("y", y.detach()), *found):
        exact[name].terms += (2 + 3) * 2**8  # as above
        exact[name].check(actual, name)


@pytest.fixture
def carried(monkeypatch):
    """The calls of the product that carries the rank, which is taken whatever its tiles leave idle."""
    kernels = ways._gluon_kernels(0)
    if kernels is None:
        pytest.skip("needs a Hopper card, and a release of Triton that Gluon's kernels have run with")
    calls, product = [], kernels.product
    monkeypatch.setattr(kernels, "fills", lambda *_: True)
    monkeypatch.setattr(kernels, "product", lambda *given: calls.append(given) or product(*given))
    return calls


@pytest.mark.parametrize(
    ("shape", "ranks", "dropouts", "adapters_are_half", "products"),
    [
        ((512, 64, 128), (16,), (), False, 2),
        ((700, 584, 1096), (5,), (), False, 2),
        ((1300, 1096, 520), (70,), (0.3,), True, 2),
        ((2100, 2056, 2064), (16,), (0.1,), False, 2),  # more tiles than multiprocessors
        ((600, 1104, 1088), (66, 4, 3), (0.3, 0.0, 0.6), False, 1),  # each adapter's part of dx has a mask of its own
    ],
)
def test_a_product_that_carries_the_rank(carried, shape, ranks, dropouts, adapters_are_half, products):
    check_stacked(torch.bfloat16, shape, ranks, dropouts, "contiguous", adapters_are_half)
    assert len(carried) == products


def test_bench_of_a_layer():
    pytest.importorskip("peft")
    from torch_fused_lora.bench import measure

    case = measure.Case(1024, 2048, 2048, 8, "bfloat16", "float32", 0.1)
    for direction in ("forward", "forward+backward"):
        found = measure.run(case, direction, CUDA, 0.0)
        assert found.rounds == 5
        assert found.linear_ms > 0
        assert 1024 * 2048 * 2 <= found.peak_bytes["linear"] <= found.peak_bytes["patched"] < found.peak_bytes["peft"]


@pytest.mark.parametrize("columns", [4096, 3584, 2048])  # in wide tiles, narrow ones, and few of these
def test_what_is_carried_by_default(columns):
    if ways._gluon_kernels(0) is None:
        pytest.skip("needs a Hopper card, and a release of Triton that Gluon's kernels have run with")
    x, weight = (torch.empty(rows, 2048, device=CUDA, dtype=torch.bfloat16) for rows in (1024, columns))
    assert ways.carrying_rank(x, weight, columns)
    for rows, base in ((x[:500], weight), (x[:, 1:], weight[:, 1:]), (x.half(), weight.half()), (x, None)):
        assert ways.carrying_rank(rows, base, columns) is None


@pytest.mark.parametrize("dtypes", DELTA_DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [1, 77, 1500])
def test_lora_delta_against_float64(dtypes, dropout_p, rows):
    (y_dtype, _, adapter_dtype), (K, N, r) = dtypes, (136, 96, 5)
    y, *others = operands(dtypes, (rows,), (K, N, r), CUDA)
    exact = Delta(y, *others, 0.5, seeded_masks(3, others[0], [r], [dropout_p]))
    by_triton = ways.choose(*others, dropout_p > 0)[0] is ways.BY_TRITON
    before = y.detach().clone()
    found = tfl.lora_delta(y, *others, 0.5, dropout_p, training=True)
    assert torch.equal(y, before)
    output = exact.output()
    if by_triton:
        output.terms += (2 + 3) * 2**8
    elif y_dtype == torch.float32 and adapter_dtype in HALF:  # a product of halves is a half h, as the stock one
        output.magnitude = output.magnitude + UNIT[adapter_dtype] / UNIT[torch.float32] * exact.low_rank()[1]
    output.check(found.detach())
    grad = torch.randn(rows, N).to(found)
    gradient, *gradients = torch.autograd.grad(found, (y, *others), grad)
    assert torch.equal(gradient, grad)
    for name, gradient in zip(NAMES[1:], gradients, strict=False):
        expected = exact.gradients(grad)[name]
        if y_dtype in HALF and by_triton:
            expected.terms += (2 + 3) * 2**8
        expected.check(gradient, name)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [1, 16, 77])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32)])
def test_packed_words_against_float64(dtype, adapter_dtype, adapters, dropout_p, rows, bits, group_size, monkeypatch):
    monkeypatch.setattr(quantized_portable, "_BLOCK_ELSEWHERE", 1 << 13)
    K, N, r = 192, 96, 5
    packed = quantize((torch.randn(N, K) * K**-0.25).bfloat16(), bits, group_size)
    x, b = torch.randn(rows, K).to(CUDA, dtype), torch.randn(N).to(CUDA, dtype)
    A, B = ((torch.randn(s) * K**-0.25).to(CUDA, adapter_dtype) for s in ((r, K), (N, r)))
    leaves = [t.requires_grad_() for t in ((x, b, A, B) if adapters else (x, b))]
    drops = dropout_p and adapters
    masks = seeded_masks(3, x, [r], [dropout_p if adapters else 0.0])
    layer = QuantizedLayer.of(x, packed, b, A, B, 0.5 if adapters else 0.0, masks)
    words, scales, biases = (t.to(CUDA) for t in packed[:3])
    options = {"dropout_p": dropout_p, "training": True} if adapters else {}
    adapter = (A, B, 0.5) if adapters else (None, None)
    y = quantized_call(x, Packed(words, scales, biases, bits, group_size), b, *adapter, **options)
    grad = torch.randn(rows, N).to(CUDA, dtype)
    found = {"y": y.detach()} | dict(
        zip(("x", "bias", "lora_A", "lora_B"), torch.autograd.grad(y, leaves, grad), strict=False)
    )
    for name, exact in (layer.gradients(grad) | {"y": layer.output()}).items():
        if name in found:
            by_triton = adapters and dtype in HALF and (not drops or K % 8 == 0)
            if by_triton or (dtype in HALF and name == "y"):  # `triton._dot`
                exact.terms += (2 + 3) * 2**8
            exact.check(found[name].cpu(), name)


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(0, 64, 48), (40, 0, 48), (40, 64, 0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_empty(rows, columns, outputs, dropout_p):
    a = [torch.randn(s, device=CUDA) for s in ((rows, columns), (outputs, columns), (4, columns), (outputs, 4))]
    x, W, A, B = (t.to(torch.bfloat16 if i < 2 else torch.float32).requires_grad_() for i, t in enumerate(a))
    y = tfl.lora_linear(x, W, None, A, B, 0.5, dropout_p, training=True)
    assert y.shape == (rows, outputs)
    assert not y.any()
    for leaf, grad in zip((x, W, A, B), torch.autograd.grad(y.float().sum(), (x, W, A, B)), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1000, 129), (0, 7)])
def test_masks_are_those_of_the_cpu(shape):
    for start, seed, stream, p in ((0, 5, 0, 0.3), (7, 2**63 - 1, 2, 0.05), (2**28, 1, 1, 0.9)):
        columns = shape[1]
        host = gpu_mask(seed, stream, start * columns, shape[0] * columns, round(p * 2**32)).view(shape)
        assert torch.equal(keep_mask(seed, stream, start, *shape, p, CUDA).cpu(), host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 33])
def test_doctor(dtype, rows):
    error, allowed = self_test(CUDA, dtype, rows)
    assert error <= allowed


def test_scaling_on_the_device_does_not_synchronise():
    a = [torch.randn(s, device=CUDA, requires_grad=True) for s in ((700, 8), (6, 8), (6,), (2, 8), (6, 2))]
    expected = tfl.lora_linear(*a, 0.5)
    scaling = torch.tensor(0.5, device=CUDA, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = tfl.lora_linear(*a, scaling)
        y.sum().backward()
        tfl.lora_linear(*a, scaling, 0.5, training=True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y, expected)
    assert scaling.grad is not None


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    """Also where inductor would capture CUDA graphs: a scaling that changes must not be replayed."""
    a = [torch.randn(s, device=CUDA) for s in ((64, 8), (6, 8), (6,), (2, 8), (6, 2))]
    compiled = torch.compile(lambda x, s: tfl.lora_linear(x.sin(), *a[1:], s).cos(), mode=mode, fullgraph=True)
    for i in range(6):
        scaling = torch.tensor(float(i))
        with torch.no_grad():
            torch.testing.assert_close(compiled(a[0], scaling), tfl.lora_linear(a[0].sin(), *a[1:], scaling).cos())


def layer_operands(rows=64, dtype=torch.bfloat16):
    a = [torch.randn(s, device=CUDA) / 4 for s in ((rows, 64), (48, 64), (48,), (8, 64), (48, 8))]
    return [t.to(dtype).requires_grad_() for t in a[:3]] + [t.requires_grad_() for t in a[3:]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_captured_training_step(dtype, dropout_p):
    """Replayed, it computes what it did; with dropout each time with another mask, which manual_seed brings back."""
    check_captured(layer_operands(dtype=dtype), dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_captured_step_that_carries_the_rank(carried, dropout_p):
    check_captured(layer_operands(600), dropout_p)
    assert len(carried) == 8


@pytest.mark.parametrize("rows", [5, 40, 600])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_on_another_device_is_refused(rows, adapter_dtype):
    """By whoever knows dtypes and layouts to fit, after calls that prepared launches of one in its place."""
    x, W, b, A, B = (t.detach() for t in layer_operands(rows))
    A, B = A.to(adapter_dtype), B.to(adapter_dtype)
    lora_linear_stacked(x, W, b, A, B, 0.5, checked=True)
    for name, *adapter in (("lora_A", A.cpu(), B), ("lora_B", A, B.cpu())):
        with pytest.raises(ValueError, match=f"lora_linear: {name}: expected x's device cuda:0"):
            lora_linear_stacked(x, W, b, *adapter, 0.5, checked=True)


def test_a_capture_without_a_call_before_it():
    """It compiles what is not compiled yet, and loads it. Of small whole numbers nothing is rounded."""
    a = [torch.randint_like(t, -1, 2).detach().bfloat16().requires_grad_() for t in layer_operands(52)]
    x, W, b, A, B = wide = [t.detach().double().requires_grad_() for t in a]
    grad = torch.randint(-1, 2, (52, 48), device=CUDA, dtype=torch.bfloat16)
    y = F.linear(x, W, b) + F.linear(F.linear(x, A), B)
    expected = y, *torch.autograd.grad(y, wide, grad.double())
    kernels = ways.triton_kernels()
    kernels.prepared.clear()
    for launcher in (kernels._launch_product, kernels._launch_expand, kernels._launch_gradients):
        launcher._kernel.device_caches.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tfl.lora_linear(*a, 1.0)
        captured = y, *torch.autograd.grad(y, a, grad)
    graph.replay()
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(captured, expected, strict=True))


def check_captured(a, dropout_p):

    def step():
        y = tfl.lora_linear(*a, 0.5, dropout_p, training=True)
        return y, *torch.autograd.grad(y.float().square().sum(), a)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    def replay(seed):
        torch.manual_seed(seed)
        graph.replay()
        return [t.clone() for t in captured]

    first, again, other = replay(1), replay(1), replay(2)
    assert all(torch.equal(f, g) for f, g in zip(first, again, strict=True))
    if dropout_p == 0.0:
        torch.testing.assert_close(first, list(expected))
    else:
        assert not torch.equal(first[0], other[0])
        graph.replay()
        assert not torch.equal(captured[0], other[0])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_reduce_overhead(keep, dropout_p):
    """CUDA graphs of torch.compile, with torch's own calls in them and with the operators."""
    a = layer_operands()
    torch.compiler.reset()
    with tfl.keep_operators() if keep else contextlib.nullcontext():
        compiled = torch.compile(lambda x: tfl.lora_linear(x, *a[1:], 0.5, dropout_p, True), mode="reduce-overhead")
        found = []
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(a[0])
            found.append((y.detach().clone(), torch.autograd.grad(y.float().sum(), a[3])[0].clone()))
    if dropout_p == 0.0:
        expected = tfl.lora_linear(*a, 0.5)
        for y, grad in found:
            torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)
            own = torch.autograd.grad(expected.float().sum(), a[3], retain_graph=True)[0]
            # products of ours are within 3 * 2**-16 of their magnitude, here of 48 * 64 terms that are below 1
            torch.testing.assert_close(grad, own, rtol=0, atol=3 * 2**-16 * 48 * 64 / 16)
    else:
        assert not torch.equal(found[-1][0], found[-2][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    a = [torch.randn(s, device=CUDA, requires_grad=True) for s in ((64, 8), (6, 8), (6,), (2, 8), (6, 2))]
    with torch.autocast("cuda", dtype):
        y = tfl.lora_linear(*a, 0.5)
    Layer(*[t.detach().cpu().to(dtype) for t in a], 0.5).output().check(y.detach().cpu())
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in a)


@pytest.mark.parametrize(("dtype", "weight_dtype"), ROW_DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (33, 130), (3, 5001), (2000, 1024)])
def test_rms_norm_against_float64(dtype, weight_dtype, shape):
    x, grad = (torch.randn(shape).to(CUDA, dtype) for _ in range(2))
    weight = torch.randn(shape[-1]).to(CUDA, weight_dtype).requires_grad_() if weight_dtype is not None else None
    x.requires_grad_()
    for rms_norm in (tfl.rms_norm, torch.ops.torch_fused_lora.rms_norm):  # the shortest way, and the operator
        y = rms_norm(x, weight, EPS)
        found = torch.autograd.grad(y, (x,) if weight is None else (x, weight), grad)
        assert [t.dtype for t in (y, *found)] == [dtype, dtype, weight_dtype][: 1 + len(found)]
        for exact, actual in zip(exact_rms_norm(x, weight, grad), (y.detach(), *found), strict=False):
            exact.check(actual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [-1, 0])
def test_softmax_is_torchs(dtype, dim):
    x = torch.randn(33, 130).to(CUDA, dtype).requires_grad_()
    grad = torch.randn_like(x)
    for softmax in (tfl.softmax, torch.ops.torch_fused_lora.softmax):
        assert torch.equal(softmax(x, dim), torch.softmax(x, dim))
        expected = torch.autograd.grad(torch.softmax(x, dim), x, grad)
        torch.testing.assert_close(torch.autograd.grad(softmax(x, dim), x, grad), expected, rtol=0, atol=0)


def test_a_mixed_rms_norm_is_a_few_calls():
    """A float32 weight over bfloat16, as Gemma's: torch's kernels on the wider type, never blocks."""
    x, weight = torch.randn(8192, 1024, device=CUDA).bfloat16(), torch.randn(1024, device=CUDA)
    tfl.rms_norm(x, weight)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        tfl.rms_norm(x, weight)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 4, kernels  # to float32, the norm, and back


def test_patch_norms_leaves_what_is_one_kernel_alone():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    model = torch.nn.ModuleList([torch.nn.RMSNorm(64), llama.LlamaRMSNorm(64)]).to(CUDA, torch.bfloat16)
    x = torch.randn(5, 64, device=CUDA, dtype=torch.bfloat16)
    expected = model[1](x)
    report = tfl.patch_norms(model)
    assert report.patched == ["1"]
    assert report.declined == {"0": "torch's own is one kernel each way on cuda already"}
    torch.testing.assert_close(model[1](x), expected, rtol=2**-7, atol=0)
