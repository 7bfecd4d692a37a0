"""``y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ`` as one operator with its own backward.

Three operators are registered:

``lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0, seed=None) -> y``
    The public one. It is ``_lora_linear`` for one adapter, without the rank-r product.
``_lora_linear(..., seed, dropout_p[], ranks[], save_h) -> (y, h)``
    h = dropout(x) Aᵀ is kept for backward where it will be needed. Several adapters with dropouts of their own
    share one call: lora_A and lora_B are stacked along the rank, ``ranks`` says where each adapter ends, and
    each draws its mask from a stream of its own.
``lora_linear_backward(...) -> Tensor[]``
    The gradients asked for, in the order of the forward's tensor arguments.

This file holds their schemas, checks, shape functions, autograd and autocast; `portable.py` the kernels for every
device that has none of its own.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..torch_private import apply_of, below_autograd, dispatch_modes, is_legacy_batched
from . import dispatch, portable
from .dispatch import (
    NAMESPACE,
    PLAIN_OR_NONE,
    PLAIN_TYPES,
    PORTABLE,
    Flags,
    Floats,
    Ints,
    Maybe,
    Pair,
    Saved,
    as_given,
    autocast,
    below_autocast,
    by_torch,
    define,
    differentiable_backward,
    differentiable_forward,
    fake,
    kernel,
    refuse_mps,
    refuse_sparse,
    saved_tensors,
    tell_caller,
    unwatched,
)
from .dropout import draw_seed

# Scaling and seed may be CPU tensors that a kernel reads while it is encoded: a captured graph would replay their first
# values.
_UNSAFE = torch.Tag.cudagraph_unsafe
define(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "float dropout_p=0.0, Tensor? seed=None) -> Tensor",
    _UNSAFE,
)
define(
    "_lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "Tensor? seed=None, float[] dropout_p=[], SymInt[] ranks=[], bool save_h=False) -> (Tensor, Tensor)",
    _UNSAFE,
)
define(
    "lora_linear_backward",
    "(Tensor grad, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? h, "
    "Tensor? seed, float[] dropout_p, SymInt[] ranks, bool[] needs) -> Tensor[]",
    _UNSAFE,
)
_ops = getattr(torch.ops, NAMESPACE)
_forward_op = _ops._lora_linear.default
_backward_op = _ops.lora_linear_backward.default


# ---------------------------------------------------------------------------------------------- public function


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A linear layer with a low-rank adapter: ``x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`` (LoRA, arXiv:2106.09685).

    Args:
        x: (..., K), 1-D or more, any strides.
        weight: (N, K). bias: (N,) or None. Both of x's dtype: float16, bfloat16, float32 or float64.
        lora_A: (r, K) and lora_B: (N, r), r >= 1: both of x's dtype, or both float32 over a half-precision x.
        scaling: a number or a 0-dim floating tensor on the CPU or x's device; a tensor may ask for a gradient.
        dropout_p: probability in [0, 1) that an element of x is dropped on its way into lora_A.
        training: dropout is active only when True.

    Returns:
        (..., N) in x's dtype. The base product is rounded to x's dtype first; the low-rank term is formed in
        float32 (float64 for float64) where the adapters are float32, added, and the sum is rounded again, as
        PEFT does. On mps, up to eight rows without dropout are rounded once, base and low-rank term together.

    Differentiable twice in every tensor argument, scaling included; saves x itself, the small tensors and one
    (M, r) product for backward, never a mask. Under autocast all operands are cast to its dtype, as in PEFT.

    A policy of selective checkpointing sees one operator, ``torch.ops.torch_fused_lora._lora_linear.default``, where
    stock layers show it ``aten.mm`` and ``aten.addmm``: one that saves products lists it with them.

    Raises:
        TypeError: an argument is not a tensor (scaling: a tensor or a number).
        ValueError: a shape, dtype or device that does not fit; a sparse tensor; dropout_p outside [0, 1).
    """
    tensors = (x, weight, lora_A, lora_B)
    if not PLAIN_TYPES.issuperset(map(type, tensors)):
        for name, value in zip(("x", "weight", "lora_A", "lora_B"), tensors, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a Tensor or None, got {type(bias).__name__}")
    if not isinstance(dropout_p, (float, numbers.Real)):  # float first: to ask an abstract class is slow
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if by_torch(x):
        return portable.by_torch(x, weight, bias, lora_A, lora_B, scaling, dropout_p if training else 0.0)
    return lora_linear_stacked(x, weight, bias, lora_A, lora_B, scaling, (dropout_p,) if training else ())


def lora_linear_stacked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: Sequence[float] = (),
    ranks: Sequence[int] = (),
    caller: str | None = None,
) -> Tensor:
    """`lora_linear` for adapters stacked along the rank: adapter i owns ``ranks[i]`` rows of lora_A, columns of
    lora_B and drops x with ``dropout_p[i]``. Empty ``ranks`` means one adapter; empty ``dropout_p`` no dropout.
    Errors of backward name ``caller``, the module that calls."""
    scaling = _as_scaling(scaling, x.dtype)
    seed = None
    if any(dropout_p):
        seed = draw_seed()
    else:
        dropout_p = ranks = ()
    arguments = (x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    device_type = x.device.type
    if not unwatched(device_type) or not PLAIN_OR_NONE.issuperset(map(type, arguments[:5])):
        return tell_caller(_forward_op(*arguments)[0], caller)
    # Where nothing is there to intercept the operator, what the dispatcher would call is called from here: its way
    # from Python through C++ to Python and back takes a tenth of a 1 x 512 x 512 layer.
    kernel = _portable_forward if device_type in PORTABLE else _device_forward
    return _with_autograd(kernel, *arguments, False, caller)[0]


_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def _as_scaling(scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`scaling` as the operator takes it: a 0-dim float32 tensor (float64 beside float64)."""
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(scaling, Tensor):
        return scaling if scaling.dtype == wanted or not scaling.is_floating_point() else scaling.to(wanted)
    if not isinstance(scaling, (float, numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scaling: expected a number or a 0-dim Tensor, got {type(scaling).__name__}")
    if torch.compiler.is_compiling():
        # A product keeps a float that changes from call to call symbolic; torch.tensor(scaling) recompiles.
        return _ONE.to(wanted) * scaling
    if dispatch_modes() > 0:  # a mode may wrap new tensors: keep them out of the cache
        return torch.tensor(scaling, dtype=wanted, device="cpu")
    return _cached_scalar(scaling, wanted)


@functools.lru_cache(maxsize=1024)
def _cached_scalar(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


@kernel("lora_linear", "CompositeImplicitAutograd", "FuncTorchBatched")
def _public(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    dropout_p: float = 0.0,
    seed: Maybe = None,
) -> Tensor:
    if dropout_p > 0 and seed is None:
        raise ValueError(f"seed: dropout_p={dropout_p} needs a 0-dim int64 CPU tensor, got None")
    dropout = (dropout_p,) if seed is not None else ()
    return _forward_op(x, weight, bias, lora_A, lora_B, scaling, seed, dropout)[0]


# ------------------------------------------------------------------------------------------------------- checks

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    seed: Maybe,
    dropout_p: Floats,
    ranks: Ints,
) -> None:
    """Raise ValueError, naming the argument, its shape and what was expected, unless the operands fit together."""
    refuse = functools.partial(dispatch.refuse, "lora_linear")
    if not (x.layout is weight.layout is lora_A.layout is lora_B.layout is torch.strided):
        refuse_sparse("lora_linear", x=x, weight=weight, lora_A=lora_A, lora_B=lora_B)
    dtype, device = x.dtype, x.device
    x_shape, W_shape, A_shape = x.shape, weight.shape, lora_A.shape
    if dtype not in _DTYPES:
        refuse("x", x, "float16, bfloat16, float32 or float64")
    if len(W_shape) != 2:
        refuse("weight", weight, "shape (N, K)")
    N, K = W_shape
    if not x_shape or x_shape[-1] != K:
        refuse("x", x, f"shape (..., {K}), since weight is ({N}, {K})")
    if len(A_shape) != 2 or A_shape[1] != K or A_shape[0] < 1:
        refuse("lora_A", lora_A, f"shape (r, {K}) with r >= 1, since weight is ({N}, {K})")
    r = A_shape[0]
    if lora_B.shape != (N, r):
        refuse("lora_B", lora_B, f"shape ({N}, {r}), since weight is ({N}, {K}) and lora_A ({r}, {K})")
    if weight.dtype != dtype or weight.device != device:
        refuse("weight", weight, f"x's dtype {dtype} and device {device}")
    if bias is not None and (bias.shape != (N,) or bias.dtype != dtype or bias.device != device):
        refuse("bias", bias, f"shape ({N},), x's dtype {dtype} and device {device}")
    _check_adapters(refuse, "x", dtype, device, lora_A, lora_B, scaling, seed, dropout_p, ranks)


def _check_backward(
    grad: Tensor,
    x: Saved,
    weight: Saved,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    h: Saved,
    seed: Maybe,
    dropout_p: Floats,
    ranks: Ints,
    needs: Flags,
) -> None:
    """As `_check`, for the operands of the gradients asked for."""
    refuse = functools.partial(dispatch.refuse, "lora_linear_backward")
    if len(needs) != 6:
        refuse("needs", list(needs), "6 flags")
    refuse_sparse(
        "lora_linear_backward", grad=grad, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, scaling=scaling, h=h
    )
    need_x, need_weight, _, need_A, need_B, need_scaling = needs
    dtype, device = grad.dtype, grad.device
    if dtype not in _DTYPES:
        refuse("grad", grad, "float16, bfloat16, float32 or float64")
    if lora_A.dim() != 2 or lora_A.shape[0] < 1:
        refuse("lora_A", lora_A, "shape (r, K) with r >= 1")
    r, K = lora_A.shape
    if lora_B.dim() != 2 or lora_B.shape[1] != r:
        refuse("lora_B", lora_B, f"shape (N, {r}), since lora_A is ({r}, {K})")
    N = lora_B.shape[0]
    if grad.dim() < 1 or grad.shape[-1] != N:
        refuse("grad", grad, f"shape (..., {N}), since lora_B is ({N}, {r})")
    _check_adapters(refuse, "grad", dtype, device, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    for name, value, needed, shape, like, its_dtype in (
        ("x", x, need_A or need_weight, (*grad.shape[:-1], K), "grad", dtype),
        ("weight", weight, need_x, (N, K), "grad", dtype),
        ("h", h, need_B or need_scaling, (math.prod(grad.shape[:-1]), r), "lora_A", lora_A.dtype),
    ):
        if needed and (value is None or value.shape != shape or value.dtype != its_dtype or value.device != device):
            refuse(name, value, f"shape {tuple(shape)}, {like}'s dtype {its_dtype} and device {device}")


def _check_adapters(
    refuse: Callable[..., NoReturn],
    like: str,
    dtype: torch.dtype,
    device: torch.device,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    seed: Maybe,
    dropout_p: Floats,
    ranks: Ints,
) -> None:
    """The dtypes and devices beside those of ``like``, the operand of the full width, and what concerns dropout."""
    r, adapter_dtype = lora_A.shape[0], lora_A.dtype
    if adapter_dtype != dtype and not (adapter_dtype == torch.float32 and dtype in portable.HALF):
        refuse("lora_A", lora_A, f"{like}'s dtype {dtype}" + (" or torch.float32" if dtype in portable.HALF else ""))
    if lora_A.device != device:
        refuse("lora_A", lora_A, f"{like}'s device {device}")
    if lora_B.dtype != adapter_dtype or lora_B.device != device:
        refuse("lora_B", lora_B, f"lora_A's dtype {adapter_dtype} and device {device}")
    if scaling.dim() != 0 or not scaling.is_floating_point():
        refuse("scaling", scaling, "a 0-dim floating tensor")
    if not scaling.is_cpu and scaling.device != device:
        refuse("scaling", scaling, f"a tensor on the CPU or on {like}'s device {device}")
    if seed is None:
        return
    if seed.shape != () or seed.dtype != torch.int64 or not seed.is_cpu:
        refuse("seed", seed, "a 0-dim int64 tensor on the CPU")
    if not all(0.0 <= p < 1.0 for p in dropout_p):
        refuse("dropout_p", list(dropout_p), "probabilities in [0, 1)")
    got_ranks = list(ranks) or [r]
    if sum(got_ranks) != r or len(got_ranks) != len(dropout_p):
        refuse("ranks", got_ranks, f"one rank for each of the {len(dropout_p)} dropout_p, {r} in all")


# ------------------------------------------------------------------------------------------ kernels and shapes


def _portable_forward(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    seed: Maybe = None,
    dropout_p: Floats = (),
    ranks: Ints = (),
    save_h: bool = False,
) -> tuple[Tensor, Maybe]:
    _check(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    return portable.forward(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)


@kernel("_lora_linear", "CompositeExplicitAutograd")
def _portable_kernel(x: Tensor, weight: Tensor, bias: Maybe, lora_A: Tensor, *arguments: Any) -> Pair:
    refuse_mps("lora_linear", x, "leave the model unpatched (torch_fused_lora.unpatch_peft)")
    y, h = _portable_forward(x, weight, bias, lora_A, *arguments)
    return y, lora_A.new_empty(0) if h is None else h


def _differentiable(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    seed: Maybe = None,
    dropout_p: Floats = (),
    ranks: Ints = (),
    save_h: bool = False,
) -> Pair:
    _check(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    return portable.differentiable_forward(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)


@kernel("lora_linear_backward", "CompositeExplicitAutograd")
def _portable_backward(
    grad: Tensor,
    x: Saved,
    weight: Saved,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    h: Saved,
    seed: Maybe,
    dropout_p: Floats,
    ranks: Ints,
    needs: Flags,
) -> list[Tensor]:
    _check_backward(grad, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs)
    return _found(portable.backward(grad, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs))


def _found(grads: Iterable[Maybe]) -> list[Tensor]:
    """The gradients that were asked for: the operator's Tensor[] holds no None."""
    return [grad for grad in grads if grad is not None]


@fake("_lora_linear")
def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    seed: Maybe = None,
    dropout_p: Floats = (),
    ranks: Ints = (),
    save_h: bool = False,
) -> Pair:
    _check(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    h_shape = (math.prod(x.shape[:-1]), lora_A.shape[0]) if save_h else (0,)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), lora_A.new_empty(h_shape)


@fake("lora_linear_backward")
def _fake_backward(
    grad: Tensor,
    x: Saved,
    weight: Saved,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    h: Saved,
    seed: Maybe,
    dropout_p: Floats,
    ranks: Ints,
    needs: Flags,
) -> list[Tensor]:
    _check_backward(grad, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs)
    (r, K), N = lora_A.shape, lora_B.shape[0]
    grads = (
        (grad, (*grad.shape[:-1], K)),
        (grad, (N, K)),
        (grad, (N,)),
        (lora_A, (r, K)),
        (lora_B, (N, r)),
        (scaling, ()),
    )
    return [like.new_empty(shape) for (like, shape), need in zip(grads, needs, strict=True) if need]


@register_flop_formula(_ops._lora_linear)
def _forward_flops(x_shape: Ints, weight_shape: Ints, bias_shape: Any, A_shape: Ints, *_: Any, **__: Any) -> int:
    M, (N, K), r = math.prod(x_shape[:-1]), weight_shape, A_shape[0]
    return 2 * M * (N * K + r * (K + N))


@register_flop_formula(_ops.lora_linear_backward)
def _backward_flops(
    grad_shape: Ints, x_shape: Any, weight_shape: Ints, A_shape: Ints, B_shape: Ints, *options: Any, **_: Any
) -> int:
    """Of dY W and dYᵀ x, and of z = dY B, z A, zᵀ x̃ and dYᵀ h."""
    M, (r, K), N = math.prod(grad_shape[:-1]), A_shape, B_shape[0]
    need_x, need_weight, _, need_A, need_B, need_scaling = options[-1]
    per_rank = (need_x or need_A) * N + (need_x + need_A) * K + (need_B or need_scaling) * N
    return 2 * M * ((need_x + need_weight) * N * K + r * per_rank)


# --------------------------------------------------------------------------------- autograd, functorch, autocast


class _LoRALinear(torch.autograd.Function):
    # The classic form, forward(ctx, ...): with setup_context apart a call costs about twice as much.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Maybe, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, options: Any
    ) -> tuple[Tensor, Maybe]:
        seed, dropout_p, ranks, kernel, caller = options
        need_x, need_weight, _, need_A, need_B, need_scaling, _ = ctx.needs_input_grad
        save_h = need_B or need_scaling
        with below_autograd():
            y, h = kernel(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)
        if (need_A or need_weight) and x.is_inference():  # autograd refuses to save it
            x = x.clone()
        ctx.set_materialize_grads(False)
        if not save_h and h is not None:
            ctx.mark_non_differentiable(h)
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            scaling,
            h if save_h else None,
            seed,
        )
        ctx.options = dropout_p, ranks, y.shape, y.dtype, kernel is _portable_forward, caller
        return y, h

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_h: Any) -> tuple[Maybe, ...]:
        if grad is None and grad_h is None:
            return (None,) * 7
        needs = ctx.needs_input_grad[:6]
        dropout_p, ranks, y_shape, y_dtype, direct, caller = ctx.options
        arguments = *saved_tensors(ctx, "lora_linear", "patch_peft", caller), dropout_p, ranks, needs
        grads: Sequence[Maybe]
        if grad_h is not None or torch.is_grad_enabled():
            if grad is None:  # only h was used, which a double backward does
                grad = grad_h.new_zeros(y_shape, dtype=y_dtype)
            with below_autocast():
                grads = portable.differentiable_backward(grad, grad_h, *arguments)
        else:
            # The vmap of `torch.autograd.grad(is_grads_batched=True)`, older than torch.func's, knows aten calls only.
            batched = is_legacy_batched(grad)
            direct = batched or (direct and type(grad) is Tensor and unwatched(grad.device.type))
            with below_autograd():
                if direct:
                    grads = portable.backward(grad, *arguments)
                else:
                    found = iter(_backward_op(grad, *arguments))
                    grads = [next(found) if need else None for need in needs]
        return *grads, None


_apply = apply_of(_LoRALinear)


def _with_autograd(
    kernel: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    seed: Maybe = None,
    dropout_p: Floats = (),
    ranks: Ints = (),
    save_h: bool = False,
    caller: str | None = None,
) -> Pair:
    if torch.is_grad_enabled() and (
        lora_A.requires_grad
        or lora_B.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or scaling.requires_grad
    ):
        return _apply(x, weight, bias, lora_A, lora_B, scaling, (seed, dropout_p, ranks, kernel, caller))
    with below_autograd():
        return kernel(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)


_device_forward = differentiable_forward(
    "_lora_linear", lambda *arguments: _check(*arguments[:9]), _with_autograd, _differentiable
)
differentiable_backward(
    "lora_linear_backward",
    _check_backward,
    lambda grad, *arguments: _found(portable.differentiable_backward(grad, None, *arguments)),
)


def _cast(
    device_type: str, x: Tensor, weight: Tensor, bias: Maybe, lora_A: Tensor, lora_B: Tensor, *options: Any
) -> tuple[Any, ...]:
    dtype, casts = torch.get_autocast_dtype(device_type), (*portable.HALF, torch.float32)
    operands = (x, weight, bias, lora_A, lora_B)
    return *(t.to(dtype) if t is not None and t.dtype in casts else t for t in operands), *options


autocast("_lora_linear", _cast)
autocast("lora_linear_backward", as_given)
