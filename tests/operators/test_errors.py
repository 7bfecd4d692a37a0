"""Bad input raises at once, naming the argument, what it is and what was expected."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import torch_fused_lora as tfl

ops = torch.ops.torch_fused_lora
OPERATORS = pytest.mark.parametrize("operator", ["lora_linear", "lora_delta"])


def operands(operator="lora_linear", **changes):
    """By name, for K = 4, N = 3 and r = 2."""
    x, rest = {"x": torch.randn(2, 4)}, {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(3, 2)}
    of_linear, of_delta = x | {"weight": torch.randn(3, 4), "bias": torch.randn(3)}, {"y": torch.randn(2, 3)} | x
    good = (of_linear if operator == "lora_linear" else of_delta) | rest | {"scaling": torch.tensor(1.0)}
    assert not changes.keys() - good.keys()
    return good | changes


def tensors_of(operator):
    return [name for name in operands(operator) if name not in ("bias", "scaling")]


def each(table):
    return [(operator, case) for operator in table for case in table[operator]]


# By case: the operand's name, what is given for it, and what the error expects.
OF_BOTH = {
    "x 0-dim": ("x", torch.tensor(1.0), r"shape \(\.\.\., (4|K)\)"),
    "x integer": ("x", torch.ones(2, 4, dtype=torch.int64), "float16, bfloat16, float32 or float64"),
    "x complex": ("x", torch.randn(2, 4, dtype=torch.complex64), "float16, bfloat16, float32 or float64"),
    "lora_A columns": ("lora_A", torch.randn(2, 3), r"shape \(r, 4\)"),
    "lora_A rank 0": ("lora_A", torch.randn(0, 4), "r >= 1"),
    "lora_A 1-D": ("lora_A", torch.randn(4), r"shape \(r, 4\)"),
    "lora_A half over float": ("lora_A", torch.randn(2, 4).half(), "x's dtype torch.float32"),
    "lora_A double": ("lora_A", torch.randn(2, 4).double(), "x's dtype torch.float32"),
    "lora_A device": ("lora_A", torch.randn(2, 4, device="meta"), "x's device"),
    "lora_B transposed": ("lora_B", torch.randn(2, 3), r"shape \((3|N), 2\)"),
    "lora_B 1-D": ("lora_B", torch.randn(3), r"shape \((3|N), 2\)"),
    "lora_B dtype": ("lora_B", torch.randn(3, 2).bfloat16(), "lora_A's dtype"),
    "scaling 1-D": ("scaling", torch.ones(1), "0-dim"),
    "scaling integer": ("scaling", torch.tensor(1), "floating"),
}
BAD_TENSORS = {
    "lora_linear": OF_BOTH
    | {
        "x too narrow": ("x", torch.randn(2, 3), r"shape \(\.\.\., 4\)"),
        "weight 1-D": ("weight", torch.randn(4), r"shape \(N, K\)"),
        "weight dtype": ("weight", torch.randn(3, 4).half(), "x's dtype torch.float32"),
        "weight device": ("weight", torch.randn(3, 4, device="meta"), "x's device"),
        "bias broadcasts": ("bias", torch.randn(1), r"shape \(3,\)"),
        "bias dtype": ("bias", torch.randn(3).double(), "x's dtype torch.float32"),
    },
    "lora_delta": OF_BOTH
    | {
        "y too narrow": ("y", torch.randn(2, 2), r"shape \(2, 3\)"),
        "y broadcasts": ("y", torch.randn(3), r"shape \(2, 3\)"),
        "y of one row": ("y", torch.randn(1, 3), r"shape \(2, 3\)"),
        "y in another shape": ("y", torch.randn(1, 2, 3), r"shape \(2, 3\)"),
        "y 0-dim": ("y", torch.tensor(1.0), r"shape \(2, 3\)"),
        "y half": ("y", torch.randn(2, 3).half(), "x's dtype torch.float32"),
        "y double": ("y", torch.randn(2, 3).double(), "x's dtype torch.float32"),
        "y integer": ("y", torch.ones(2, 3, dtype=torch.int64), "x's dtype torch.float32"),
        "y device": ("y", torch.randn(2, 3, device="meta"), "x's device"),
    },
}


@pytest.mark.parametrize(("operator", "case"), each(BAD_TENSORS))
@pytest.mark.parametrize("of", [tfl, ops], ids=["function", "operator"])
def test_bad_tensors(device, of, operator, case):
    name, value, expected = BAD_TENSORS[operator][case]
    if device.type != "cpu" and value.dtype == torch.float64:
        pytest.skip("mps has no float64")
    arguments = {n: t.to(device) for n, t in operands(operator).items()}
    arguments[name] = value if value.is_meta else value.to(device)
    with pytest.raises(ValueError, match=f"{operator}: {name}: expected .*{expected}") as caught:
        getattr(of, operator)(*arguments.values())
    assert f"shape {tuple(value.shape)}, {value.dtype}, on {arguments[name].device}" in str(caught.value)


def test_x_alone_on_another_device():
    """Is what the others are compared with."""
    for call in (tfl.lora_linear, ops.lora_linear):
        with pytest.raises(ValueError, match=r"lora_linear: weight: expected x's device meta; got shape .* on cpu"):
            call(*operands(x=torch.randn(2, 4, device="meta")).values())


RAISES = pytest.mark.parametrize(
    ("context", "error"), [(contextlib.nullcontext, ValueError), (torch.inference_mode, (ValueError, RuntimeError))]
)


@RAISES
@pytest.mark.parametrize(
    ("operator", "name"), [(o, name) for o in BAD_TENSORS for name in operands(o) if name != "scaling"]
)
@pytest.mark.parametrize("rows", [2, 20])
def test_an_operand_left_on_the_cpu(mps, operator, name, rows, context, error):
    """In inference mode the operator's kernel alone checks: in C++, whose error is a RuntimeError."""
    longer = {n: torch.randn(rows, t.shape[1]) for n, t in operands(operator).items() if n in ("x", "y")}
    arguments = {n: t if n == name else t.to(mps) for n, t in operands(operator, **longer).items()}
    named = name if operator == "lora_linear" else f"(y|{name})"
    if (operator, name) == ("lora_linear", "x"):  # what is compared with it is named first
        named = "weight" if error is ValueError else "(x|weight)"
    for of in (tfl, ops):
        with context(), pytest.raises(error, match=f"{operator}: {named}: expected .*(mps|device)"):
            getattr(of, operator)(*arguments.values())


@OPERATORS
@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_outside_its_range(operator, p):
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\)"):
        getattr(tfl, operator)(*operands(operator).values(), dropout_p=p, training=True)
    with pytest.raises(ValueError, match=r"dropout_p: expected probabilities in \[0, 1\)"):
        getattr(ops, f"{operator}_forward")(*operands(operator).values(), torch.tensor(1), [p], [], False)


@pytest.mark.parametrize(
    ("operator", "name", "value"),
    [
        ("lora_linear", "x", [[1.0]]),
        ("lora_linear", "weight", None),
        ("lora_linear", "bias", 0.0),
        ("lora_delta", "y", None),
        ("lora_delta", "x", [[1.0]]),
        *(
            (operator, name, value)
            for operator in BAD_TENSORS
            for name, value in (("lora_A", "A"), ("lora_B", 3), ("scaling", "2"), ("scaling", None))
        ),
    ],
)
def test_wrong_types(operator, name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a"):
        getattr(tfl, operator)(**operands(operator, **{name: value}))


@OPERATORS
def test_dropout_of_a_wrong_type(operator):
    with pytest.raises(TypeError, match="dropout_p: expected a number"):
        getattr(tfl, operator)(**operands(operator), dropout_p="0.1")


@OPERATORS
def test_the_operator_wants_a_seed_for_dropout_and_ranks_that_add_up(operator):
    public, forward = getattr(ops, operator), getattr(ops, f"{operator}_forward")
    with pytest.raises(ValueError, match="seed"):
        public(*operands(operator).values(), 0.5)
    for seed in (torch.tensor(1, dtype=torch.int32), torch.tensor([1]), torch.tensor(1, device="meta")):
        with pytest.raises(ValueError, match="seed: expected a 0-dim int64 tensor on the CPU"):
            public(*operands(operator).values(), 0.5, seed)
    for ranks in ([1, 2], [2]):
        with pytest.raises(ValueError, match="ranks"):
            forward(*operands(operator).values(), torch.tensor(1), [0.5, 0.5], ranks, False)


def test_mps_without_kernels_is_an_error_not_a_slow_path():
    from torch._subclasses import FakeTensorMode

    from torch_fused_lora.ops.lora_linear.operator import _operator

    with FakeTensorMode():
        on_mps = [torch.empty(t.shape, device="mps") for t in operands().values()]
        with pytest.raises(NotImplementedError, match="device 'mps' needs this package's Metal extension"):
            _operator._portable_forward(*on_mps)


def arguments_of_backward(operator="lora_linear", device="cpu"):
    tensors = operands(operator) | {"grad": torch.randn(2, 3), "h": torch.randn(2, 2)}
    tensors.pop("bias" if operator == "lora_linear" else "y")
    on_device = {name: value.to(device) for name, value in tensors.items()}
    needs = [True] * (6 if operator == "lora_linear" else 4)
    return on_device | {"seed": None, "dropout_p": [], "ranks": [], "needs": needs}


OF_BOTH_BACKWARD = {
    "grad columns": ("grad", torch.randn(2, 4), r"shape \(\.\.\., 3\)"),
    "grad 0-dim": ("grad", torch.tensor(1.0), r"shape \(\.\.\., 3\)"),
    "grad integer": ("grad", torch.ones(2, 3, dtype=torch.int64), "float16, bfloat16"),
    "x missing": ("x", None, r"shape \(2, 4\), .*; got None"),
    "x rows": ("x", torch.randn(3, 4), r"shape \(2, 4\)"),
    "x in another shape": ("x", torch.randn(2, 1, 4), r"shape \(2, 4\)"),
    "x integer": ("x", torch.ones(2, 4, dtype=torch.int64), "grad's dtype torch.float32"),
    "lora_A 1-D": ("lora_A", torch.randn(4), r"shape \(r, "),
    "lora_A rank 0": ("lora_A", torch.randn(0, 4), r"shape \(r, "),
    "lora_A integer": ("lora_A", torch.ones(2, 4, dtype=torch.int64), "torch.float32"),
    "lora_B transposed": ("lora_B", torch.randn(2, 3), r"shape \("),
    "lora_B dtype": ("lora_B", torch.randn(3, 2).half(), "lora_A's dtype torch.float32"),
    "scaling 1-D": ("scaling", torch.ones(1), "a 0-dim"),
    "scaling integer": ("scaling", torch.tensor(1), "a 0-dim"),
    "h missing": ("h", None, r"shape \(2, 2\), .*; got None"),
    "h rows": ("h", torch.randn(3, 2), r"shape \(2, 2\)"),
    "h dtype": ("h", torch.randn(2, 2).half(), "lora_A's dtype torch.float32"),
    "seed integer": ("seed", torch.tensor(1, dtype=torch.int32), "a 0-dim int64 tensor on the CPU"),
}
BAD_BACKWARD = {
    "lora_linear": OF_BOTH_BACKWARD
    | {
        "x dtype": ("x", torch.randn(2, 4).half(), "grad's dtype torch.float32"),
        "weight missing": ("weight", None, r"shape \(3, 4\), .*; got None"),
        "weight transposed": ("weight", torch.randn(4, 3), r"shape \(3, 4\)"),
        "weight dtype": ("weight", torch.randn(3, 4).bfloat16(), "grad's dtype torch.float32"),
        "lora_A half over float": ("lora_A", torch.randn(2, 4).half(), "torch.float32"),
        "needs": ("needs", [True], "6 flags"),
    },
    "lora_delta": OF_BOTH_BACKWARD | {"needs": ("needs", [True] * 5, "4 flags")},
}


@RAISES
@pytest.mark.parametrize(("operator", "case"), each(BAD_BACKWARD))
def test_bad_arguments_of_the_backward_operator(device, operator, case, context, error):
    name, value, expected = BAD_BACKWARD[operator][case]
    on_device = isinstance(value, torch.Tensor) and name != "seed"
    changed = {name: value.to(device) if on_device else value}
    with context(), pytest.raises(error, match=f"{operator}_backward: {name}: expected .*{expected}"):
        getattr(ops, f"{operator}_backward")(**arguments_of_backward(operator, device) | changed)


@RAISES
@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (o, name)
        for o in BAD_BACKWARD
        for name, t in arguments_of_backward(o).items()
        if isinstance(t, torch.Tensor) and t.dim()
    ],
)
def test_an_operand_of_backward_left_on_the_cpu(mps, operator, name, context, error):
    arguments = arguments_of_backward(operator, mps)
    named = "lora_A" if name == "grad" and error is ValueError else name  # whichever differs from grad
    with context(), pytest.raises(error, match=f"{operator}_backward: {named}: expected .*(mps|device)"):
        getattr(ops, f"{operator}_backward")(**arguments | {name: arguments[name].cpu()})


@OPERATORS
def test_the_gradient_of_scaling_alone_needs_h(device, operator):
    arguments = arguments_of_backward(operator, device)
    needs = [False] * (len(arguments["needs"]) - 1) + [True]
    with pytest.raises(ValueError, match=rf"{operator}_backward: h: expected shape \(2, 2\)"):
        getattr(ops, f"{operator}_backward")(**arguments | {"h": None, "needs": needs})


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "mkldnn"])
@pytest.mark.parametrize(("operator", "name"), [(o, name) for o in BAD_TENSORS for name in tensors_of(o)])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_operands(operator, name, layout):
    """As tensors that ask for no gradient, too: these never see a dispatcher."""
    tensor = operands(operator)[name]
    sparse = tensor.to_mkldnn() if layout == "mkldnn" else tensor.to_sparse(layout=getattr(torch, layout))
    for of in (tfl, ops):
        with pytest.raises(ValueError, match=f"{operator}: {name}: expected a dense tensor; got .*{layout}"):
            getattr(of, operator)(**operands(operator, **{name: sparse}))
    name = "grad" if name == "y" else name
    with pytest.raises(ValueError, match=f"{operator}_backward: {name}: expected a dense tensor; got .*{layout}"):
        getattr(ops, f"{operator}_backward")(**arguments_of_backward(operator) | {name: sparse})


def test_sparse_rows():
    sparse = torch.randn(2, 4).to_sparse()
    for call in (tfl.softmax, torch.ops.torch_fused_lora.softmax):
        with pytest.raises(ValueError, match=r"softmax: x: expected a dense tensor; got torch\.sparse_coo"):
            call(sparse)
    for call in (tfl.rms_norm, torch.ops.torch_fused_lora.rms_norm):
        with pytest.raises(ValueError, match=r"rms_norm: x: expected a dense tensor; got .*torch\.sparse_coo"):
            call(sparse, None)
        with pytest.raises(ValueError, match=r"rms_norm: weight: expected a dense tensor; got .*torch\.sparse_coo"):
            call(torch.randn(2, 4), torch.ones(4).to_sparse())


@pytest.mark.parametrize("dim", ["a", 1.0, None, True])
def test_a_dimension_of_a_wrong_type(dim):
    with pytest.raises(TypeError, match=f"dim: expected an int, got {dim!r}"):
        tfl.softmax(torch.randn(2, 4), dim)


def test_operands_of_backward_that_are_not_needed_may_be_anything(device):
    arguments = arguments_of_backward(device=device) | {"needs": [False, False, True, False, False, False]}
    expected = arguments["grad"].sum(0)
    assert torch.equal(ops.lora_linear_backward(**arguments | {"x": None, "weight": None, "h": None})[0], expected)
    arguments = arguments_of_backward("lora_delta", device)
    expected = ops.lora_delta_backward(**arguments)[0]
    found = ops.lora_delta_backward(**arguments | {"x": None, "h": None, "needs": [True, False, False, False]})
    torch.testing.assert_close(found, [expected])


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        ("lora_linear", "x too narrow"),
        ("lora_linear", "lora_B transposed"),
        ("lora_linear", "bias broadcasts"),
        ("lora_delta", "y broadcasts"),
        ("lora_delta", "y half"),
        ("lora_delta", "lora_A columns"),
        ("lora_delta", "lora_B transposed"),
    ],
)
def test_bad_tensors_raise_while_tracing_and_under_transforms(operator, case):
    name, value, expected = BAD_TENSORS[operator][case]
    arguments, call = operands(operator, **{name: value}), getattr(tfl, operator)
    torch.compiler.reset()
    with pytest.raises(Exception, match=expected):
        torch.compile(call, backend="aot_eager", fullgraph=True)(*arguments.values())
    lora_A = arguments.pop("lora_A")
    with pytest.raises(ValueError, match=expected):
        torch.func.grad(lambda lora_A: call(**arguments, lora_A=lora_A).sum())(lora_A)
