"""quantized_linear and lora_linear_quantized: the format against MLX's own, numbers against float64, and all that an
operator has to be."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import torch_fused_lora as tfl
from tests.budget import examples
from tests.operators.test_autograd import check_batched_gradients, check_forward_mode
from tests.operators.test_lora_linear import AllocationsOf, laid_out, seeded_masks
from tests.reference import MIXED, UNIT, QuantizedLayer, unpacked, with_table
from torch_fused_lora.affine import BITS, GROUP_SIZES, SCALE_DTYPES, Packed, quantize
from torch_fused_lora.ops.lora_linear_quantized import portable
from torch_fused_lora.ops.lora_linear_quantized.operator import lora_linear_quantized_stacked

ops = torch.ops.torch_fused_lora
FORMATS = [(bits, group_size) for bits in BITS for group_size in GROUP_SIZES]
NAMES = ("x", "bias", "lora_A", "lora_B", "scaling")


def weights(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Of every kind of group: plain ones, of one sign, constant, of zeros, with an outlier, tiny, huge."""
    weight = torch.randn(max(rows, 8), columns) * 0.05
    weight[1].abs_(), weight[2].abs_().neg_()
    weight[3], weight[4] = 0.03, 0.0
    weight[5, ::32] = 7.0
    weight[6] *= 1e-6
    weight[7] *= 1e5
    return weight[:rows].to(dtype)


def operands(bits=4, group_size=32, lead=(4,), sizes=(64, 5, 2), dtype=torch.float64, adapter_dtype=None, needs=True):
    """x, the packed weight, bias, lora_A, lora_B and scaling."""
    K, N, r = sizes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = (*lead, K), (N,), (r, K), (N, r), ()
    dtypes = dtype, dtype, adapter_dtype or dtype, adapter_dtype or dtype, wide
    x, *others = (torch.randn(s).to(t).requires_grad_(needs) for s, t in zip(shapes, dtypes, strict=True))
    return [x, quantize(torch.randn(N, K) * K**-0.5, bits, group_size), *others]


def call(x, packed, bias, lora_A, lora_B, scaling=1.0, **options):
    words, scales, biases, bits, group_size = packed
    options |= {"bits": bits, "group_size": group_size}
    if lora_A is None:
        return tfl.quantized_linear(x, words, scales, biases, bias, **options)
    return tfl.lora_linear_quantized(x, words, scales, biases, bias, lora_A, lora_B, scaling, **options)


# ---------------------------------------------------------------------------------------------------- MLX's own format


def mlx():
    module = pytest.importorskip("mlx.core", reason="mlx[cpu] is not installed")
    module.set_default_device(module.cpu)  # its kernels for Apple's GPU round halves away from zero
    return module


def to_mlx(tensor: torch.Tensor):
    if tensor.dtype == torch.uint32:
        return mlx().array(tensor.numpy())
    name = str(tensor.dtype).removeprefix("torch.")
    return mlx().array(tensor.float().numpy()).astype(getattr(mlx(), name))


def from_mlx(array, dtype: torch.dtype) -> torch.Tensor:
    if dtype != torch.uint32:
        array = array.astype(mlx().float32)
    return torch.from_numpy(numpy.array(array)).to(dtype)


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_the_same_bits_as_mlx(bits, group_size, dtype):
    weight = weights(40, 384, dtype)
    found = quantize(weight, bits, group_size)
    expected = mlx().quantize(to_mlx(weight), group_size, bits)
    for name, theirs in zip(("words", "scales", "biases"), expected, strict=True):
        ours = getattr(found, name)
        assert torch.equal(ours, from_mlx(theirs, ours.dtype)), name


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_dequantize(bits, group_size, dtype):
    """scale * q + bias, where a half scale's product with q is exact in float32; MLX rounds it to the scales' dtype."""
    packed = quantize(weights(9, 384, dtype), bits, group_size)
    scales, biases = (t.double().repeat_interleave(group_size, 1) for t in (packed.scales, packed.biases))
    exact = scales * unpacked(packed) + biases
    size = (scales * unpacked(packed)).abs() + biases.abs()
    assert torch.equal(packed.dequantize(torch.float64), exact)
    assert ((packed.dequantize(torch.float32) - exact).abs() <= 2 * UNIT[torch.float32] * size).all()
    if dtype != torch.float32:
        assert torch.equal(packed.dequantize(torch.float32), exact.float())
    for narrow in (torch.bfloat16, torch.float16):
        assert torch.equal(packed.dequantize(narrow), packed.dequantize(torch.float32).to(narrow))
    theirs = from_mlx(mlx().dequantize(*map(to_mlx, packed[:3]), group_size, bits), dtype)
    assert ((theirs.double() - exact).abs() <= 3 * UNIT[dtype] * size).all()


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_the_product_is_mlx_s(bits, group_size, dtype):
    """Each is within its own roundings of the exact one: on a CPU, MLX sums in x's dtype."""
    x, packed = torch.randn(6, 128).to(dtype), quantize(torch.randn(24, 128).to(dtype), bits, group_size)
    ours = call(x, packed, None, None, None)
    theirs = mlx().quantized_matmul(to_mlx(x), *map(to_mlx, packed[:3]), True, group_size, bits)
    exact = QuantizedLayer.of(x, packed, None, torch.zeros(1, 128), torch.zeros(24, 1), 0.0).output()
    exact.check(ours)
    exact.terms = int(exact.terms * (UNIT[dtype] / UNIT[torch.float32]))
    exact.check(from_mlx(theirs, dtype))


# ------------------------------------------------------------------------------------------------------------- numbers


@settings(max_examples=examples(150))
@given(
    lead=st.sampled_from([(), (1,), (7,), (33,), (0,), (2, 3), (2, 0, 3), (2, 1, 2, 5)]),
    its_format=st.sampled_from(FORMATS),
    groups=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 70), st.sampled_from([0, 1, 2, 3, 8, 17])),
    dtypes=st.sampled_from([(torch.float64, torch.float64), *MIXED]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"]),
    has_bias=st.booleans(),
    scaling=st.sampled_from([0.0, 1.0, -0.37, torch.tensor(2.0)]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    block=st.sampled_from([1, 400, 1 << 20]),
    needs=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_output_and_gradients(
    lead, its_format, groups, sizes, dtypes, scale_dtype, layout, has_bias, scaling, dropout_p, block, needs
):
    (bits, group_size), (N, r), (dtype, adapter_dtype) = its_format, sizes, dtypes
    K = groups * group_size
    torch.manual_seed(K * 100 + N)
    packed = quantize((torch.randn(N, K) * K**-0.5).to(scale_dtype), bits, group_size)
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.to(wide, copy=True)
    tensors = {
        "x": laid_out((*lead, K), dtype, layout),
        "bias": laid_out((N,), dtype, "offset") if has_bias else None,
        "lora_A": laid_out((r, K), adapter_dtype, layout, K**-0.5) if r else None,
        "lora_B": laid_out((N, r), adapter_dtype, layout) if r else None,
        "scaling": scaling if r else 1.0,
    }
    wanted = [name for name, need in zip(NAMES, needs, strict=True) if need and isinstance(tensors[name], torch.Tensor)]
    for name in wanted:
        tensors[name].requires_grad_()
    x, bias, lora_A, lora_B, scaling = tensors.values()
    dropout = {"dropout_p": dropout_p, "training": True} if r else {}
    masks = seeded_masks(5, x, [r or 1], [dropout_p])
    zero = lora_A is None and (x.new_zeros(1, K), x.new_zeros(N, 1))
    exact_scaling = scaling if isinstance(scaling, torch.Tensor) else torch.tensor(scaling, dtype=wide)
    layer = QuantizedLayer.of(x, packed, bias, *(zero or (lora_A, lora_B)), exact_scaling.item(), masks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "_BLOCK", block)
        y = call(x, packed, bias, lora_A, lora_B, scaling, **dropout)
        assert y.dtype == dtype
        assert y.is_contiguous()
        layer.output().check(y.detach())
        assert y.requires_grad == bool(wanted)
        if wanted:
            grad = laid_out(tuple(y.shape), dtype, layout)
            exact = layer.gradients(grad)
            for name, g in zip(wanted, torch.autograd.grad(y, [tensors[n] for n in wanted], grad), strict=True):
                assert g.dtype == tensors[name].dtype
                exact[name].check(g, name)


@pytest.mark.parametrize("dropout_p", [(), (0.3, 0.0, 0.6)])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED)
def test_stacked_adapters(dtype, adapter_dtype, dropout_p):
    ranks = [2, 1, 4]
    x, packed, bias, A, B, _ = operands(8, 64, (6,), (128, 10, 7), dtype, adapter_dtype)
    masks = seeded_masks(1, x, ranks, list(dropout_p)) if dropout_p else [(slice(None), None)]
    layer = QuantizedLayer.of(x, packed, bias, A, B, 1.0, masks)
    y = lora_linear_quantized_stacked(x, packed, bias, A, B, 1.0, dropout_p, ranks)
    layer.output().check(y.detach())
    grad = torch.randn(6, 10).to(dtype)
    for name, g in zip(NAMES[:4], torch.autograd.grad(y, (x, bias, A, B), grad), strict=True):
        layer.gradients(grad)[name].check(g, name)


@pytest.mark.parametrize("block", [1, 700, 1 << 20])
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float64, torch.float64), *MIXED])
def test_a_weight_of_codes_of_a_table(dtype, adapter_dtype, adapters, block, monkeypatch):
    monkeypatch.setattr(portable, "_BLOCK", block)
    x, _, *others = operands(4, 64, (6,), (192, 10, 3), dtype, adapter_dtype)
    packed = with_table(10, 192, 64, 0.1)
    leaves = dict(zip(NAMES, (x, *others) if adapters else (x, others[0]), strict=False))
    adapter = (*others[1:3], others[3].item()) if adapters else (torch.zeros(1, 192), torch.zeros(10, 1), 0.0)
    layer = QuantizedLayer.of(x, packed, others[0], *adapter)
    y = call(packed=packed, **{"lora_A": None, "lora_B": None} | leaves)
    layer.output().check(y.detach())
    grad = torch.randn(6, 10).to(dtype)
    for name, found in zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True):
        layer.gradients(grad)[name].check(found, name)


def test_opcheck_of_a_table():
    x, _, bias, A, B, s = operands(4, 64, (3,), (128, 5, 2), torch.float32)
    words, scales, table, *its_format = with_table(5, 128)
    torch.library.opcheck(
        ops.lora_linear_quantized_forward, (x, words, scales, table, bias, A, B, s, None, [], [], *its_format, False)
    )
    grad, h = torch.randn(3, 5), torch.randn(3, 2)
    arguments = grad, x, words, scales, table, A, B, s, h, None, [], [], *its_format, [True] * 5
    torch.library.opcheck(ops.lora_linear_quantized_backward, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_never_whole(dtype):
    """Blocks of 4 MiB of float32; of what grows with the rows nothing but the output, forward and backward."""
    N = K = 2304  # five blocks
    packed = quantize(torch.randn(N, K), 4, 64)
    x, A, B = (torch.randn(s).to(dtype).requires_grad_() for s in ((3, K), (2, K), (N, 2)))
    with AllocationsOf((1 << 20) + 1) as large:
        y, h = portable.forward(x, *packed[:3], None, A, B, 1.0, None, (), (), 4, 64, True)
        needs = True, False, True, True, False
        portable.backward(y, x, *packed[:3], A, B, 1.0, h, None, (), (), 4, 64, needs)
    assert large.found == []


# --------------------------------------------------------------------------------------------------------- derivatives


def differentiable(packed, adapters=True, **options):
    """The operator as a function of x, bias, lora_A, lora_B and scaling, or of the first two."""

    def layer(x, bias, lora_A=None, lora_B=None, scaling=1.0):
        torch.manual_seed(11)
        return call(x, packed, bias, lora_A, lora_B, scaling, **(options if adapters else {}))

    return layer


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("lead", [(), (4,), (2, 2)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_and_gradgradcheck(lead, adapters, dropout_p):
    x, packed, *others = operands(lead=lead)
    layer = differentiable(packed, adapters, dropout_p=dropout_p, training=True)
    leaves = (x, *others) if adapters else (x, others[0])
    assert gradcheck(layer, leaves, fast_mode=True)
    assert gradgradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize("adapters", [True, False])
def test_the_layer_is_that_over_the_dequantised_weight(adapters):
    """To all orders, by every transform."""
    x, packed, *others = operands(lead=(2, 3))
    leaves = [x, *others] if adapters else [x, others[0]]
    weight = packed.dequantize(torch.float64)
    layer = differentiable(packed, adapters)

    def twin(x, bias, lora_A=None, lora_B=None, scaling=1.0):
        if lora_A is None:
            return torch.nn.functional.linear(x, weight, bias)
        return tfl.lora_linear(x, weight, bias, lora_A, lora_B, scaling)

    same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    plain = [leaf.detach() for leaf in leaves]
    tangents = tuple(torch.randn_like(leaf) for leaf in plain)
    for transform in (
        lambda f: f(*plain),
        lambda f: torch.func.jvp(f, tuple(plain), tangents),
        lambda f: torch.func.vjp(f, *plain)[1](torch.ones(2, 3, 5, dtype=torch.float64)),
        lambda f: torch.func.grad(lambda *a: f(*a).sin().sum(), tuple(range(len(plain))))(*plain),
        lambda f: torch.func.vmap(f, (0, *[None] * (len(plain) - 1)))(*plain),
        lambda f: torch.func.hessian(lambda b: f(plain[0], b, *plain[2:]).sin().sum())(plain[1]),
    ):
        same(transform(layer), transform(twin))
    check_forward_mode(lambda *a: layer(*a).sin().sum(), plain)
    check_batched_gradients(layer(*leaves), leaves)


def test_what_is_packed_has_no_gradient():
    x, packed, bias, A, B, s = operands()
    scales = packed.scales.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"lora_linear_quantized: scales: expected one that asks for no gradient"):
        call(x, packed._replace(scales=scales), bias, A, B, s)


# ------------------------------------------------------------------------------------- torch.library, compilers, others


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "lead", "needs"),
    [
        (torch.float64, None, (), True),
        (torch.float32, None, (0,), True),
        (torch.bfloat16, torch.float32, (2, 3), True),
        (torch.float16, None, (4,), False),
    ],
)
def test_opcheck(dtype, adapter_dtype, lead, needs):
    x, (words, scales, biases, *its_format), bias, A, B, s = operands(
        8, 32, lead, dtype=dtype, adapter_dtype=adapter_dtype, needs=needs
    )
    opcheck, packed = torch.library.opcheck, (words, scales, biases)
    forward, backward = ops.lora_linear_quantized_forward, ops.lora_linear_quantized_backward
    opcheck(forward, (x, *packed, bias, A, B, s, None, [], [], *its_format, not needs))
    opcheck(forward, (x, *packed, None, A, B, s, torch.tensor(4), [0.5, 0.0], [1, 1], *its_format, False))
    opcheck(forward, (x, *packed, bias, None, None, s, None, [], [], *its_format, not needs))
    grad, h = torch.randn(*lead, 5).to(x), torch.randn(x[..., 0].numel(), 2).to(A)
    opcheck(backward, (grad, x, *packed, A, B, s, h, None, [], [], *its_format, [True] * 5))
    opcheck(backward, (grad, None, *packed, None, None, s, None, None, [], [], *its_format, [True, True] + [False] * 3))


@pytest.fixture(params=["keep_operators", "by itself"])
def compiling(request):
    torch.compiler.reset()
    with tfl.keep_operators() if request.param == "keep_operators" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float32, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_graph_break(compiling, backend, adapters, dtype, adapter_dtype):
    x, packed, *others = operands(4, 64, (2, 3), (64, 5, 2), dtype, adapter_dtype)
    leaves = dict(zip(NAMES, (x, *others) if adapters else (x, others[0]), strict=False))
    compiled = torch.compile(partial(call, packed=packed), fullgraph=True, backend=backend)
    y = compiled(**{"lora_A": None, "lora_B": None} | leaves)
    adapter = others[1:] if adapters else (torch.zeros(1, 64), torch.zeros(5, 1), 0.0)
    layer = QuantizedLayer.of(x, packed, others[0], *adapter, launches=2)  # torch's calls round base and term apart
    layer.output().check(y.detach())
    grad = torch.randn(2, 3, 5).to(dtype)
    for name, found in zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True):
        layer.gradients(grad)[name].check(found, name)


class Module(torch.nn.Module):
    def __init__(self, packed, bias, A, B):
        super().__init__()
        self.layer = tfl.QuantLinear(64, 5, bits=packed.bits, group_size=packed.group_size)
        self.layer.load_state_dict(
            {"weight": packed.words, "scales": packed.scales, "biases": packed.biases, "bias": bias}
        )
        self.register_buffer("A", A)
        self.register_buffer("B", B)

    def forward(self, x):
        return self.layer(x) + call(x, self.layer.packed, self.layer.bias, self.A, self.B, 0.5)


@pytest.mark.parametrize("strict", [True, False])
def test_export(compiling, strict, tmp_path):
    """With this package's operators, and without."""
    x, packed, bias, A, B, _ = operands(4, 64, (3,), dtype=torch.float32, needs=False)
    module = Module(packed, bias, A, B)
    shapes = {"x": {0: torch.export.Dim("tokens", min=2, max=64)}}
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2")
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("torch_fused_lora" in name for name in called) == (compiling == "keep_operators")
    x = torch.randn(7, 64)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [True, False])
def test_autocast(adapters, dtype):
    x, packed, bias, A, B, _ = operands(4, 64, (6,), (64, 5, 2), torch.float32)
    leaves = [x, bias, A, B] if adapters else [x, bias]
    with torch.autocast("cpu", dtype):
        y = call(x, packed, bias, *leaves[2:], 0.5) if adapters else call(x, packed, bias, None, None)
    assert y.dtype == dtype
    cast = [t.detach().to(dtype) for t in (x, bias, A, B)]
    layer = QuantizedLayer.of(cast[0], packed, *cast[1:], 0.5 if adapters else 0.0)
    layer.output().check(y.detach())
    grad = torch.randn(6, 5).to(dtype)
    for name, leaf, g in zip(NAMES, leaves, torch.autograd.grad(y, leaves, grad), strict=False):
        assert g.dtype == leaf.dtype
        layer.gradients(grad)[name].check(g.to(dtype), name)


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    x, packed, bias, A, B, s = operands(lead=(7,), sizes=(64, 5, 2), dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        call(x, packed, bias, A, B, s).sum().backward()
    base, rank = 2 * 7 * 64 * 5, 2 * 7 * 2 * (64 + 5)
    assert counter.get_total_flops() == 2 * base + 3 * rank
    with FlopCounterMode(display=False) as counter:
        call(x, packed, bias, None, None).sum().backward()
    assert counter.get_total_flops() == 2 * base


# -------------------------------------------------------------------------------------------------------------- errors

TABLE = dict(zip(("weight", "scales", "biases"), with_table(5, 64, 32), strict=False))
BAD = {
    "bytes in 8 bits": (TABLE | {"bits": 8}, "bits: expected 4, since weight is torch.uint8"),
    "bytes of no group": (TABLE | {"weight": TABLE["weight"][:, 1:]}, r"weight: .*\(N, K / 2\), K a multiple of 32"),
    "half scales of a table": (TABLE | {"scales": TABLE["scales"].half()}, "scales: .* torch.float32, since weight"),
    "a table of 8": (TABLE | {"biases": TABLE["biases"][:8]}, r"biases: expected a table of shape \(16,\)"),
    "x too narrow": (
        {"x": torch.randn(4, 32)},
        r"x: expected shape \(\.\.\., 64\), since weight is \(5, 64\) in 4 bits",
    ),
    "x integer": ({"x": torch.ones(4, 64, dtype=torch.int32)}, "x: expected float16, bfloat16, float32 or float64"),
    "words signed": ({"weight": torch.zeros(5, 8, dtype=torch.int32)}, r"weight: expected shape \(N, K \* 4 / 32\)"),
    "words of no group": ({"weight": torch.zeros(5, 7, dtype=torch.uint32)}, "weight: .* K a multiple of 32"),
    "words 1-D": ({"weight": torch.zeros(8, dtype=torch.uint32)}, "weight: expected shape"),
    "weight on another device": ({"weight": torch.zeros(5, 8, dtype=torch.uint32, device="meta")}, "weight: .* device"),
    "scales of other groups": ({"scales": torch.zeros(5, 1)}, r"scales: expected shape \(5, 2\)"),
    "scales float64": ({"scales": torch.zeros(5, 2).double()}, "scales: expected .* float16, bfloat16 or float32"),
    "biases of another dtype": (
        {"biases": torch.zeros(5, 2).half()},
        "biases: expected .* scales' dtype torch.float32",
    ),
    "bias short": ({"bias": torch.zeros(1)}, r"bias: expected shape \(5,\)"),
    "bias dtype": ({"bias": torch.zeros(5).half()}, "bias: expected .* x's dtype torch.float32"),
    "lora_A narrow": ({"lora_A": torch.zeros(2, 8)}, r"lora_A: expected shape \(r, 64\)"),
    "lora_B transposed": ({"lora_B": torch.zeros(2, 5)}, r"lora_B: expected shape \(5, 2\)"),
    "lora_A half": ({"lora_A": torch.zeros(2, 64).half()}, "lora_A: expected x's dtype torch.float32"),
    "scaling 1-D": ({"scaling": torch.zeros(1)}, "scaling: expected a 0-dim"),
    "3 bits": ({"bits": 3}, r"bits: expected 4 or 8 \(2, 3, 5 and 6 are not supported\); got 3"),
    "groups of 16": ({"group_size": 16}, "group_size: expected 32, 64 or 128; got 16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, expected = BAD[case]
    x, (words, scales, biases, *_), bias, A, B, s = operands(dtype=torch.float32, needs=False)
    good = {"x": x, "weight": words, "scales": scales, "biases": biases, "bias": bias, "lora_A": A, "lora_B": B}
    good |= {"scaling": s, "bits": 4, "group_size": 32}
    options = {"seed": None, "dropout_p": [], "ranks": [], "save_h": True}
    functions = tfl.lora_linear_quantized, partial(ops.lora_linear_quantized_forward, **options)
    for function in functions:
        function(**good)
        with pytest.raises(ValueError, match=f"lora_linear_quantized: {expected}"):
            function(**(good | changes))


def test_arguments_of_other_types():
    x, packed, bias, A, B, _ = operands()
    with pytest.raises(TypeError, match="scales: expected a Tensor, got str"):
        call(x, packed._replace(scales="1"), bias, A, B)
    with pytest.raises(TypeError, match="bias: expected a Tensor or None, got int"):
        call(x, packed, 1, None, None)
    with pytest.raises(ValueError, match="lora_linear_quantized: lora_A: expected both of lora_A and lora_B"):
        lora_linear_quantized_stacked(x, packed, bias, None, B, 1.0)


@pytest.mark.parametrize("name", ["weight", "scales", "biases"])
def test_a_packed_tensor_changed_after_the_forward_is_noticed(name):
    x, packed, bias, A, B, s = operands()
    packed = Packed(*copy.deepcopy(tuple(packed)))
    y = call(x, packed, bias, A, B, s)
    dict(zip(("weight", "scales", "biases"), packed, strict=False))[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
