"""Derivatives: first and second order, forward mode, torch.func, and which of them are computed at all."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import torch_fused_lora as tfl
from torch_fused_lora.ops.dropout import operator as dropout

ops = torch.ops.torch_fused_lora


CPU = torch.device("cpu")


def operands(lead=(4,), needs=(True,) * 6, device=CPU):
    shapes = ((*lead, 3), (5, 3), (5,), (2, 3), (5, 2), ())
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return [torch.randn(s).to(device, dtype).requires_grad_(n) for s, n in zip(shapes, needs, strict=True)]


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
            torch.testing.assert_close(a.detach().cpu().double(), e.detach(), rtol=1e-3, atol=1e-3)


def check_forward_mode(loss, tensors):
    """Never a zero or missing tangent."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    for i, e in enumerate(torch.autograd.grad(loss(*leaves), leaves)):
        tangent = torch.randn_like(e)
        with forward_ad.dual_level():
            primals = list(tensors)
            primals[i] = forward_ad.make_dual(primals[i], tangent)
            found = forward_ad.unpack_dual(loss(*primals)).tangent
        torch.testing.assert_close(found, (e * tangent).sum())


def check_batched_gradients(y, leaves):
    """By the vmap that is older than torch.func's."""
    grads = torch.randn(7, *y.shape).to(y)
    batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for g, one in zip(batched, torch.autograd.grad(y, leaves, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(g[i], one)


def seeded(dropout_p, layer=tfl.lora_linear):
    def call(*arguments):
        torch.manual_seed(11)
        return layer(*arguments, dropout_p=dropout_p, training=True)

    return call


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("lead", [(), (4,), (2, 2)])
def test_gradcheck_and_gradgradcheck(device, lead, dropout_p):
    check_gradients(gradcheck, seeded(dropout_p), operands(lead, device=device))
    check_gradients(gradgradcheck, seeded(dropout_p), operands(lead, device=device))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_second_order_on_mps_is_the_cpus(mps, dropout_p, monkeypatch):
    """The CPU's gradients test_gradcheck_and_gradgradcheck establishes."""
    check_second_order_on(mps, seeded(dropout_p), operands(), monkeypatch)


@pytest.mark.parametrize("needs", [n for n in itertools.product((False, True), repeat=6) if any(n)])
def test_every_subset_of_gradients(device, needs):
    """Right to second order for each of the 63 ways to ask; in particular where x is not kept (lora_A frozen)."""
    check_gradients(gradcheck, tfl.lora_linear, operands(needs=needs, device=device), fast_mode=True)
    if device.type == "cpu":  # the double backward is the same aten calls everywhere
        check_gradients(gradgradcheck, tfl.lora_linear, operands(needs=needs), fast_mode=True)


def test_without_bias(device):
    x, W, _, A, B, s = operands(device=device)
    check_gradients(gradcheck, lambda *a: tfl.lora_linear(a[0], a[1], None, *a[2:]), (x, W, A, B, s))


def test_the_backward_operator_alone_is_differentiable():
    grad, h = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (4, 2)))
    x, W, _, A, B, s = operands()
    for seed, dropout_p in ((None, []), (torch.tensor(3), [0.4])):

        def backward(*a, seed=seed, dropout_p=dropout_p):
            return tuple(ops.lora_linear_backward(*a, seed, dropout_p, [], [True] * 6))

        assert gradcheck(backward, (grad, x, W, A, B, s, h))


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
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.05 * float(e.abs().max()))  # a few bf16 roundings


def loss_by_wrapper(x, A, B, W, b):
    return tfl.lora_linear(x, W, b, A, B, 0.7).sin().sum()


def loss_by_operator(x, A, B, W, b):
    return ops.lora_linear(x, W, b, A, B, torch.tensor(0.7, dtype=x.dtype)).sin().sum()


LOSSES = pytest.mark.parametrize("loss", [loss_by_wrapper, loss_by_operator])


@LOSSES
def test_func_grad_vmap_and_jvp(device, loss):
    x, W, b, A, B, _ = (t.detach() for t in operands(device=device))
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    expected = torch.autograd.grad(loss(*leaves, W, b), leaves)
    fixed = (W, b)

    for a, e in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, A, B, *fixed), expected, strict=True):
        torch.testing.assert_close(a, e)
    per_sample = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None, None, None, None))(x, A, B, *fixed)
    torch.testing.assert_close(per_sample.sum(0), expected[1])
    rows = torch.vmap(loss, in_dims=(0, None, None, None, None))(x, A, B, *fixed)
    torch.testing.assert_close(rows.sum(), loss(x, A, B, *fixed))
    stacked = torch.vmap(loss, in_dims=(None, 0, 1, None, None))(
        x, torch.stack([A, 2 * A]), torch.stack([B, B], 1), *fixed
    )
    torch.testing.assert_close(stacked[1], loss(x, 2 * A, B, *fixed))

    tangents = [torch.randn_like(t) for t in (x, A, B)]
    directional = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    _, jvp = torch.func.jvp(lambda *a: loss(*a, *fixed), (x, A, B), tuple(tangents))
    torch.testing.assert_close(jvp, directional)
    torch.testing.assert_close(torch.func.jacrev(loss)(x, A, B, *fixed), torch.func.jacfwd(loss)(x, A, B, *fixed))


@LOSSES
def test_forward_mode_is_right(loss):
    x, W, b, A, B, _ = (t.detach() for t in operands())
    check_forward_mode(lambda *tensors: loss(*tensors, W, b), (x, A, B))


def test_vmap_over_dropout_follows_its_randomness():
    x, W, b, A, B, _ = (t.detach() for t in operands((6, 4)))

    def layer(x):
        return tfl.lora_linear(x, W, b, A, B, 1.0, 0.5, training=True)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(layer)(x)
    same = torch.vmap(layer, randomness="same")(x[:1].expand(6, 4, 3))
    assert all(torch.equal(same[0], row) for row in same)
    different = torch.vmap(layer, randomness="different")(x[:1].expand(6, 4, 3))
    assert not torch.equal(different[0], different[1])
    seeds = torch.arange(6)
    by_seed = torch.vmap(lambda x, s: ops.lora_linear(x, W, b, A, B, torch.tensor(1.0).double(), 0.5, s))(x, seeds)
    one_by_one = [ops.lora_linear(x[i], W, b, A, B, torch.tensor(1.0).double(), 0.5, seeds[i]) for i in range(6)]
    torch.testing.assert_close(by_seed, torch.stack(one_by_one))


def test_batched_gradients(device):
    x, W, b, A, B, s = operands(device=device)
    check_batched_gradients(tfl.lora_linear(x, W, b, A, B, s), (x, A, B))


def test_after_inference_mode(device):
    """What inference_mode leaves in caches must still serve training."""
    a = operands(device=device)[:5]
    with torch.inference_mode():
        assert tfl.lora_linear(*a, 0.123).is_inference()
    tfl.lora_linear(*a, 0.123).sum().backward()
    assert a[0].grad is not None


def test_only_what_is_asked_for_is_computed(device):
    """The backward operator returns the gradients asked for and no others; h is not needed without dB."""
    x, W, _, A, B, s = operands(device=device)
    needs = (True, False, False, True, False, False)
    grads = ops.lora_linear_backward(torch.randn(4, 5).to(x), x, W, A, B, s, None, None, [], [], needs)
    assert [tuple(g.shape) for g in grads] == [(4, 3), (2, 3)]
