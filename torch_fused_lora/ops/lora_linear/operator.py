"""``y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ`` as one operator with its own backward.

Three operators are registered:

``lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0, seed=None) -> y``
    The public one: ``lora_linear_forward`` for one adapter, without the rank-r product.
``lora_linear_forward(..., seed, dropout_p[], ranks[], save_h) -> (y, h)``
    h = dropout(x) Aᵀ is kept for backward where it will be needed. Several adapters with dropouts of their own
    share one call: lora_A and lora_B are stacked along the rank, ``ranks`` says where each adapter ends, and
    each draws its mask from a stream of its own.
``lora_linear_backward(...) -> Tensor[]``
    The gradients asked for, in the order of the forward's tensor arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..dispatch import (
    NAMESPACE,
    Flags,
    Floats,
    Ints,
    Maybe,
    Pair,
    Route,
    Saved,
    Seed,
    are_plain,
    define,
    implement,
    route,
    savable,
)
from ..rows import DTYPES, DTYPES_TEXT, HALF
from . import differentiable, portable
from .adapted import Adapted
from .arguments import (
    call_options,
    check_adapters,
    check_devices,
    check_low_rank,
    check_options,
    check_saved,
    check_types,
)


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
        weight: (N, K). bias: (N,) or None. Both of x's dtype: half, float32 or float64.
        lora_A: (r, K) and lora_B: (N, r), r >= 1: both of x's dtype, or both float32 over a half-precision x.
        scaling: a number or a 0-dim floating tensor on the CPU or x's device; a tensor may ask for a gradient.
        dropout_p: probability in [0, 1) that an element of x is dropped on its way into lora_A.
        training: dropout is active only when True.

    Returns:
        (..., N) in x's dtype. The base product is rounded to x's dtype first; the low-rank term is formed in
        float32 (float64 for float64) where the adapters are float32, added, and the sum is rounded again, as
        PEFT does. Where one kernel makes base and low-rank term together (mps, up to eight rows without dropout;
        CUDA, half rows), their sum is rounded once.

    Differentiable twice in every tensor argument, scaling included; saves x itself, the small tensors and one
    (M, r) product for backward, never a mask. Under autocast all operands are cast to its dtype, as in PEFT.

    A policy of selective checkpointing sees one operator, ``torch.ops.torch_fused_lora.lora_linear_forward.default``,
    where stock layers show it ``aten.mm`` and ``aten.addmm``: one that saves products lists it with them.

    Raises:
        TypeError: an argument is not a tensor (scaling: a tensor or a number).
        ValueError: a shape, dtype or device that does not fit; a sparse tensor; dropout_p outside [0, 1).
    """
    check_types(dropout_p, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B)
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a Tensor or None, got {type(bias).__name__}")
    way = route(x)
    if way is dispatch.BY_TORCH:
        x, weight, bias, lora_A, lora_B = _operator.autocast(x, weight, bias, lora_A, lora_B)
        if not (x.is_nested or torch.jit.is_tracing()):  # whose shapes are no numbers
            _LoRALinear.check(x, weight, bias, lora_A, lora_B, 1.0, None, (), (), False)
        return differentiable.by_torch(x, weight, bias, lora_A, lora_B, scaling, dropout_p if training else 0.0)
    if not are_plain(weight, bias, lora_A, lora_B):
        way = dispatch.BY_DISPATCHER
    dropout = (dropout_p,) if training else ()
    return lora_linear_stacked(x, weight, bias, lora_A, lora_B, scaling, dropout, way=way)


def lora_linear_stacked(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: Floats = (),
    ranks: Ints = (),
    caller: str | None = None,
    way: Route | None = None,
    checked: bool = False,
) -> Tensor:
    """`lora_linear` for adapters stacked along the rank: adapter i owns ``ranks[i]`` rows of lora_A, columns of lora_B
    and drops x with ``dropout_p[i]``. Empty ``ranks`` means one adapter; empty ``dropout_p`` no dropout. Errors of
    backward name ``caller``, the module that calls. ``way``: the `route` of x, unless that is torch's, or the
    dispatcher's if an operand is no plain tensor. ``checked``: dtypes and layouts are known to fit.
    """
    if way is None:
        way = route(x)
    scaling, seed, dropout_p, ranks = call_options(x, way, scaling, dropout_p, ranks)
    inputs = (x, weight, bias, lora_A, lora_B, scaling)
    return _operator.call(way, caller, inputs, seed, dropout_p, ranks, False, checked=checked)


_refuse = functools.partial(dispatch.refuse, "lora_linear")


class _LoRALinear(Adapted):
    name = "lora_linear"
    schemas = (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? seed, "
        "float[] dropout_p, SymInt[] ranks, bool save_h) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? h, "
        "Tensor? seed, float[] dropout_p, SymInt[] ranks, bool[] needs) -> Tensor[]",
    )
    inputs = 6
    operands = 4
    instead = "leave the model unpatched (torch_fused_lora.unpatch_peft)"

    @staticmethod
    def check(
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        seed: Seed,
        dropout_p: Floats,
        ranks: Ints,
        save_h: bool,
    ) -> None:
        """Raise ValueError, naming the argument, its shape and what was expected, unless the operands fit together."""
        refuse, dtype = _refuse, x.dtype
        x_shape, W_shape, A_shape = x.shape, weight.shape, lora_A.shape
        if dtype not in DTYPES:
            refuse("x", x, DTYPES_TEXT)
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
        if weight.dtype is not dtype:
            refuse("weight", weight, f"x's dtype {dtype}")
        if bias is not None and (bias.shape != (N,) or bias.dtype is not dtype):
            refuse("bias", bias, f"shape ({N},), x's dtype {dtype}")
        if not (x.is_cpu and weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu and (bias is None or bias.is_cpu)):
            check_devices(refuse, "x", x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B)
        check_adapters(refuse, "x", x, lora_A, lora_B)
        if seed is not None or type(scaling) is not float:
            check_options(refuse, "x", x, scaling, seed, dropout_p, ranks, r)

    @staticmethod
    def check_backward(
        grad: Tensor,
        x: Saved,
        weight: Saved,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor,
        h: Saved,
        seed: Seed,
        dropout_p: Floats,
        ranks: Ints,
        needs: Flags,
    ) -> None:
        """As `check`, for the operands of the gradients asked for."""
        refuse = functools.partial(dispatch.refuse, "lora_linear_backward")
        if len(needs) != 6:
            refuse("needs", list(needs), "6 flags")
        need_x, need_weight, _, need_A, need_B, need_scaling = needs
        N, K, r = check_low_rank(refuse, grad, lora_A, lora_B)
        check_devices(refuse, "grad", grad, lora_A=lora_A, lora_B=lora_B)
        check_adapters(refuse, "grad", grad, lora_A, lora_B)
        check_options(refuse, "grad", grad, scaling, seed, dropout_p, ranks, r)
        if need_A or need_weight:
            check_saved(refuse, "x", x, (*grad.shape[:-1], K), "grad", grad)
        if need_x:
            check_saved(refuse, "weight", weight, (N, K), "grad", grad)
        if need_B or need_scaling:
            check_saved(refuse, "h", h, (math.prod(grad.shape[:-1]), r), "lora_A", lora_A)

    forward = staticmethod(portable.forward)
    followed = staticmethod(portable.followed)
    backward = staticmethod(portable.backward)
    twin = staticmethod(differentiable.forward)
    twin_backward = staticmethod(differentiable.backward)

    @staticmethod
    def unneeded(x: Tensor, weight: Tensor, bias: Maybe, lora_A: Tensor, *_: Any) -> Tensor:
        return lora_A.new_empty(0)

    @staticmethod
    def shapes(x: Tensor, weight: Tensor, bias: Maybe, lora_A: Tensor, *options: Any) -> Pair:
        *_, save_h = options
        h_shape = (math.prod(x.shape[:-1]), lora_A.shape[0]) if save_h else (0,)
        return x.new_empty(*x.shape[:-1], weight.shape[0]), lora_A.new_empty(h_shape)

    @staticmethod
    def shapes_backward(
        grad: Tensor, x: Saved, weight: Saved, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, *options: Any
    ) -> list[Maybe]:
        *_, needs = options
        (r, K), N = lora_A.shape, lora_B.shape[0]
        grads = (
            (grad, (*grad.shape[:-1], K)),
            (grad, (N, K)),
            (grad, (N,)),
            (lora_A, (r, K)),
            (lora_B, (N, r)),
            (scaling, ()),
        )
        return [like.new_empty(shape) if need else None for (like, shape), need in zip(grads, needs, strict=True)]

    @staticmethod
    def cast(device_type: str, *arguments: Any) -> tuple[Any, ...]:
        dtype, casts = torch.get_autocast_dtype(device_type), (*HALF, torch.float32)
        operands, others = arguments[:5], arguments[5:]
        return *(t.to(dtype) if t is not None and t.dtype in casts else t for t in operands), *others

    @staticmethod
    def record(
        kernel: Callable[..., Any],
        needs: Flags,
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        *options: Any,
    ) -> tuple[Any, tuple[Maybe, ...], Any]:
        need_x, need_weight, _, need_A, need_B, need_scaling = needs
        need_h, options = need_B or need_scaling, options[:-1]
        results = kernel(x, weight, bias, lora_A, lora_B, scaling, *options, need_h)
        tensor, number = (scaling, None) if isinstance(scaling, Tensor) else (None, scaling)
        kept_x, kept_weight = savable(x) if need_A or need_weight else None, weight if need_x else None
        saved = kept_x, kept_weight, lora_A, lora_B, results[1] if need_h else None, tensor
        return results, saved, (number, options)


_operator = _LoRALinear()
define(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "float dropout_p=0.0, Tensor? seed=None) -> Tensor",
)
_ops = getattr(torch.ops, NAMESPACE)


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
    return _ops.lora_linear_forward(x, weight, bias, lora_A, lora_B, scaling, seed, dropout, (), False)[0]


implement("lora_linear", _public, "CompositeImplicitAutograd", "FuncTorchBatched")


@register_flop_formula(_ops.lora_linear_forward)
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
