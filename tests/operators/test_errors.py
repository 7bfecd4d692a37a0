"""Bad input raises at once, naming the argument, what it is and what was expected."""

from __future__ import annotations

import contextlib

import pytest
import torch

import torch_fused_lora as tfl

op = torch.ops.torch_fused_lora.lora_linear


def operands(**changes):
    good = {
        "x": torch.randn(2, 4),
        "weight": torch.randn(3, 4),
        "bias": torch.randn(3),
        "lora_A": torch.randn(2, 4),
        "lora_B": torch.randn(3, 2),
        "scaling": torch.tensor(1.0),
    }
    assert not changes.keys() - good.keys()
    return good | changes


BAD_TENSORS = {
    "x too narrow": ("x", torch.randn(2, 3), r"shape \(\.\.\., 4\)"),
    "x 0-dim": ("x", torch.tensor(1.0), r"shape \(\.\.\., 4\)"),
    "x integer": ("x", torch.ones(2, 4, dtype=torch.int64), "float16, bfloat16, float32 or float64"),
    "x complex": ("x", torch.randn(2, 4, dtype=torch.complex64), "float16, bfloat16, float32 or float64"),
    "x on another device": ("x", torch.randn(2, 4, device="meta"), "device"),
    "weight 1-D": ("weight", torch.randn(4), r"shape \(N, K\)"),
    "weight dtype": ("weight", torch.randn(3, 4).half(), "x's dtype torch.float32"),
    "weight device": ("weight", torch.randn(3, 4, device="meta"), "device"),
    "bias broadcasts": ("bias", torch.randn(1), r"shape \(3,\)"),
    "bias dtype": ("bias", torch.randn(3).double(), "x's dtype torch.float32"),
    "lora_A columns": ("lora_A", torch.randn(2, 3), r"shape \(r, 4\)"),
    "lora_A rank 0": ("lora_A", torch.randn(0, 4), "r >= 1"),
    "lora_A half over float": ("lora_A", torch.randn(2, 4).half(), "x's dtype torch.float32"),
    "lora_A double": ("lora_A", torch.randn(2, 4).double(), "x's dtype torch.float32"),
    "lora_A device": ("lora_A", torch.randn(2, 4, device="meta"), "device"),
    "lora_B transposed": ("lora_B", torch.randn(2, 3), r"shape \(3, 2\)"),
    "lora_B dtype": ("lora_B", torch.randn(3, 2).bfloat16(), "lora_A's dtype"),
    "scaling 1-D": ("scaling", torch.ones(1), "0-dim"),
    "scaling integer": ("scaling", torch.tensor(1), "floating"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
@pytest.mark.parametrize("call", [tfl.lora_linear, op], ids=["function", "operator"])
def test_bad_tensors(device, call, case):
    name, value, expected = BAD_TENSORS[case]
    if device.type != "cpu" and value.dtype == torch.float64:
        pytest.skip("mps has no float64")
    arguments = {n: t.to(device) for n, t in operands().items()}
    arguments[name] = value if value.is_meta else value.to(device)
    with pytest.raises(ValueError, match=expected) as caught:
        call(*arguments.values())
    assert f"{tuple(value.shape)}" in str(caught.value) or "device" in expected


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B"])
@pytest.mark.parametrize("rows", [2, 20])
def test_an_operand_left_on_the_cpu(mps, name, rows):
    arguments = {n: t if n == name else t.to(mps) for n, t in operands(x=torch.randn(rows, 4)).items()}
    for call in (tfl.lora_linear, op):
        with pytest.raises(ValueError, match=f"{name if name != 'x' else 'weight'}: expected .* device"):
            call(*arguments.values())


def test_mixed_devices_name_the_argument():
    with pytest.raises(ValueError, match=r"lora_B: expected x's device cpu; got shape .* on meta"):
        tfl.lora_linear(*operands(lora_B=torch.randn(3, 2, device="meta")).values())


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_outside_its_range(p):
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\)"):
        tfl.lora_linear(*operands().values(), dropout_p=p, training=True)
    if p == p and p > 0:
        with pytest.raises(ValueError, match=r"dropout_p: expected probabilities in \[0, 1\)"):
            op(*operands().values(), p, torch.tensor(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", [[1.0]]),
        ("weight", None),
        ("bias", 0.0),
        ("lora_A", "A"),
        ("lora_B", 3),
        ("scaling", "2"),
        ("scaling", None),
    ],
)
def test_wrong_types(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a"):
        tfl.lora_linear(**operands(**{name: value}))


def test_dropout_of_a_wrong_type():
    with pytest.raises(TypeError, match="dropout_p: expected a number"):
        tfl.lora_linear(**operands(), dropout_p="0.1")


def test_the_operator_wants_a_seed_for_dropout():
    with pytest.raises(ValueError, match="seed"):
        op(*operands().values(), 0.5)
    for seed in (torch.tensor(1, dtype=torch.int32), torch.tensor([1]), torch.tensor(1, device="meta")):
        with pytest.raises(ValueError, match="seed: expected a 0-dim int64 tensor on the CPU"):
            op(*operands().values(), 0.5, seed)


def test_mps_without_kernels_is_an_error_not_a_slow_path():
    from torch._subclasses import FakeTensorMode

    from torch_fused_lora.ops.lora_linear.operator import _operator

    with FakeTensorMode():
        on_mps = [torch.empty(t.shape, device="mps") for t in operands().values()]
        with pytest.raises(NotImplementedError, match="device 'mps' needs this package's Metal extension"):
            _operator._portable_forward(*on_mps)


def arguments_of_backward(device="cpu"):
    tensors = operands() | {"grad": torch.randn(2, 3), "h": torch.randn(2, 2)}
    del tensors["bias"]
    on_device = {name: value.to(device) for name, value in tensors.items()}
    return on_device | {"seed": None, "dropout_p": [], "ranks": [], "needs": [True] * 6}


BAD_BACKWARD = {
    "grad columns": ("grad", torch.randn(2, 4), r"shape \(\.\.\., 3\)"),
    "grad 0-dim": ("grad", torch.tensor(1.0), r"shape \(\.\.\., 3\)"),
    "grad integer": ("grad", torch.ones(2, 3, dtype=torch.int64), "float16, bfloat16"),
    "x missing": ("x", None, r"shape \(2, 4\), .*; got None"),
    "x rows": ("x", torch.randn(3, 4), r"shape \(2, 4\)"),
    "x in another shape": ("x", torch.randn(2, 1, 4), r"shape \(2, 4\)"),
    "x dtype": ("x", torch.randn(2, 4).half(), "grad's dtype torch.float32"),
    "weight missing": ("weight", None, r"shape \(3, 4\), .*; got None"),
    "weight transposed": ("weight", torch.randn(4, 3), r"shape \(3, 4\)"),
    "weight dtype": ("weight", torch.randn(3, 4).bfloat16(), "grad's dtype torch.float32"),
    "lora_A 1-D": ("lora_A", torch.randn(4), r"shape \(r, "),
    "lora_A rank 0": ("lora_A", torch.randn(0, 4), r"shape \(r, "),
    "lora_A half over float": ("lora_A", torch.randn(2, 4).half(), "torch.float32"),
    "lora_B transposed": ("lora_B", torch.randn(2, 3), r"shape \("),
    "lora_B dtype": ("lora_B", torch.randn(3, 2).half(), "lora_A's dtype torch.float32"),
    "scaling 1-D": ("scaling", torch.ones(1), "a 0-dim"),
    "scaling integer": ("scaling", torch.tensor(1), "a 0-dim"),
    "h missing": ("h", None, r"shape \(2, 2\), .*; got None"),
    "h rows": ("h", torch.randn(3, 2), r"shape \(2, 2\)"),
    "h dtype": ("h", torch.randn(2, 2).half(), "lora_A's dtype torch.float32"),
    "seed integer": ("seed", torch.tensor(1, dtype=torch.int32), "a 0-dim int64 tensor on the CPU"),
    "needs": ("needs", [True], "6 flags"),
}
backward = torch.ops.torch_fused_lora.lora_linear_backward
RAISES = pytest.mark.parametrize(
    ("context", "error"), [(contextlib.nullcontext, ValueError), (torch.inference_mode, (ValueError, RuntimeError))]
)


@RAISES
@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_bad_arguments_of_the_backward_operator(device, case, context, error):
    """In inference mode it is the device's kernel alone that checks: on mps in C++, whose error is a RuntimeError."""
    name, value, expected = BAD_BACKWARD[case]
    on_device = isinstance(value, torch.Tensor) and name != "seed"
    with context(), pytest.raises(error, match=f"lora_linear_backward: {name}: expected .*{expected}"):
        backward(**arguments_of_backward(device) | {name: value.to(device) if on_device else value})


@RAISES
@pytest.mark.parametrize("name", ["grad", "x", "weight", "lora_A", "lora_B", "h"])
def test_an_operand_of_backward_left_on_the_cpu(mps, name, context, error):
    arguments = arguments_of_backward(mps)
    named = "lora_A" if name == "grad" and error is ValueError else name  # whichever differs from grad
    with context(), pytest.raises(error, match=f"lora_linear_backward: {named}: expected .*(mps|device)"):
        backward(**arguments | {name: arguments[name].cpu()})


def test_the_gradient_of_scaling_alone_needs_h(device):
    needs = [False, False, False, False, False, True]
    with pytest.raises(ValueError, match=r"lora_linear_backward: h: expected shape \(2, 2\)"):
        backward(**arguments_of_backward(device) | {"h": None, "needs": needs})


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "mkldnn"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_sparse_operands(name, layout):
    """As tensors that ask for no gradient, too: these never see a dispatcher."""
    tensor = operands()[name]
    sparse = tensor.to_mkldnn() if layout == "mkldnn" else tensor.to_sparse(layout=getattr(torch, layout))
    for call in (tfl.lora_linear, op):
        with pytest.raises(ValueError, match=f"lora_linear: {name}: expected a dense tensor; got .*{layout}"):
            call(**operands(**{name: sparse}))
    with pytest.raises(ValueError, match=f"lora_linear_backward: {name}: expected a dense tensor; got .*{layout}"):
        backward(**arguments_of_backward() | {name: sparse})


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
    arguments = arguments_of_backward(device) | {"needs": [False, False, True, False, False, False]}
    expected = arguments["grad"].sum(0)
    assert torch.equal(backward(**arguments | {"x": None, "weight": None, "h": None})[0], expected)


def test_ranks_must_add_up():
    forward = torch.ops.torch_fused_lora.lora_linear_forward
    with pytest.raises(ValueError, match="ranks"):
        forward(*operands().values(), torch.tensor(1), [0.5, 0.5], [1, 2], False)
    with pytest.raises(ValueError, match="ranks"):
        forward(*operands().values(), torch.tensor(1), [0.5, 0.5], [2], False)


@pytest.mark.parametrize("case", ["x too narrow", "lora_B transposed", "bias broadcasts"])
def test_bad_tensors_raise_while_tracing_and_under_transforms(case):
    name, value, expected = BAD_TENSORS[case]
    arguments = list(operands(**{name: value}).values())
    with pytest.raises(Exception, match=expected):
        torch.compile(tfl.lora_linear, backend="aot_eager", fullgraph=True)(*arguments)
    with pytest.raises(ValueError, match=expected):
        torch.func.grad(lambda A: tfl.lora_linear(*arguments[:3], A, *arguments[4:]).sum())(arguments[3])
