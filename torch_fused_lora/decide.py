"""Whether a call of a LoRA layer of PEFT's is one that the operators compute, and of what.

All of it runs on every call of every layer. It reads modules and parameters from their dicts, since
nn.Module.__getattr__ takes a microsecond a name, and tests nothing twice.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from . import linear4bit
from .affine import Packed
from .ops.dispatch import BY_DISPATCHER, BY_TORCH, OWN_TYPES, Maybe, Route, autocast_enabled, route
from .ops.rows import DTYPES, HALF
from .originals import is_own, why_replaced
from .quantized import QuantLinear
from .torch_private import has_global_hook

# lora_A, lora_B, the bias of lora_B's module, scaling, probability of dropout
Adapter: TypeAlias = tuple[Tensor, Tensor, Maybe, Any, float]
# A call that the operators compute: its way; the weight, N x K or `Packed`, and bias of a plain base, or None for one
# that has to be called; the adapters; and whether x goes to their dtype first.
Call: TypeAlias = tuple[Route, tuple[Any, Maybe] | None, list[Adapter], bool]

DISABLED = "adapters are disabled"
MERGED = "adapters are merged"
TRACED = "the call is traced, exported or compiled"
INACTIVE = "none of the active adapters is this layer's"
ARGUMENTS = "extra arguments, as for a batch of several adapters"
GLOBAL_HOOKS = "hooks of all modules are registered"
NO_TENSOR = "x is no dense tensor"
PASSING = frozenset((DISABLED, MERGED, TRACED, INACTIVE, ARGUMENTS, GLOBAL_HOOKS, NO_TENSOR))  # of a call, not a layer
HOOKS = "hooks or a replaced forward"
SUBCLASS = "a tensor subclass"

_LINEAR, _DROPOUT, _IDENTITY, _LORA_LINEAR = nn.Linear, nn.Dropout, nn.Identity, lora.Linear  # read faster
_STRIDED, _FLOAT32 = torch.strided, torch.float32
_AUTOCAST = frozenset((*HALF, torch.float32))  # what autocast casts


def decide(layer: Any, x: Tensor, hooks_run: bool = False) -> Call | str:
    """What a patched layer's call with x is; or why PEFT's own forward has to run. ``hooks_run``: what is `around` the
    adapters' modules runs already."""
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    if has_global_hook():
        return GLOBAL_HOOKS
    if not isinstance(x, Tensor):
        return NO_TENSOR
    way = route(x)
    if way is BY_TORCH:
        return TRACED
    if way is BY_DISPATCHER and x.layout is not _STRIDED:
        return NO_TENSOR
    kind = type(layer)
    if called() != _OWN or kind._original.forward is not kind._forward:
        reason = "a function is replaced" if torch.compiler.is_dynamo_compiling() else why_replaced_for(layer)
        if reason:
            return reason
    base_layer, dtype = layer.__dict__["_modules"]["base_layer"], x.dtype
    base = plain_base(base_layer)
    autocast = way is BY_DISPATCHER and autocast_enabled(x.device.type)
    adapters: list[Adapter] = []
    adapter_dtype = None
    for name in layer.active_adapters:
        adapter = adapter_of(layer, name, hooks_run)
        if adapter is None:
            continue
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
        dtype_A, dtype_B = adapter[0].dtype, adapter[1].dtype
        if adapter_dtype is None:
            adapter_dtype = dtype_A
        elif dtype_A is not adapter_dtype and not autocast:
            return "adapters of several dtypes"
        if dtype_B is not adapter_dtype and not autocast:
            return f"lora_A is {adapter_dtype}, lora_B {dtype_B}"
    if adapter_dtype is None:
        return INACTIVE
    if base is not None and type(base[0]) is Packed and linear4bit.is_one(type(base_layer)):
        computed_in = base_layer.compute_dtype or dtype  # it may round what goes in and comes out
        if computed_in is not dtype or (autocast and dtype is not torch.get_autocast_dtype(x.device.type)):
            base = None
    if autocast:
        others = {dtype, *(weight.dtype for adapter in adapters for weight in adapter[:2])} - _AUTOCAST
        return f"{others.pop()} under autocast" if others else (way, base, adapters, False)
    cast = False
    if adapter_dtype is not dtype:
        if not layer.cast_input_dtype_enabled or adapter_dtype not in DTYPES or dtype not in DTYPES:
            return f"x is {dtype}, adapters are {adapter_dtype}, and PEFT does not cast"
        cast = adapter_dtype is not _FLOAT32 or dtype not in HALF  # else the operators convert what they read
    if cast or (base is not None and type(base[0]) is not Packed and base[0].dtype is not dtype):
        base = None
    return way, base, adapters, cast


def takes(y: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, autocast: bool) -> str | None:
    """Why the low-rank term cannot be added to what a base made of x, or None."""
    if type(y) not in OWN_TYPES or y is None or y.layout is not _STRIDED:
        return f"the base made a {type(y).__qualname__}"
    if y.shape[-1] != lora_B.shape[0] or y.shape[:-1] != x.shape[:-1]:
        return "the base's output is of another shape"
    on_cpu = y.is_cpu and x.is_cpu and lora_A.is_cpu and lora_B.is_cpu  # `device` takes three times as long
    if not on_cpu and not (y.device == x.device == lora_A.device == lora_B.device):
        return "the base's output, x and the adapters are on several devices"
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        return None if y.dtype in (dtype, _FLOAT32) else f"the base made {y.dtype} under autocast to {dtype}"
    if y.dtype is not x.dtype and not (y.dtype is _FLOAT32 and x.dtype in HALF):
        return f"the base made {y.dtype} of {x.dtype}"
    return None


def plain_base(base: Any) -> tuple[Any, Maybe] | None:
    """The weight and bias of a base that is nothing but a product; None where it has to be called."""
    kind = type(base)
    if kind is not _LINEAR and kind is not Conv1D and kind is not QuantLinear:
        read = bytes_of(base)
        return None if read is None or isinstance(read, str) else (read.packed, read.bias)
    found = _weight_and_bias(base.__dict__, False)
    if isinstance(found, str):
        return None
    if kind is _LINEAR:
        return found
    weight, bias = found
    return (base.packed, bias) if kind is QuantLinear else (weight.t(), bias)


def bytes_of(base: Any) -> linear4bit.Read | str | None:
    """What is read of a base of bitsandbytes', or why it has to be called; None for any other base."""
    if not linear4bit.is_one(type(base)):
        return None
    return HOOKS if _is_hooked(base.__dict__, False) else linear4bit.read(base)


def adapter_of(layer: Any, name: str, hooks_run: bool) -> Adapter | str | None:
    """An adapter of a layer; or why it cannot be fused; None if it is not the layer's."""
    modules = layer.__dict__["_modules"]
    A = modules["lora_A"].__dict__["_modules"].get(name)
    if A is None:
        return None
    B, dropout = modules["lora_B"].__dict__["_modules"][name], modules["lora_dropout"].__dict__["_modules"][name]
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}, not plain LoRA"
    if type(A) is not _LINEAR or type(B) is not _LINEAR:
        return f"adapter {name!r} is made of {type(A).__qualname__} and {type(B).__qualname__}, not of nn.Linear"
    p, of_dropout = 0.0, dropout.__dict__
    if type(dropout) is not _IDENTITY:
        if type(dropout) is not _DROPOUT or of_dropout["p"] >= 1:
            return f"adapter {name!r} has {dropout} for dropout, not nn.Dropout with p < 1"
        p = of_dropout["p"] if of_dropout["training"] else 0.0
    of_A, of_B = _weight_and_bias(A.__dict__, hooks_run), _weight_and_bias(B.__dict__, hooks_run)
    if isinstance(of_A, str) or isinstance(of_B, str):
        return f"adapter {name!r} has {of_A if isinstance(of_A, str) else of_B}"
    if _is_hooked(of_dropout, hooks_run):
        return f"adapter {name!r} has {HOOKS}"
    (lora_A, bias_A), (lora_B, bias_B), scaling = of_A, of_B, layer.scaling[name]
    if bias_A is not None:
        return f"adapter {name!r} has a bias in lora_A"
    if isinstance(scaling, Tensor) and scaling.dim():
        return f"adapter {name!r} has a scaling of shape {tuple(scaling.shape)}"
    return lora_A, lora_B, bias_B, scaling, p


def _weight_and_bias(fields: dict[str, Any], hooks_run: bool) -> tuple[Any, Any] | str:
    """The weight and bias, None for none, of a module with these fields; or why reading them would not do what calling
    the module does.

    FSDP1 puts plain views of its flat parameter in the parameters' place."""
    parameters = fields["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None:
        weight = fields.get("weight")
    if bias is None:
        bias = fields.get("bias")
    if type(weight) not in OWN_TYPES or type(bias) not in OWN_TYPES:
        name, value = ("bias", bias) if type(weight) in OWN_TYPES else ("weight", weight)
        return f"a {name} that is a {type(value).__qualname__}, {SUBCLASS}"
    if weight is not None and weight.layout is not _STRIDED:
        return f"a weight whose layout is {weight.layout}"
    return HOOKS if _is_hooked(fields, hooks_run) else (weight, bias)


def _is_hooked(fields: dict[str, Any], hooks_run: bool) -> bool:
    """Whether somebody wants to see a module called, or replaced its forward."""
    return bool(
        fields["_forward_hooks"]
        or fields["_forward_pre_hooks"]
        or fields["_backward_hooks"]
        or fields["_backward_pre_hooks"]
        or ("forward" in fields and not hooks_run)
    )


# ------------------------------------------------------------------------------------- what is replaced for the process

# What PEFT's own forward of a layer calls, by the class of module that calls it.
_CALLS: dict[type, list[tuple[Any, str]]] = {
    nn.Linear: [(nn.Linear, "forward"), (nn.Linear, "__call__"), (nn.Linear, "_call_impl"), (F, "linear")],
    nn.Dropout: [(nn.Dropout, "forward"), (nn.Dropout, "__call__"), (F, "dropout")],
    nn.Identity: [(nn.Identity, "forward"), (nn.Identity, "__call__")],
    Conv1D: [(Conv1D, "forward"), (Conv1D, "__call__"), (torch, "addmm")],
    QuantLinear: [(QuantLinear, "forward")],
    lora.Linear: [
        (lora.Linear, name)
        for name in ("forward", "_cast_input_dtype", "_check_forward_args", "disable_adapters", "merged")
    ],
}
_OWN = tuple(getattr(*call) if is_own(*call) else None for calls in _CALLS.values() for call in calls)


def called() -> tuple[Any, ...]:
    """What `_OWN` was when this package was imported, now."""
    return (
        _LINEAR.forward,
        _LINEAR.__call__,
        _LINEAR._call_impl,
        F.linear,
        _DROPOUT.forward,
        _DROPOUT.__call__,
        F.dropout,
        _IDENTITY.forward,
        _IDENTITY.__call__,
        Conv1D.forward,
        Conv1D.__call__,
        torch.addmm,
        QuantLinear.forward,
        _LORA_LINEAR.forward,
        _LORA_LINEAR._cast_input_dtype,
        _LORA_LINEAR._check_forward_args,
        _LORA_LINEAR.disable_adapters,
        _LORA_LINEAR.merged,
    )


def why_replaced_for(layer: Any) -> str | None:
    """Why a layer has to call what somebody replaced for the whole process, or None."""
    modules = layer.base_layer, *layer.lora_dropout.values()
    calls = [_CALLS.get(kind, ()) for kind in (lora.Linear, nn.Linear, *map(type, modules))]
    original = getattr(type(layer), "_original", type(layer))
    return why_replaced(dict.fromkeys([*itertools.chain.from_iterable(calls), (original, "forward")]))
