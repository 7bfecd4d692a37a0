"""Derivatives: first and second order, forward mode, torch.func, and which of them are computed at all."""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

import torch_fused_lora as tfl
from torch_fused_lora.ops.dropout import operator as dropout

ops = torch.ops.torch_fused_lora


CPU = torch.device("cpu")
CALLS = pytest.mark.parametrize("call", [tfl.lora_linear, tfl.lora_delta])


def shapes(call, lead=(4,)):
    """Of the operands that have gradients, by name."""
    base = (
        {"x": (*lead, 3), "weight": (5, 3), "bias": (5,)}
        if call is tfl.lora_linear
        else {"y": (*lead, 5), "x": (*lead, 3)}
    )
    return base | {"lora_A": (2, 3), "lora_B": (5, 2), "scaling": ()}


def operands(call=tfl.lora_linear, lead=(4,), needs=(True,) * 6, device=CPU):
    """As exact as the device can."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    own = zip(shapes(call, lead).values(), needs, strict=False)
    return [torch.randn(shape).to(device, dtype).requires_grad_(need) for shape, need in own]


def check_gradients(check, layer, arguments, **options):
    """gradcheck or gradgradcheck; in float32, all there is on mps, by large steps: they have no truncation error, since
    the layer and its gradients are linear in each argument, and leave 1e-6 of the values' roundoff."""
    if arguments[0].dtype == torch.float32:
        options |= {"eps": 0.5, "atol": 1e-4, "rtol": 1e-4}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input #. requires gradient and is not a double precision")
        assert check(layer, arguments, **options)


def check_second_order_on(device, layer, exact, monkeypatch):
    """Against float64 on the CPU, with the masks of a GPU."""
    monkeypatch.setattr(dropout, "_cpu_mask", lambda *arguments: dropout.gpu_mask(*arguments).numpy())

    def second_order(arguments):
        first = torch.autograd.grad(layer(*arguments).sin().sum(), arguments, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), arguments)

    narrow = [t.detach().float().to(device).requires_grad_() for t in exact]
    for order, expected in zip(second_order(narrow), second_order(exact), strict=True):
        for a, e in zip(order, expected, strict=True):
            assert_close(a.detach().cpu().double(), e.detach(), rtol=1e-3, atol=1e-3)


def check_forward_mode(loss, tensors):
    """Never a zero or missing tangent."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    for i, e in enumerate(torch.autograd.grad(loss(*leaves), leaves)):
        tangent = torch.randn_like(e)
        with forward_ad.dual_level():
            primals = list(tensors)
            primals[i] = forward_ad.make_dual(primals[i], tangent)
            found = forward_ad.unpack_dual(loss(*primals)).tangent
        assert_close(found, (e * tangent).sum())


def check_batched_gradients(y, leaves):
    """By the vmap that is older than torch.func's."""
    grads = torch.randn(7, *y.shape).to(y)
    batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for g, one in zip(batched, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True):
            assert_close(g[i], one)


def seeded(dropout_p, layer=tfl.lora_linear):
    def call(*arguments):
        torch.manual_seed(11)
        return layer(*arguments, dropout_p=dropout_p, training=True)

    return call


@CALLS
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("lead", [(), (4,), (2, 2)])
def test_gradcheck_and_gradgradcheck(device, call, lead, dropout_p):
    for check in (gradcheck, gradgradcheck):
        check_gradients(check, seeded(dropout_p, call), operands(call, lead, device=device))


@CALLS
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_second_order_on_mps_is_the_cpus(mps, call, dropout_p, monkeypatch):
    """The CPU's gradients test_gradcheck_and_gradgradcheck establishes."""
    check_second_order_on(mps, seeded(dropout_p, call), operands(call), monkeypatch)


SUBSETS = [
    (call, needs) for call in CALLS.args[1] for needs in itertools.product((False, True), repeat=len(shapes(call)))
]


@pytest.mark.parametrize(("call", "needs"), [(call, needs) for call, needs in SUBSETS if any(needs)])
def test_every_subset_of_gradients(device, call, needs):
    """Right to second order for each of the 63 ways to ask, or 31; also where x is not kept (lora_A frozen)."""
    check_gradients(gradcheck, call, operands(call, needs=needs, device=device), fast_mode=True)
    if device.type == "cpu":  # the double backward is the same aten calls everywhere
        check_gradients(gradgradcheck, call, operands(call, needs=needs), fast_mode=True)


def test_without_bias(device):
    x, W, _, A, B, s = operands(device=device)
    check_gradients(gradcheck, lambda *a: tfl.lora_linear(a[0], a[1], None, *a[2:]), (x, W, A, B, s))


@CALLS
def test_the_backward_operator_alone_is_differentiable(call):
    """In the output's gradient, what of the operands it takes, and h."""
    grad, h = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (4, 2)))
    taken = [t for t, name in zip(operands(call), shapes(call), strict=True) if name not in ("y", "bias")]
    operator, needs = getattr(ops, f"{call.__name__}_backward"), [True] * (len(shapes(call)) - (call is tfl.lora_delta))
    for masks in ((None, []), (torch.tensor(3), [0.4])):
        assert gradcheck(lambda *t, masks=masks: tuple(operator(*t, *masks, [], needs)), (grad, *taken, h))


def test_mixed_dtypes_to_second_order():
    """A half base with float32 adapters: a double backward equals the one through plain aten calls."""
    x, W, b = (torch.randn(s).bfloat16() for s in ((4, 3), (5, 3), (5,)))
    A, B = torch.randn(2, 3), torch.randn(5, 2)

    def second_order(layer):
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        first = torch.autograd.grad(layer(leaves[0], *leaves[1:]).float().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)

    def plain(x, A, B):
        return (x @ W.T + b + (x.float() @ A.T @ B.T) * 0.5).bfloat16()

    actual = second_order(lambda x, A, B: tfl.lora_linear(x, W, b, A, B, 0.5))
    for a, e in zip(actual, second_order(plain), strict=True):
        assert_close(a, e, rtol=0.05, atol=0.05 * float(e.abs().max()))  # a few bf16 roundings


def by_function(call, *operands):
    return call(*operands, 0.7).sin().sum()


def by_operator(call, *operands):
    return getattr(ops, call.__name__)(*operands, torch.tensor(0.7, dtype=operands[0].dtype)).sin().sum()


LOSSES = pytest.mark.parametrize("loss", [by_function, by_operator])


@CALLS
@LOSSES
def test_func_grad_vmap_and_jvp(device, call, loss):
    tensors, names = [t.detach() for t in operands(call, device=device)[:-1]], list(shapes(call))[:-1]
    at, loss = {name: i for i, name in enumerate(names)}, functools.partial(loss, call)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert_close(torch.func.grad(loss, argnums=tuple(at.values()))(*tensors), expected)

    def over(dimensions):
        return tuple(dimensions.get(name) for name in names)

    def with_these(changes):
        return [changes.get(name, t) for name, t in zip(names, tensors, strict=True)]

    by_rows = over({"x": 0, "y": 0})
    per_sample = torch.vmap(torch.func.grad(loss, argnums=at["lora_A"]), in_dims=by_rows)(*tensors)
    assert_close(per_sample.sum(0), expected[at["lora_A"]])
    assert_close(torch.vmap(loss, in_dims=by_rows)(*tensors).sum(), loss(*tensors))
    A, B, first = tensors[at["lora_A"]], tensors[at["lora_B"]], tensors[0]
    stacked = with_these({"lora_A": torch.stack([A, 2 * A]), "lora_B": torch.stack([B, B], 1)})
    found = torch.vmap(loss, in_dims=over({"lora_A": 0, "lora_B": 1}))(*stacked)
    assert_close(found[1], loss(*with_these({"lora_A": 2 * A})))
    stacked = with_these({names[0]: torch.stack([first, 2 * first], 2)})
    assert_close(torch.vmap(loss, in_dims=over({names[0]: 2}))(*stacked)[1], loss(2 * first, *tensors[1:]))

    tangents = tuple(torch.randn_like(t) for t in tensors)
    directional = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    assert_close(torch.func.jvp(loss, tuple(tensors), tangents)[1], directional)
    for i in at.values():
        assert_close(torch.func.jacrev(loss, argnums=i)(*tensors), torch.func.jacfwd(loss, argnums=i)(*tensors))


@CALLS
@LOSSES
def test_forward_mode_is_right(call, loss):
    check_forward_mode(functools.partial(loss, call), [t.detach() for t in operands(call)[:-1]])


@CALLS
def test_vmap_over_dropout_follows_its_randomness(call):
    tensors = {name: t.detach() for name, t in zip(shapes(call), operands(call, (6, 4)), strict=True)}
    rows = {name: tensors.pop(name) for name in ("x", "y") if name in tensors}
    same = {name: t[:1].expand(t.shape) for name, t in rows.items()}
    operator = getattr(ops, call.__name__)

    def layer(rows):
        return call(**rows, **tensors, dropout_p=0.5, training=True)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(layer)(rows)
    found = torch.vmap(layer, randomness="same")(same)
    assert all(torch.equal(found[0], row) for row in found)
    found = torch.vmap(layer, randomness="different")(same)
    assert not torch.equal(found[0], found[1])
    seeds = torch.arange(6)
    by_seed = torch.vmap(lambda rows, seed: operator(**rows, **tensors, dropout_p=0.5, seed=seed))(rows, seeds)
    each = [{name: t[i] for name, t in rows.items()} for i in range(6)]
    one_by_one = [operator(**row, **tensors, dropout_p=0.5, seed=seed) for row, seed in zip(each, seeds, strict=True)]
    assert_close(by_seed, torch.stack(one_by_one))


@CALLS
def test_batched_gradients(device, call):
    leaves = operands(call, device=device)
    check_batched_gradients(call(*leaves), leaves)


@CALLS
def test_after_inference_mode(device, call):
    """What inference_mode leaves in caches must still serve training."""
    leaves = operands(call, device=device)[:-1]
    with torch.inference_mode():
        assert call(*leaves, 0.123).is_inference()
    call(*leaves, 0.123).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_only_what_is_asked_for_is_computed(device):
    """The backward operator returns the gradients asked for and no others; h is not needed without dB."""
    x, W, _, A, B, s = operands(device=device)
    needs = (True, False, False, True, False, False)
    grads = ops.lora_linear_backward(torch.randn(4, 5).to(x), x, W, A, B, s, None, None, [], [], needs)
    assert [tuple(g.shape) for g in grads] == [(4, 3), (2, 3)]
