"""bitsandbytes' Linear4bit on mps: its packed bytes as the operators take them. Elsewhere, and where these cannot be
read as they lie, it is called like any other base."""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .affine import ENTRIES, GROUP_SIZES, Packed
from .ops.dispatch import OWN_TYPES, Maybe
from .ops.lora_linear_quantized.operator import lora_linear_quantized_stacked
from .originals import is_own

_NAMES = ("Linear4bit", "LinearNF4", "LinearFP4")


class Read(NamedTuple):
    """A layer's weight and bias. ``dtype``: what x is cast to and multiplied in, if it is; ``stored``: what the weight
    is rounded to by bitsandbytes' own backward."""

    packed: Packed
    bias: Maybe
    dtype: torch.dtype | None
    stored: torch.dtype


def is_one(kind: type) -> bool:
    """Whether a class is bitsandbytes' own Linear4bit, and no subclass of somebody else's."""
    return kind.__module__ == "bitsandbytes.nn.modules" and kind.__name__ in _NAMES


@functools.cache
def _own_forward(kind: Any) -> Any:
    return kind.forward if is_own(kind, "forward") else None


def read(layer: Any) -> Read | str:
    """What a layer multiplies by; or why it has to be called."""
    if torch.compiler.is_compiling():
        return "the call is compiled"
    fields: dict[str, Any] = layer.__dict__
    kind: Any = type(layer)
    weight, bias = (fields["_parameters"].get(name) for name in ("weight", "bias"))
    state = getattr(weight, "quant_state", None)
    if state is None or not weight.is_mps:
        return "its weight is not quantised on mps"
    if weight.is_inference() or state.absmax.is_inference():
        return "its weight was made under inference mode"
    if kind.forward is not _own_forward(kind):
        return "its forward is replaced for the whole process"
    if not fields["compute_type_is_set"]:
        return "its first call sets its compute_dtype"
    dtype = fields["compute_dtype"]
    if type(bias) not in OWN_TYPES or not (bias is None or dtype is None or bias.dtype is dtype):
        return f"its next call casts its bias to {dtype}"
    if getattr(state, "packing_format_for_cpu", False):
        return "its bytes are in an order for CPUs"
    N, K = layer.out_features, layer.in_features
    if tuple(state.shape) != (N, K) or state.blocksize not in GROUP_SIZES or K % state.blocksize:
        return f"a row of {K} elements is no whole number of blocks of 32, 64 or 128: {state.blocksize}"
    if state.code.shape != (ENTRIES,) or not (state.code.is_mps and state.absmax.is_mps):
        return f"a table of {state.code.numel()} entries on {state.code.device}, absmax on {state.absmax.device}"
    return Read(_packed(weight, state, N), bias, dtype, state.dtype)


def product(found: Read, x: Tensor) -> Tensor:
    """``x Wᵀ + b`` as the layer's own forward rounds it: in its dtype, and to x's."""
    rows = x if found.dtype is None else x.to(found.dtype)
    return lora_linear_quantized_stacked(rows, found.packed, found.bias, None, None, 1.0).to(x.dtype)


# By absmax, which a layer that is moved or loaded anew gets another of: its version, and what was made of it.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _packed(weight: Tensor, state: Any, N: int) -> Packed:
    """The bytes as they lie, with absmax in float32. (`.data`, as a view would keep alive what it is a view of.)"""
    absmax = state.absmax
    version, packed = _known.get(absmax, (None, None))
    if version != absmax._version or packed.words.data_ptr() != weight.data_ptr():
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be saved for a backward
            scales = absmax.data
            if state.nested:
                functional = sys.modules["bitsandbytes.functional"]
                scales = functional.dequantize_blockwise(absmax, state.state2) + state.offset
            words = weight.data.view(torch.uint8).view(N, -1)
            packed = Packed(words, scales.float().view(N, -1), state.code.data.float(), 4, state.blocksize)
        _known[absmax] = absmax._version, packed
    return packed
