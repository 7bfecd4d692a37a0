"""lora_delta: its numbers, what it leaves alone and what it keeps, its derivatives, who sees it, and its errors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import torch_fused_lora as tfl
from tests.budget import examples
from tests.operators.test_compile import BACKENDS, OPCHECKS
from tests.operators.test_errors import RAISES, arguments_of_backward
from tests.operators.test_lora_linear import DTYPES as ADAPTERS
from tests.operators.test_lora_linear import LAYOUTS, AllocationsOf, laid_out, seeded_masks
from tests.reference import HALF, UNIT, Delta
from torch_fused_lora.ops.lora_delta.operator import _LoRADelta, lora_delta_stacked

ops = torch.ops.torch_fused_lora
NAMES = ("y", "x", "lora_A", "lora_B", "scaling")
# Of y, x and the adapters: y as x, or float32 over a half x.
WIDER = [(torch.float32, dtype, adapter_dtype) for dtype in HALF for adapter_dtype in (dtype, torch.float32)]
DTYPES = [*((dtype, dtype, adapter_dtype) for dtype, adapter_dtype in ADAPTERS), *WIDER]


def operands(dtypes=(torch.float32,) * 3, lead=(6,), sizes=(8, 5, 2), device="cpu", needs=True):
    """y, x, lora_A and lora_B for sizes K, N and r."""
    (K, N, r), (y_dtype, x_dtype, adapter_dtype) = sizes, dtypes
    shapes = ((*lead, N), y_dtype), ((*lead, K), x_dtype), ((r, K), adapter_dtype), ((N, r), adapter_dtype)
    return [torch.randn(shape).to(device, dtype).requires_grad_(needs) for shape, dtype in shapes]


def stock(y, x, lora_A, lora_B, scaling=1.0, dropout_p=0.0, training=False):
    """As PEFT adds an adapter's term."""
    h = F.linear(F.dropout(x.to(lora_A.dtype), dropout_p, training), lora_A)
    return (y + F.linear(h, lora_B) * scaling).to(y.dtype)


def skip_float64_on_mps(device, dtypes):
    if device.type == "mps" and torch.float64 in dtypes:
        pytest.skip("mps has no float64")


def check_call(exact: Delta, leaves: dict[str, torch.Tensor], found: torch.Tensor, grad: torch.Tensor) -> None:
    """A call's output and its gradients in ``leaves``, by their names, against float64."""
    check_results(exact, leaves, found, grad, torch.autograd.grad(found, list(leaves.values()), grad))


def check_results(exact, leaves, found, grad, gradients) -> None:
    exact.output().check(found.detach())
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert (gradient.dtype, gradient.device) == (leaf.dtype, leaf.device)
        if name == "y":
            assert torch.equal(gradient, grad)
        else:
            exact.gradients(grad)[name].check(gradient, name)


# ------------------------------------------------------------------------------------------------------------- numbers


def test_output_and_gradients(device):
    on_cpu = device.type == "cpu"

    @settings(max_examples=examples(150 if on_cpu else 40))
    @given(
        lead=st.sampled_from([(), (1,), (7,), (33,), (0,), (2, 3), (2, 0, 3), (2, 1, 2, 5)]),
        sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 3, 8, 17])),
        dtypes=st.sampled_from(DTYPES if on_cpu else DTYPES[1:]),
        layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
        scaling=st.sampled_from([0.0, 1.0, -0.37, 2.0]),
        scaling_on=st.sampled_from([None, "cpu", device]),
        dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
        needs=st.lists(st.booleans(), min_size=5, max_size=5),
    )
    def check(lead, sizes, dtypes, layouts, scaling, scaling_on, dropout_p, needs):
        (K, N, r), (y_dtype, x_dtype, adapter_dtype) = sizes, dtypes
        torch.manual_seed(K * 100 + N)
        tensors = {
            "y": laid_out((*lead, N), y_dtype, layouts[0], device=device),
            "x": laid_out((*lead, K), x_dtype, layouts[1], device=device),
            "lora_A": laid_out((r, K), adapter_dtype, layouts[2], K**-0.5, device),
            "lora_B": laid_out((N, r), adapter_dtype, layouts[3], device=device),
        }
        wide = torch.promote_types(x_dtype, torch.float32)
        exact_scaling = float(torch.tensor(scaling, dtype=wide))  # float32 holds what the operator sees of a float
        exact = Delta(*tensors.values(), exact_scaling, seeded_masks(5, tensors["x"], [r], [dropout_p]))
        if scaling_on is not None:
            tensors["scaling"] = torch.tensor(scaling, dtype=wide, device=scaling_on)
        leaves = {name: t for (name, t), need in zip(tensors.items(), needs, strict=False) if need}
        for leaf in leaves.values():
            leaf.requires_grad_()

        before = tensors["y"].detach().clone()
        found = tfl.lora_delta(**{"scaling": scaling} | tensors, dropout_p=dropout_p, training=True)
        assert (found.dtype, found.device.type, found.requires_grad) == (y_dtype, device.type, bool(leaves))
        assert found.is_contiguous()
        assert not found._is_view()
        assert found.numel() == 0 or found.data_ptr() != tensors["y"].data_ptr()
        if leaves:
            check_call(exact, leaves, found, laid_out(tuple(found.shape), y_dtype, layouts[4], device=device))
        else:
            exact.output().check(found)
        assert torch.equal(tensors["y"].detach(), before)

    check()


@pytest.mark.parametrize("dtypes", DTYPES[1:])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_many_row_blocks(device, dtypes, dropout_p, small_blocks):
    """Nothing is lost or doubled at a seam."""
    rows, *sizes = small_blocks
    tensors = operands(dtypes, (rows,), sizes, device)
    exact = Delta(*tensors, 0.5, seeded_masks(3, tensors[1], sizes[2:], [dropout_p]))
    found = tfl.lora_delta(*tensors, 0.5, dropout_p, training=True)
    check_call(exact, dict(zip(NAMES, tensors, strict=False)), found, torch.randn(found.shape).to(found))


@pytest.mark.parametrize("dropout_p", [(), (0.3, 0.0, 0.6)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_stacked_adapters(device, dtypes, dropout_p):
    """Several adapters in one call, each with its rank and its own dropout, which on mps is a launch each."""
    skip_float64_on_mps(device, dtypes)
    ranks = [2, 1, 4]
    tensors = operands(dtypes, (6,), (24, 10, 7), device)
    masks = seeded_masks(1, tensors[1], ranks, list(dropout_p)) if dropout_p else [(slice(None), None)]
    exact = Delta(*tensors, 1.0, masks, 1 if device.type == "cpu" else len(masks))
    found = lora_delta_stacked(*tensors, 1.0, dropout_p, ranks)
    check_call(exact, dict(zip(NAMES, tensors, strict=False)), found, torch.randn(6, 10).to(found))


@pytest.mark.parametrize(
    ("lead", "sizes"), [((0,), (8, 5, 2)), ((2, 0, 3), (8, 5, 2)), ((3,), (0, 5, 2)), ((3,), (8, 0, 2))]
)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(device, dtypes, lead, sizes, dropout_p):
    """Without rows, columns of x or columns of y; with every gradient."""
    skip_float64_on_mps(device, dtypes)
    tensors = operands(dtypes, lead, sizes, device)
    scaling = torch.tensor(0.5, dtype=torch.promote_types(dtypes[1], torch.float32), requires_grad=True)
    found = tfl.lora_delta(*tensors, scaling, dropout_p, training=True)
    assert torch.equal(found, tensors[0])
    gradients = torch.autograd.grad(found, (*tensors, scaling), torch.ones_like(found))
    for leaf, gradient in zip((*tensors, scaling), gradients, strict=True):
        assert torch.equal(gradient, torch.full_like(leaf, leaf is tensors[0]))


@pytest.mark.parametrize("dtypes", [(half,) * 2 + (torch.float32,) for half in HALF])
@pytest.mark.parametrize("rows", [3, 700])
def test_the_sum_is_rounded_once(device, dtypes, rows):
    """Element for element but for ties of the float32 sums, which are few; to round the term first would show."""
    y, x, A, B = operands(dtypes, (rows,), (64, 48, 8), needs=False)
    term = F.linear(F.linear(x.float(), A), B) * 0.3
    found = tfl.lora_delta(*(t.to(device) for t in (y, x, A, B)), 0.3).cpu()
    assert (found != (y + term).to(y.dtype)).float().mean() < 0.01
    assert (found != y + term.to(y.dtype)).float().mean() > 0.05


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_scaling_that_is_no_number(device, dtypes, as_tensor, value):
    """It multiplies the low-rank term. torch's addmm takes an alpha of NaN for 0, at some sizes."""
    skip_float64_on_mps(device, dtypes)
    wide = torch.promote_types(dtypes[1], torch.float32)
    scaling = torch.tensor(value, dtype=wide, device=device) if as_tensor else value
    for rows, K, N in ((1, 8, 6), (200, 8, 300)):
        tensors = [t.detach().abs().requires_grad_() for t in operands(dtypes, (rows,), (K, N, 4), device)]
        found = tfl.lora_delta(*tensors, scaling)
        assert found.isnan().all() if math.isnan(value) else (found == math.inf).all()
        _, *others = torch.autograd.grad(found.sum(), tensors)
        assert not any(gradient.isfinite().any() for gradient in others)


def test_scaling_changes_live(device):
    y, *rest = operands(device=device, needs=False)
    term = tfl.lora_delta(y, *rest) - y
    for scaling in (2.0, 2, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64), torch.tensor(2.0).bfloat16()):
        torch.testing.assert_close(tfl.lora_delta(y, *rest, scaling), y + 2 * term)


def test_float64_scaling_is_not_rounded_to_float32():
    tensors = operands((torch.float64,) * 3, needs=False)
    Delta(*tensors, 1 / 3).output().check(tfl.lora_delta(*tensors, 1 / 3))


# ------------------------------------------------------------------------------ what it leaves alone, and what it keeps


def test_in_place_use_of_y_and_of_the_result(device):
    """Neither is saved, and the result is no view."""
    leaves = operands(lead=(2, 3), device=device)
    expected = torch.autograd.grad(tfl.lora_delta(*leaves).relu().sum(), leaves)
    y = leaves[0] * 1.0
    found = tfl.lora_delta(y, *leaves[1:])
    y.zero_(), found.relu_()
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaves), expected)


def test_y_may_be_x(device):
    _, x, A, B = operands(sizes=(8, 8, 2), device=device)
    found = tfl.lora_delta(x, x, A, B, 0.5)
    grad = torch.randn_like(found)
    exact = Delta(x, x, A, B, 0.5)
    exact.output().check(found.detach())
    through_x = exact.gradients(grad)["x"]
    through_x.value, through_x.magnitude = through_x.value + grad.cpu(), through_x.magnitude + grad.cpu().abs()
    through_x.check(torch.autograd.grad(found, x, grad)[0])


def kept_for_backward(call):
    """What a call saves, a tensor an address."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        call()
    return saved


@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float32])
def test_half_of_what_stock_keeps_for_backward(device, y_dtype):
    """x itself, the adapters and h: no y, no mask, no dropped or converted copy."""
    dtypes = y_dtype, torch.bfloat16, torch.float32
    y, x, A, B = operands(dtypes, (64,), (96, 48, 4), device)
    ours, others = (
        kept_for_backward(lambda function=function: function(y, x, A, B, 2.0, 0.5, training=True))
        for function in (tfl.lora_delta, stock)
    )
    assert y.data_ptr() not in ours
    own = {t.data_ptr() for t in (x, A, B)}
    extra = [tuple(t.shape) for address, t in ours.items() if address not in own]
    assert sorted(extra) == [()] * (device.type == "mps") + [(64, 4)]  # scaling (for a Metal kernel), h
    assert sum(t.nbytes for t in ours.values()) <= sum(t.nbytes for t in others.values()) / 2


def test_a_frozen_adapter_input_side_keeps_no_x(device):
    y, x, A, B = operands(device=device)
    A.requires_grad_(False)
    assert x.data_ptr() not in kept_for_backward(lambda: tfl.lora_delta(y, x, A, B))


@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float32])
def test_no_full_width_temporary(y_dtype):
    """Beyond the results nothing of M x K or M x N is allocated: mixed dtypes and dropout go by blocks of rows."""
    rows, (K, N, r) = 140_000, (64, 48, 4)  # more than four blocks
    y, x, A, B = operands((y_dtype, torch.bfloat16, torch.float32), (rows,), (K, N, r), needs=False)
    dropout = torch.tensor(3), (0.5,), ()
    with AllocationsOf(rows * min(K, N)) as forward:
        _, h = _LoRADelta.forward(y, x, A, B, 1.0, *dropout, True)
    with AllocationsOf(rows * min(K, N)) as backward:
        _LoRADelta.backward(y, x, A, B, 1.0, h, *dropout, (True, True, True, False))
    assert len(forward.found) == 1, forward.found  # the result
    assert len(backward.found) == 1, backward.found  # dx


@pytest.mark.parametrize("mode", ["alone", "profiled"])
def test_operands_made_in_inference_mode_train(device, mode):
    normal = operands(device=device)
    with torch.inference_mode():
        y, x = (t.clone() for t in normal[:2])

    def gradients(y, x):
        torch.manual_seed(2)
        with torch.profiler.profile() if mode == "profiled" else contextlib.nullcontext():
            found = tfl.lora_delta(y, x, *normal[2:], 0.5, 0.5, training=True)
            first = torch.autograd.grad(found.sin().sum(), normal[2:], create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), normal[2:])

    torch.testing.assert_close(gradients(y, x), gradients(*(t.detach() for t in normal[:2])))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(device, use_reentrant):
    leaves = operands(device=device)

    def gradients(call):
        torch.manual_seed(4)
        for leaf in leaves:
            leaf.grad = None
        call().sin().sum().backward()
        return [leaf.grad for leaf in leaves]

    def run(*tensors):
        return tfl.lora_delta(*tensors, 0.5, 0.5, training=True)

    expected = gradients(lambda: run(*leaves))
    found = gradients(lambda: checkpoint(run, *leaves, use_reentrant=use_reentrant))
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("dtypes", [dtypes for dtypes in DTYPES if dtypes[1] in HALF])
def test_half_dtypes_to_second_order(dtypes):
    """A double backward equals the one through the same values in float64, but for a few roundings."""
    tensors = operands(dtypes, (4,), (3, 5, 2), needs=False)

    def second_order(function, wide):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in tensors]
        loss = function(*leaves, 0.5).double().square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.double().square().sum() for g in first), leaves)
        assert wide or [t.dtype for t in (*first, *second)] == [t.dtype for t in tensors] * 2
        return [t.detach().double() for t in (*first, *second)]

    for a, e in zip(second_order(tfl.lora_delta, False), second_order(stock, True), strict=True):
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.05 * float(e.abs().max()))


def test_the_result_is_contiguous_under_transforms():
    y, x, A, B = operands(needs=False)
    transposed = y.mT.contiguous().mT
    found, tangent = torch.func.jvp(lambda y: tfl.lora_delta(y, x, A, B), (transposed,), (transposed,))
    assert found.is_contiguous()
    assert torch.equal(tangent, transposed)


def test_only_what_is_asked_for_is_computed(device):
    """The backward operator returns the gradients asked for and no others; h is not needed without dB."""
    grad, x, A, B = operands(lead=(4,), device=device, needs=False)
    s = torch.tensor(0.5)
    for needs, h in (
        ((True, True, False, False), None),
        ((False, False, True, False), torch.randn(4, 2).to(A)),
        ((False,) * 4, None),
    ):
        found = ops.lora_delta_backward(grad, x if needs[1] else None, A, B, s, h, None, [], [], needs)
        assert [g.shape for g in found] == [t.shape for t, need in zip((x, A, B, s), needs, strict=True) if need]


# ------------------------------------------------------------------------------------------------ who sees a call of it


@pytest.mark.parametrize(
    ("dtypes", "lead", "needs"),
    [
        ((torch.float64,) * 3, (), True),
        ((torch.float32,) * 3, (2, 3), False),
        ((torch.float32,) * 3, (0,), True),
        ((torch.bfloat16, torch.bfloat16, torch.float32), (2, 3), True),
        ((torch.float32, torch.bfloat16, torch.float32), (4,), True),
        ((torch.float32, torch.float16, torch.float16), (4,), False),
    ],
)
def test_opcheck(device, dtypes, lead, needs):
    skip_float64_on_mps(device, dtypes)
    opcheck = functools.partial(torch.library.opcheck, test_utils=OPCHECKS[device.type])
    y, x, A, B = operands(dtypes, lead, (3, 5, 2), device, needs)
    s = torch.tensor(0.5, dtype=torch.promote_types(x.dtype, torch.float32), requires_grad=needs)
    seed = torch.tensor(4)
    opcheck(ops.lora_delta, (y, x, A, B, s))
    transposed = y.detach().mT.contiguous().mT if y.dim() > 1 else y
    opcheck(ops.lora_delta, (transposed, x, A, B, s, 0.5, seed))
    opcheck(ops.lora_delta_forward, (y, x, A, B, s, None, [], [], not needs))
    opcheck(ops.lora_delta_forward, (y, x, A, B, s, seed, [0.5, 0.0], [1, 1], False))
    grad, h = torch.randn(*lead, 5).to(y), torch.randn(math.prod(lead), 2).to(A)
    opcheck(ops.lora_delta_backward, (grad, x, A, B, s, h, None, [], [], [True] * 4))
    opcheck(ops.lora_delta_backward, (grad, x, A, B, s, None, seed, [0.5], [], [True, True, False, False]))


CALLS = pytest.mark.parametrize("call", [tfl.lora_delta, ops.lora_delta], ids=["function", "operator"])


@CALLS
@pytest.mark.parametrize(
    ("y_dtype", "x_dtype", "dtype"),
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.bfloat16),
    ],
)
def test_autocast(device, call, y_dtype, x_dtype, dtype):
    """x and the adapters are cast to its dtype, and y unless it is float32, as torch's addition keeps it."""
    tensors = operands((y_dtype, x_dtype, torch.float32), device=device)
    cast = [t.detach().to(dtype) for t in tensors]
    if y_dtype == torch.float32:
        cast[0] = tensors[0].detach()
    with torch.autocast(device.type, dtype):
        found = call(*tensors, torch.tensor(0.5))
        expected = stock(cast[0], *tensors[1:], 0.5)
    assert found.dtype == expected.dtype == cast[0].dtype
    exact = Delta(*cast, 0.5)
    exact.output().check(found.detach())
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)
    grad = torch.randn(6, 5).to(found)
    for name, leaf, gradient in zip(NAMES, tensors, torch.autograd.grad(found, tensors, grad), strict=False):
        assert gradient.dtype == leaf.dtype
        if name == "y":
            assert torch.equal(gradient, grad.to(leaf.dtype))
        elif leaf.dtype in (torch.float32, dtype):  # a float32 leaf gets the half gradient widened
            exact.gradients(grad)[name].check(gradient.to(dtype), name)


def test_autocast_leaves_float64_alone():
    tensors = operands((torch.float64,) * 3, needs=False)
    with torch.autocast("cpu"):
        Delta(*tensors, 0.5).output().check(tfl.lora_delta(*tensors, 0.5))


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_inside_autocast_keeps_its_dtypes(device, create_graph):
    tensors = operands(device=device)
    total = tfl.lora_delta(*tensors, 0.5).sin().sum()

    def gradients(autocast):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(total, tensors, retain_graph=True, create_graph=create_graph)

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def compiled(function, backend="aot_eager", keep=True, **options):
    """As it is in the context of `keep_operators`, or outside."""
    torch.compiler.reset()  # dynamo counts the recompilations of a function over the whole process
    run = torch.compile(function, backend=backend, fullgraph=True, **options)

    def call(*arguments):
        with tfl.keep_operators() if keep else contextlib.nullcontext():
            return run(*arguments)

    return call


KEEP = pytest.mark.parametrize("keep", [True, False], ids=["keep_operators", "by itself"])


@BACKENDS
@KEEP
def test_compile_without_a_graph_break(device, backend, keep):
    """Calls of several dtypes, in one graph."""
    calls = []
    for dtypes in (DTYPES[1], (torch.bfloat16, torch.bfloat16, torch.float32), WIDER[1]):
        y, *rest = operands(dtypes, (2, 3), (3, 5, 2), device)
        calls.append([y.detach().mT.contiguous().mT.requires_grad_(), *rest])  # in memory as a result must not be
    call = compiled(lambda calls: [tfl.lora_delta(*tensors, 0.5) for tensors in calls], backend, keep)
    results = call(calls)
    grads = [torch.randn(2, 3, 5).to(found) for found in results]
    gradients = torch.autograd.grad(results, [*itertools.chain(*calls)], grads)
    for i, (tensors, found, grad) in enumerate(zip(calls, results, grads, strict=True)):
        assert found.is_contiguous()
        leaves = dict(zip(NAMES, tensors, strict=False))
        check_results(Delta(*tensors, 0.5), leaves, found, grad, gradients[4 * i : 4 * i + 4])
    with torch.no_grad():
        for tensors, found in zip(calls, call(calls), strict=True):
            Delta(*tensors, 0.5).output().check(found)


@BACKENDS
@KEEP
def test_compiled_autocast(device, backend, keep):
    """What a base makes of a float32 x is half there."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    calls = [operands((y_dtype, torch.float32, torch.float32), device=device) for y_dtype in dtypes]

    def run(calls):
        with torch.autocast(device.type, torch.bfloat16):
            return [tfl.lora_delta(*tensors, 0.5) for tensors in calls]

    for (y, *rest), found, eager in zip(calls, compiled(run, backend, keep)(calls), run(calls), strict=True):
        dtype = torch.float32 if y.dtype == torch.float32 else torch.bfloat16
        assert found.dtype == eager.dtype == dtype
        exact = Delta(y.detach().to(dtype), *(t.detach().bfloat16() for t in rest), 0.5).output()
        if not keep:  # torch's own calls round h and the term
            exact.magnitude = exact.magnitude + 2 * UNIT[torch.bfloat16] / UNIT[torch.float32] * exact.magnitude
        exact.check(found.detach())


@BACKENDS
@KEEP
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_dropout(device, backend, keep, checkpointed):
    """The compiled mask is one mask: dx is zero exactly where the adapter's input was dropped."""
    y, x, A, B = operands(lead=(8,), sizes=(64, 5, 4), device=device)

    def run(y, x):
        return tfl.lora_delta(y, x, A, B, 1.0, 0.5, training=True)

    def checkpoint_run(y, x):
        return checkpoint(run, y, x, use_reentrant=False)

    found = compiled(checkpoint_run if checkpointed else run, backend, keep)(y, x)
    (grad,) = torch.autograd.grad(found.sum(), x)
    dropped = grad == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(found, y + (x * ~dropped * 2) @ A.T @ B.T)


@KEEP
def test_what_a_compiler_sees(device, keep):
    """Torch's own calls by itself, where kernels are portable: inductor fuses them."""
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled(tfl.lora_delta, backend, keep)(*operands(device=device))
    assert ("torch_fused_lora.lora_delta_forward.default" in targets) == (keep or device.type == "mps")


def test_compiled_calls_are_compiled_once(device):
    """Whatever the number of rows and the scaling; and where functorch transforms them."""
    y, x, A, B = operands(device=device)
    counter = CompileCounter()
    call = compiled(lambda y, x, s: tfl.lora_delta(y, x, A, B, s), counter, dynamic=True)
    for rows, scaling in ((6, 0.5), (9, 1.5), (12, 2.5)):  # other numbers than K, N and r
        y, x = torch.randn(rows, 5, device=device), torch.randn(rows, 8, device=device)
        scaling = torch.tensor(scaling)
        torch.testing.assert_close(call(y, x, scaling), tfl.lora_delta(y, x, A, B, scaling))
    assert counter.frame_count == 1
    gradient = torch.func.grad(lambda A: tfl.lora_delta(y, x, A, B, 0.5).sin().sum())
    torch.testing.assert_close(compiled(gradient)(A.detach()), gradient(A.detach()))


def test_stacked_adapters_compile(device):
    y, x, A, B = operands(sizes=(3, 5, 3), device=device)
    call = compiled(lora_delta_stacked)
    expected = lora_delta_stacked(y, x, A, B, 1.0)
    torch.testing.assert_close(call(y, x, A, B, 1.0, (0.0, 0.0), (1, 2)), expected)
    torch.autograd.grad(call(y, x, A, B, 1.0, (0.5, 0.5), (1, 2)).sum(), (y, x, A, B))


def test_flops_are_those_of_the_stock_calls():
    def flops(function, tensors):
        forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with forward:
            found = function(*tensors, 0.5)
        with backward:
            found.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    for needs in itertools.product((False, True), repeat=4):
        tensors = [t.requires_grad_(need) for t, need in zip(operands(lead=(2, 5), needs=False), needs, strict=True)]
        if any(needs):
            assert flops(tfl.lora_delta, tensors) == flops(stock, tensors)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        ops.lora_delta(*operands(lead=(4,), needs=False), torch.tensor(1.0))
    assert counter.get_total_flops() == 2 * 4 * 2 * (8 + 5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_selective_checkpointing_saves_the_operator(dropout_p):
    """The forward is not computed again where a policy lists it, and gradients are those without."""
    leaves = operands()

    def run(*tensors):
        return tfl.lora_delta(*tensors, 0.5, dropout_p, training=True)

    def gradients(call):
        torch.manual_seed(3)
        with FlopCounterMode(display=False) as counter:
            return torch.autograd.grad(call(*leaves).sin().sum(), leaves), counter.get_total_flops()

    plain, flops = gradients(run)
    for policy, expected in (([ops.lora_delta_forward.default], flops), ([], flops + 2 * 6 * 2 * (8 + 5))):
        context = functools.partial(create_selective_checkpoint_contexts, policy)
        found = gradients(lambda *t, c=context: checkpoint(run, *t, use_reentrant=False, context_fn=c))
        torch.testing.assert_close(found, (plain, expected))


class Watching(torch.Tensor):
    """A subclass that sees the calls made with it."""

    seen: ClassVar[list[object]] = []
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        with no_dispatch():
            return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_subclass_sees_the_operator(name):
    tensors = dict(zip(NAMES, operands(needs=False), strict=False))
    expected = tfl.lora_delta(**tensors)
    Watching.seen.clear()
    assert torch.equal(tfl.lora_delta(**tensors | {name: tensors[name].as_subclass(Watching)}), expected)
    assert ops.lora_delta_forward.default in Watching.seen


@pytest.mark.parametrize("dtypes", DTYPES)
def test_fake_and_meta_tensors(dtypes):
    """Shapes and dtypes alone, and nothing of them in the cache of scalings."""
    for mode, device in ((FakeTensorMode(), "cpu"), (contextlib.nullcontext(), "meta")):
        with mode:
            tensors = operands(dtypes, (2, 3), device=device)
            found = tfl.lora_delta(*tensors, 0.777, 0.5, training=True)
            assert (found.shape, found.dtype, found.device.type) == ((2, 3, 5), dtypes[0], device)
            gradients = torch.autograd.grad(found.sum(), tensors)
            assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in tensors]
    tensors = operands(dtypes)
    assert all(type(g) is torch.Tensor for g in torch.autograd.grad(tfl.lora_delta(*tensors, 0.777).sum(), tensors))


def test_a_profile_names_the_operator(device):
    tensors = operands(device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tfl.lora_delta(*tensors).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"torch_fused_lora::lora_delta_forward", "torch_fused_lora::lora_delta_backward"} <= names


# -------------------------------------------------------------------------------------------------------------- errors


@CALLS
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_bad_dtypes_over_a_half_x(device, call, dtypes):
    one, other = dtypes
    y, x, A, B = (t.to(device) for t in operands((one,) * 3, needs=False))
    expected = f"x's dtype {one} or torch.float32; got .*{other}"
    with pytest.raises(ValueError, match=f"lora_delta: y: expected {expected}"):
        call(y.to(other), x, A, B, torch.tensor(1.0))
    for its_y in (y, y.float()):
        with pytest.raises(ValueError, match=f"lora_delta: lora_A: expected {expected}"):
            call(its_y, x, A.to(other), B.to(other), torch.tensor(1.0))


def test_narrow_rows_name_what_they_do_not_fit(device):
    y, _, *rest = operands(lead=(2,), sizes=(4, 3, 2), device=device, needs=False)
    with pytest.raises(ValueError, match=r"lora_A: expected shape \(r, 3\) with r >= 1, since x is \(2, 3\); got"):
        tfl.lora_delta(y, torch.randn(2, 3, device=device), *rest)


@RAISES
def test_a_half_gradient_wants_a_half_x(device, context, error):
    """Over a float32 one both halves fit."""
    arguments = arguments_of_backward("lora_delta", device)
    for name in ("x", "lora_A", "lora_B", "h"):
        arguments[name] = arguments[name].bfloat16()
    assert len(ops.lora_delta_backward(**arguments)) == 4
    arguments["grad"] = arguments["grad"].bfloat16()
    with context(), pytest.raises(error, match=r"x: expected .*grad's dtype torch\.bfloat16"):
        ops.lora_delta_backward(**arguments | {"x": arguments["x"].float()})
