"""``y + s · dropout(x) Aᵀ Bᵀ`` as one operator with its own backward: `lora_linear` for a base of any kind.

``lora_delta(y, x, lora_A, lora_B, scaling, dropout_p=0, seed=None) -> y``
    The public one: ``lora_delta_forward`` for one adapter, without the rank-r product.
``lora_delta_forward(..., seed, dropout_p[], ranks[], save_h) -> (y, h)``
    As ``lora_linear_forward``, with y in the place of weight and bias. The result is fresh, y is left as it is.
``lora_delta_backward(...) -> Tensor[]``
    Of the gradients of x, lora_A, lora_B and scaling those asked for. y's is the output's.

The kernels are lora_linear's, without its base product.
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
    are_plain,
    define,
    implement,
    route,
    savable,
)
from ..lora_linear import differentiable, portable
from ..lora_linear.adapted import Adapted
from ..lora_linear.arguments import (
    call_options,
    check_adapters,
    check_devices,
    check_low_rank,
    check_options,
    check_types,
)
from ..rows import DTYPES, DTYPES_TEXT, HALF, cast, flat, packed, unflat


def lora_delta(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Add a low-rank adapter's term to a layer's output: ``y + scaling · dropout(x) Aᵀ Bᵀ`` (LoRA, arXiv:2106.09685).

    For a base of any kind, quantised or sharded or somebody's own; over a plain weight `lora_linear` does less work.

    Args:
        y: (..., N), what the base made of x. Of x's dtype, or float32 over a half x.
        x: (..., K), 1-D or more, any strides; half, float32 or float64.
        lora_A: (r, K) and lora_B: (N, r), r >= 1: both of x's dtype, or both float32 over a half-precision x.
        scaling: a number or a 0-dim floating tensor on the CPU or x's device; a tensor may ask for a gradient.
        dropout_p: probability in [0, 1) that an element of x is dropped on its way into lora_A.
        training: dropout is active only when True.

    Returns:
        (..., N) in y's dtype, contiguous and no alias of y. The term is formed in float32 (float64 for float64) where
        the adapters are float32, and the sum is rounded once.

    Differentiable twice in every tensor argument, scaling included; saves x itself, the small tensors and one (M, r)
    product for backward, never y or a mask. Under autocast x and the adapters are cast to its dtype, and y unless it is
    float32.

    Raises:
        TypeError: an argument is not a tensor (scaling: a tensor or a number).
        ValueError: a shape, dtype or device that does not fit; a sparse tensor; dropout_p outside [0, 1).
    """
    check_types(dropout_p, y=y, x=x, lora_A=lora_A, lora_B=lora_B)
    way = route(x)
    if way is dispatch.BY_TORCH:
        y, x, lora_A, lora_B = _operator.autocast(y, x, lora_A, lora_B)
        if not (x.is_nested or torch.jit.is_tracing()):  # whose shapes are no numbers
            _LoRADelta.check(y, x, lora_A, lora_B, 1.0, None, (), (), False)
        return differentiable.delta_by_torch(y, x, lora_A, lora_B, scaling, dropout_p if training else 0.0)
    if not are_plain(y, lora_A, lora_B):
        way = dispatch.BY_DISPATCHER
    return lora_delta_stacked(y, x, lora_A, lora_B, scaling, (dropout_p,) if training else (), way=way)


def lora_delta_stacked(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: Floats = (),
    ranks: Ints = (),
    caller: str | None = None,
    way: Route | None = None,
    checked: bool = False,
) -> Tensor:
    """`lora_delta` for stacked adapters, as `lora_linear_stacked` is `lora_linear`."""
    if way is None:
        way = route(x)
    scaling, seed, dropout_p, ranks = call_options(x, way, scaling, dropout_p, ranks)
    inputs = (y, x, lora_A, lora_B, scaling)
    return _operator.call(way, caller, inputs, seed, dropout_p, ranks, False, checked=checked)


class _LoRADelta(Adapted):
    name = "lora_delta"
    schemas = (
        "(Tensor y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? seed, float[] dropout_p, "
        "SymInt[] ranks, bool save_h) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? h, Tensor? seed, "
        "float[] dropout_p, SymInt[] ranks, bool[] needs) -> Tensor[]",
    )
    inputs = 5
    operands = 3
    adds_to_first = True
    instead = "leave the model unpatched (torch_fused_lora.unpatch_peft)"

    @staticmethod
    def check(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *rest: Any) -> None:
        """Raise ValueError, naming the argument, its shape and what was expected, unless the operands fit together."""
        refuse = functools.partial(dispatch.refuse, "lora_delta")
        if x.dtype not in DTYPES:
            refuse("x", x, DTYPES_TEXT)
        if x.dim() < 1:
            refuse("x", x, "shape (..., K)")
        K = x.shape[-1]
        if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] < 1:
            refuse("lora_A", lora_A, f"shape (r, {K}) with r >= 1, since x is {tuple(x.shape)}")
        r = lora_A.shape[0]
        if lora_B.dim() != 2 or lora_B.shape[1] != r:
            refuse("lora_B", lora_B, f"shape (N, {r}), since lora_A is ({r}, {K})")
        shape = *x.shape[:-1], lora_B.shape[0]
        if y.shape != shape:
            refuse("y", y, f"shape {shape}, since x is {tuple(x.shape)} and lora_B {tuple(lora_B.shape)}")
        if y.dtype is not x.dtype and not (y.dtype is torch.float32 and x.dtype in HALF):
            refuse("y", y, f"x's dtype {x.dtype}" + (" or torch.float32" if x.dtype in HALF else ""))
        check_devices(refuse, "x", x, y=y, lora_A=lora_A, lora_B=lora_B)
        check_adapters(refuse, "x", x, lora_A, lora_B)
        scaling, seed, dropout_p, ranks, _ = rest
        check_options(refuse, "x", x, scaling, seed, dropout_p, ranks, r)

    @staticmethod
    def check_backward(
        grad: Tensor, x: Saved, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, h: Saved, *rest: Any
    ) -> None:
        """As `check`, for the operands of the gradients asked for."""
        refuse = functools.partial(dispatch.refuse, "lora_delta_backward")
        seed, dropout_p, ranks, needs = rest
        if len(needs) != 4:
            refuse("needs", list(needs), "4 flags")
        _, need_A, need_B, need_scaling = needs
        _, K, r = check_low_rank(refuse, grad, lora_A, lora_B)
        widened = grad.dtype is torch.float32  # y was float32, x and the adapters may be half
        if lora_A.dtype in HALF and widened:
            check_adapters(refuse, "lora_A", lora_A, lora_A, lora_B)
        else:
            check_adapters(refuse, "grad", grad, lora_A, lora_B)
        x_shape, h_shape = (*grad.shape[:-1], K), (math.prod(grad.shape[:-1]), r)
        if need_A and (x is None or x.shape != x_shape or not (x.dtype is grad.dtype or (widened and x.dtype in HALF))):
            refuse("x", x, f"shape {x_shape}, grad's dtype {grad.dtype}" + (" or a half one" if widened else ""))
        if (need_B or need_scaling) and (h is None or h.shape != h_shape or h.dtype is not lora_A.dtype):
            refuse("h", h, f"shape {h_shape}, lora_A's dtype {lora_A.dtype}")
        given = {"x": x if need_A else None, "h": h if need_B or need_scaling else None}
        check_devices(refuse, "grad", grad, lora_A=lora_A, lora_B=lora_B, **given)
        check_options(refuse, "grad", grad, scaling, seed, dropout_p, ranks, r)

    @staticmethod
    def forward(y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Maybe]:
        out = y.clone(memory_format=torch.contiguous_format)
        if x.is_cpu:
            (x,) = packed(flat(x))
        return out, portable.add_delta_(out, x, *rest)

    @staticmethod
    def backward(grad: Tensor, x: Saved, *rest: Any) -> tuple[Maybe, ...]:
        rows, x_rows = packed(flat(grad), None if x is None else flat(x)) if grad.is_cpu else (grad, x)
        grad_x, *others = portable.low_rank_backward(rows, x_rows, None, None, *rest)
        return None if grad_x is None else unflat(grad_x, grad), *others

    twin = staticmethod(differentiable.delta_forward)
    twin_backward = staticmethod(differentiable.delta_backward)

    @staticmethod
    def unneeded(y: Tensor, x: Tensor, lora_A: Tensor, *_: Any) -> Tensor:
        return lora_A.new_empty(0)

    @staticmethod
    def shapes(y: Tensor, x: Tensor, lora_A: Tensor, *options: Any) -> Pair:
        *_, save_h = options
        h_shape = (math.prod(x.shape[:-1]), lora_A.shape[0]) if save_h else (0,)
        return y.new_empty(y.shape), lora_A.new_empty(h_shape)

    @staticmethod
    def shapes_backward(
        grad: Tensor, x: Saved, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, *options: Any
    ) -> list[Maybe]:
        *_, needs = options
        grads = (grad, (*grad.shape[:-1], lora_A.shape[1])), *((like, like.shape) for like in (lora_A, lora_B, scaling))
        return [like.new_empty(shape) if need else None for (like, shape), need in zip(grads, needs, strict=True)]

    @staticmethod
    def cast(device_type: str, *arguments: Any) -> tuple[Any, ...]:
        dtype, casts = torch.get_autocast_dtype(device_type), (*HALF, torch.float32)
        y, *operands = arguments[:4]
        cast_operands = [cast(t, dtype) if t.dtype in casts else t for t in operands]
        return cast(y, dtype) if y.dtype in HALF else y, *cast_operands, *arguments[4:]

    @staticmethod
    def record(
        kernel: Callable[..., Any],
        needs: Flags,
        y: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        *options: Any,
    ) -> tuple[Any, tuple[Maybe, ...], Any]:
        _, _, need_A, need_B, need_scaling = needs
        need_h, options = need_B or need_scaling, options[:-1]
        results = kernel(y, x, lora_A, lora_B, scaling, *options, need_h)
        tensor, number = (scaling, None) if isinstance(scaling, Tensor) else (None, scaling)
        saved = savable(x) if need_A else None, lora_A, lora_B, results[1] if need_h else None, tensor
        return results, saved, (number, options)


_operator = _LoRADelta()
define(
    "lora_delta",
    "(Tensor y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, float dropout_p=0.0, Tensor? seed=None) "
    "-> Tensor",
)
_ops = getattr(torch.ops, NAMESPACE)


def _public(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Tensor, p: float = 0.0, seed: Maybe = None) -> Tensor:
    if p > 0 and seed is None:
        raise ValueError(f"seed: dropout_p={p} needs a 0-dim int64 CPU tensor, got None")
    return _ops.lora_delta_forward(y, x, A, B, scaling, seed, () if seed is None else (p,), (), False)[0]


implement("lora_delta", _public, "CompositeImplicitAutograd", "FuncTorchBatched")


@register_flop_formula(_ops.lora_delta_forward)
def _forward_flops(y_shape: Ints, x_shape: Ints, A_shape: Ints, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape[:-1]) * A_shape[0] * (x_shape[-1] + y_shape[-1])


@register_flop_formula(_ops.lora_delta_backward)
def _backward_flops(grad_shape: Ints, x_shape: Any, A_shape: Ints, B_shape: Ints, *options: Any, **_: Any) -> int:
    """Of z = dY B, z A, zᵀ x̃ and dYᵀ h."""
    M, (r, K), N = math.prod(grad_shape[:-1]), A_shape, B_shape[0]
    need_x, need_A, need_B, need_scaling = options[-1]
    return 2 * M * r * ((need_x or need_A) * N + (need_x + need_A) * K + (need_B or need_scaling) * N)
