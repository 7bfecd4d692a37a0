"""`lora_linear` over a packed weight (`affine.py`), with its adapter or without, as one operator.

``lora_linear_quantized_forward(..., seed, dropout_p[], ranks[], bits, group_size, save_h) -> (y, h)``
    As ``lora_linear_forward``, with packed words, scales and biases in the place of the weight. With neither lora_A nor
    lora_B it is `quantized_linear`.
``lora_linear_quantized_backward(...) -> Tensor[]``
    Of the gradients of x, bias, lora_A, lora_B and scaling those asked for. What is packed has none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...affine import ENTRIES, SCALE_DTYPES, Packed, has_table, why_not
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
    route,
    savable,
)
from ..lora_linear import differentiable
from ..lora_linear.adapted import Adapted
from ..lora_linear.arguments import (
    call_options,
    check_adapters,
    check_devices,
    check_options,
    check_saved,
    check_types,
)
from ..rows import DTYPES, DTYPES_TEXT, HALF, cast, flat
from . import portable


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    group_size: int = 64,
) -> Tensor:
    """A linear layer over packed words: ``x Wᵀ + b``; as `lora_linear_quantized`, without an adapter."""
    check_types(0.0, x=x, weight=weight, scales=scales, biases=biases)
    return _call(x, Packed(weight, scales, biases, bits, group_size), bias, None, None, 1.0, 0.0)


def lora_linear_quantized(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    bits: int = 4,
    group_size: int = 64,
) -> Tensor:
    """`lora_linear` over a frozen weight in 4 or 8 bits: ``x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ``, where an element of
    W is its group's ``scale · q + bias``; or, as of bitsandbytes' NF4 and FP4, ``scale · table[q]``.

    Args:
        x: (..., K), 1-D or more, any strides; half, float32 or float64.
        weight: uint32 (N, K · bits / 32), the first element in the lowest bits, as `mlx.core.quantize` has it; or, with
            a table, uint8 (N, K / 2), the first element in the high bits, as bitsandbytes has it.
        scales, biases: (N, K / group_size), both float16, bfloat16 or float32, whatever x's dtype; with a table, which
            is given as biases, float32 (16,), the scales are float32.
        bias: (N,) of x's dtype, or None.
        lora_A, lora_B, scaling, dropout_p, training: as those of `lora_linear`.
        bits: 4 or 8, with a table 4. group_size: 32, 64 or 128, of which K is a multiple.

    Returns:
        (..., N) in x's dtype. W is formed in float32 (float64 for float64), and rounded to x's dtype where torch's own
        products read it, as the base product is before the low-rank term is added. On mps, and for up to 16 half
        rows without dropout on an NVIDIA GPU, base and low-rank term are rounded once, together.

    Differentiable twice in x, bias, lora_A, lora_B and scaling. Under autocast these are cast to its dtype, as in PEFT.
    W is never formed whole, but in graphs that hold without this package and under transforms of torch.func.

    Raises:
        TypeError: an argument is not a tensor (scaling: a tensor or a number).
        ValueError: a shape, dtype, device or format that does not fit; scales or biases that ask for a gradient; a
            sparse tensor; dropout_p outside [0, 1).
    """
    check_types(dropout_p, x=x, weight=weight, scales=scales, biases=biases, lora_A=lora_A, lora_B=lora_B)
    packed = Packed(weight, scales, biases, bits, group_size)
    return _call(x, packed, bias, lora_A, lora_B, scaling, dropout_p if training else 0.0)


def _call(
    x: Tensor, packed: Packed, bias: Maybe, lora_A: Maybe, lora_B: Maybe, scaling: float | Tensor, dropout_p: float
) -> Tensor:
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a Tensor or None, got {type(bias).__name__}")
    way, (*tensors, bits, group_size) = route(x), packed
    if way is dispatch.BY_TORCH:
        x, *_, bias, lora_A, lora_B = _operator.autocast(x, *tensors, bias, lora_A, lora_B)
        if not (x.is_nested or torch.jit.is_tracing()):  # whose shapes are no numbers
            _Quantized.check(x, *tensors, bias, lora_A, lora_B, 1.0, None, (), (), bits, group_size, False)
        y = F.linear(x, packed.dequantize(x.dtype), bias)
        if lora_A is None or lora_B is None:
            return y
        return differentiable.delta_by_torch(y, x, lora_A, lora_B, scaling, dropout_p)
    if not are_plain(*tensors, bias, lora_A, lora_B):
        way = dispatch.BY_DISPATCHER
    return lora_linear_quantized_stacked(x, packed, bias, lora_A, lora_B, scaling, (dropout_p,), way=way)


def lora_linear_quantized_stacked(
    x: Tensor,
    packed: Packed,
    bias: Maybe,
    lora_A: Maybe,
    lora_B: Maybe,
    scaling: float | Tensor,
    dropout_p: Floats = (),
    ranks: Ints = (),
    caller: str | None = None,
    way: Route | None = None,
    checked: bool = False,
) -> Tensor:
    """`lora_linear_quantized` for stacked adapters, as `lora_linear_stacked` is `lora_linear`."""
    if way is None:
        way = route(x)
    scaling, seed, dropout_p, ranks = call_options(x, way, scaling, dropout_p, ranks)
    *tensors, bits, group_size = packed
    inputs = (x, *tensors, bias, lora_A, lora_B, scaling)
    return _operator.call(way, caller, inputs, seed, dropout_p, ranks, bits, group_size, False, checked=checked)


class _Quantized(Adapted):
    name = "lora_linear_quantized"
    schemas = (
        "(Tensor x, Tensor weight, Tensor scales, Tensor biases, Tensor? bias, Tensor? lora_A, Tensor? lora_B, "
        "Tensor scaling, Tensor? seed, float[] dropout_p, SymInt[] ranks, int bits, int group_size, bool save_h) "
        "-> (Tensor, Tensor)",
        "(Tensor grad, Tensor? x, Tensor weight, Tensor scales, Tensor biases, Tensor? lora_A, Tensor? lora_B, "
        "Tensor scaling, Tensor? h, Tensor? seed, float[] dropout_p, SymInt[] ranks, int bits, int group_size, "
        "bool[] needs) -> Tensor[]",
    )
    inputs = 8
    operands = 6
    instead = "dequantise the model (torch_fused_lora.dequantize_)"

    @staticmethod
    def check(
        x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, bias: Maybe, lora_A: Maybe, lora_B: Maybe, *rest: Any
    ) -> None:
        """Raise ValueError, naming the argument, its shape and what was expected, unless the operands fit together."""
        refuse = functools.partial(dispatch.refuse, "lora_linear_quantized")
        *options, bits, group_size, _ = rest
        if x.dtype not in DTYPES:
            refuse("x", x, DTYPES_TEXT)
        N, K = _check_packed(refuse, weight, scales, biases, bits, group_size)
        if x.dim() < 1 or x.shape[-1] != K:
            refuse("x", x, f"shape (..., {K}), since weight is ({N}, {K}) in {bits} bits")
        if bias is not None and (bias.shape != (N,) or bias.dtype is not x.dtype):
            refuse("bias", bias, f"shape ({N},), x's dtype {x.dtype}")
        check_devices(refuse, "x", x, weight=weight, scales=scales, biases=biases, bias=bias)
        _check_adapter(refuse, "x", x, N, K, lora_A, lora_B, *options)

    @staticmethod
    def check_backward(
        grad: Tensor,
        x: Saved,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor,
        lora_A: Maybe,
        lora_B: Maybe,
        scaling: Tensor,
        h: Saved,
        *rest: Any,
    ) -> None:
        """As `check`, for the operands of the gradients asked for."""
        refuse = functools.partial(dispatch.refuse, "lora_linear_quantized_backward")
        *options, bits, group_size, needs = rest
        if len(needs) != 5:
            refuse("needs", list(needs), "5 flags")
        if grad.dtype not in DTYPES:
            refuse("grad", grad, DTYPES_TEXT)
        N, K = _check_packed(refuse, weight, scales, biases, bits, group_size)
        if grad.dim() < 1 or grad.shape[-1] != N:
            refuse("grad", grad, f"shape (..., {N}), since weight is ({N}, {K}) in {bits} bits")
        check_devices(refuse, "grad", grad, weight=weight, scales=scales, biases=biases)
        _check_adapter(refuse, "grad", grad, N, K, lora_A, lora_B, scaling, *options)
        if lora_A is None:
            if any(needs[2:]):
                refuse("needs", list(needs), "none of lora_A's, lora_B's and scaling's, since there is no lora_A")
            return
        if needs[2]:
            check_saved(refuse, "x", x, (*grad.shape[:-1], K), "grad", grad)
        if needs[3] or needs[4]:
            check_saved(refuse, "h", h, (math.prod(grad.shape[:-1]), lora_A.shape[0]), "lora_A", lora_A)

    forward = staticmethod(portable.forward)
    backward = staticmethod(portable.backward)

    @staticmethod
    def twin(
        x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, bias: Maybe, lora_A: Saved, lora_B: Saved, *rest: Any
    ) -> Pair:
        scaling, seed, dropout_p, ranks, bits, group_size, save_h = rest
        whole = Packed(weight, scales, biases, bits, group_size).dequantize(x.dtype)
        if lora_A is None:
            return F.linear(x, whole, bias), x.new_empty(0)
        return differentiable.forward(x, whole, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)

    @staticmethod
    def twin_backward(
        grad: Tensor,
        grad_h: Maybe,
        x: Saved,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor,
        lora_A: Saved,
        lora_B: Saved,
        *rest: Any,
    ) -> tuple[Maybe, ...]:
        scaling, h, seed, dropout_p, ranks, bits, group_size, needs = rest
        whole = Packed(weight, scales, biases, bits, group_size).dequantize(grad.dtype)
        if lora_A is None:
            grad_x, grad_bias = grad @ whole if needs[0] else None, flat(grad).sum(0) if needs[1] else None
            return portable.with_packed(grad_x, grad_bias, None, None, None)
        needs = needs[0], False, *needs[1:]
        grad_x, _, *others = differentiable.backward(
            grad, grad_h, x, whole, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs
        )
        return portable.with_packed(grad_x, *others)

    @staticmethod
    def unneeded(x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, bias: Maybe, lora_A: Maybe, *_: Any) -> Any:
        return (x if lora_A is None else lora_A).new_empty(0)

    @staticmethod
    def shapes(
        x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, bias: Maybe, lora_A: Saved, *rest: Any
    ) -> Pair:
        *_, save_h = rest
        like = x if lora_A is None else lora_A
        h_shape = (math.prod(x.shape[:-1]), lora_A.shape[0]) if save_h and lora_A is not None else (0,)
        return x.new_empty(*x.shape[:-1], weight.shape[0]), like.new_empty(h_shape)

    @staticmethod
    def shapes_backward(
        grad: Tensor, x: Saved, weight: Tensor, scales: Tensor, biases: Tensor, *rest: Any
    ) -> list[Maybe]:
        lora_A, lora_B, scaling, *_, group_size, needs = rest
        K = scales.shape[1] * group_size
        grads: list[Any] = [(grad, (*grad.shape[:-1], K)), (grad, weight.shape[:1])]
        grads += [(like, None if like is None else like.shape) for like in (lora_A, lora_B, scaling)]
        return [like.new_empty(shape) if need else None for (like, shape), need in zip(grads, needs, strict=True)]

    @staticmethod
    def cast(device_type: str, *arguments: Any) -> tuple[Any, ...]:
        dtype, casts = torch.get_autocast_dtype(device_type), (*HALF, torch.float32)
        x, *packed, bias, lora_A, lora_B = arguments[:7]
        x, bias, lora_A, lora_B = (
            cast(t, dtype) if t is not None and t.dtype in casts else t for t in (x, bias, lora_A, lora_B)
        )
        return x, *packed, bias, lora_A, lora_B, *arguments[7:]

    @staticmethod
    def record(
        kernel: Callable[..., Any], needs: Flags, x: Tensor, *arguments: Any
    ) -> tuple[Any, tuple[Maybe, ...], Any]:
        *packed, _, lora_A, lora_B, scaling = arguments[:7]
        options = arguments[7:-1]
        for name, value, need in zip(("weight", "scales", "biases"), packed, needs[1:4], strict=True):
            if need:
                dispatch.refuse("lora_linear_quantized", name, value, "one that asks for no gradient")
        need_A, need_B, need_scaling = needs[5:]
        need_h = lora_A is not None and (need_B or need_scaling)
        results = kernel(x, *arguments[:-1], need_h)
        tensor, number = (scaling, None) if isinstance(scaling, Tensor) else (None, scaling)
        adapter = lora_A, lora_B, results[1] if need_h else None, tensor
        saved = savable(x) if need_A else None, *packed, *adapter
        return results, saved, (number, options)

    @staticmethod
    def restore(saved: Any, rest: Any, needs: Flags, anew: bool) -> tuple[Any, ...]:
        lora_A = saved[4]
        its_needs = needs[0], *needs[4:7], needs[7] and lora_A is not None
        return Adapted.restore(saved, rest, its_needs, anew)

    def gradients(self, grad: Tensor, arguments: tuple[Any, ...], needs: Flags) -> Sequence[Maybe]:
        return super().gradients(grad, arguments, portable.with_packed(*arguments[-1]))


def _check_packed(
    refuse: Callable[..., NoReturn], weight: Tensor, scales: Tensor, biases: Tensor, bits: int, group_size: int
) -> tuple[int, int]:
    """N and K of a weight in a format that is supported."""
    if (unsupported := why_not(bits, group_size)) is not None:
        refuse(*unsupported)
    if has_table(weight):
        if bits != 4:
            refuse("bits", bits, "4, since weight is torch.uint8")
        if weight.dim() != 2 or weight.shape[1] * 2 % group_size:
            refuse("weight", weight, f"shape (N, K / 2), K a multiple of {group_size}")
        N, K = weight.shape[0], weight.shape[1] * 2
        if scales.shape != (N, K // group_size) or scales.dtype is not torch.float32:
            refuse("scales", scales, f"shape ({N}, {K // group_size}), torch.float32, since weight is torch.uint8")
        if biases.shape != (ENTRIES,) or biases.dtype is not torch.float32:
            refuse("biases", biases, f"a table of shape ({ENTRIES},), torch.float32, since weight is torch.uint8")
        return N, K
    if weight.dtype is not torch.uint32 or weight.dim() != 2 or weight.shape[1] * 32 // bits % group_size:
        refuse("weight", weight, f"shape (N, K * {bits} / 32), torch.uint32, K a multiple of {group_size}")
    N, K = weight.shape[0], weight.shape[1] * 32 // bits
    if scales.shape != (N, K // group_size) or scales.dtype not in SCALE_DTYPES:
        refuse("scales", scales, f"shape ({N}, {K // group_size}), float16, bfloat16 or float32")
    if biases.shape != scales.shape or biases.dtype is not scales.dtype:
        refuse("biases", biases, f"shape {tuple(scales.shape)}, scales' dtype {scales.dtype}")
    return N, K


def _check_adapter(
    refuse: Callable[..., NoReturn],
    name: str,
    like: Tensor,
    N: int,
    K: int,
    lora_A: Maybe,
    lora_B: Maybe,
    scaling: float | Tensor,
    seed: Seed,
    dropout_p: Floats,
    ranks: Ints,
) -> None:
    if lora_A is None or lora_B is None:
        if lora_A is not lora_B or seed is not None:
            refuse("lora_A", lora_A, "both of lora_A and lora_B, or neither and no seed")
        return
    if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] < 1:
        refuse("lora_A", lora_A, f"shape (r, {K}) with r >= 1, since weight is ({N}, {K})")
    r = lora_A.shape[0]
    if lora_B.shape != (N, r):
        refuse("lora_B", lora_B, f"shape ({N}, {r}), since weight is ({N}, {K}) and lora_A ({r}, {K})")
    check_devices(refuse, name, like, lora_A=lora_A, lora_B=lora_B)
    check_adapters(refuse, name, like, lora_A, lora_B)
    check_options(refuse, name, like, scaling, seed, dropout_p, ranks, r)


_operator = _Quantized()
_ops = getattr(torch.ops, NAMESPACE)


@register_flop_formula(_ops.lora_linear_quantized_forward)
def _forward_flops(x_shape: Ints, weight_shape: Ints, *others: Any, **_: Any) -> int:
    A_shape = others[3]
    M, K, N, r = math.prod(x_shape[:-1]), x_shape[-1], weight_shape[0], A_shape[0] if A_shape else 0
    return 2 * M * (N * K + r * (K + N))


@register_flop_formula(_ops.lora_linear_quantized_backward)
def _backward_flops(grad_shape: Ints, x_shape: Any, weight_shape: Ints, *rest: Any, **_: Any) -> int:
    """Of dY W, and of z = dY B, z A, zᵀ x̃ and dYᵀ h."""
    scales_shape, A_shape, group_size, (need_x, _bias, need_A, need_B, need_scaling) = rest[0], rest[2], *rest[-2:]
    M, (N, groups), r = math.prod(grad_shape[:-1]), scales_shape, A_shape[0] if A_shape else 0
    K = groups * group_size
    per_rank = (need_x or need_A) * N + (need_x + need_A) * K + (need_B or need_scaling) * N
    return 2 * M * (need_x * N * K + r * per_rank)
