"""Put the operator under the LoRA layers of a PEFT model, in place, and take it away again.

PEFT has no hook for a layer of a model that is already built, so a layer's class is swapped: `Linear` below is
`peft.tuners.lora.Linear` with another `forward` and no state of its own but a name for errors. Everything else
(state_dict, merging, adding, switching and deleting adapters, pickles) stays PEFT's.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from peft.tuners import lora
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(
        "torch_fused_lora.patch_peft needs PEFT: pip install 'torch-fused-lora[peft]' (or pip install peft)"
    ) from error

from .ops.dispatch import BY_DISPATCHER, BY_TORCH, OWN_TYPES, Maybe, Route, autocast_enabled, route
from .ops.lora_linear.operator import lora_linear_stacked
from .ops.rows import HALF
from .originals import Patched, is_own, patch, switched_off, unpatch, why_replaced
from .report import PatchReport
from .torch_private import has_global_hook


class Linear(Patched, lora.Linear):
    """`peft.tuners.lora.Linear` whose plain LoRA forward is one operator. The name is PEFT's: it shows in repr."""

    _original = lora.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, Linear):  # undone while a wrapper still holds this method
            return type(self).forward(self, x, *args, **kwargs)
        call = None if args or kwargs else _fused_call(self, x)
        if call is None:
            return super().forward(x, *args, **kwargs)
        way, weight, bias, adapters = call
        if self._copy_input and torch.is_grad_enabled():
            x = x.clone()
        name = self._patched_name
        if len(adapters) == 1:
            lora_A, lora_B, lora_bias, scaling, p = adapters[0]
            if lora_bias is None:
                dropouts = (p,) if p else _NO_DROPOUT
                return lora_linear_stacked(x, weight, bias, lora_A, lora_B, scaling, dropouts, (), name, way, True)
        for _, _, lora_bias, scaling, _ in adapters:
            if lora_bias is not None:  # over a half base it joins the base product's rounding
                lora_bias = lora_bias * scaling
                bias = (lora_bias if bias is None else bias + lora_bias).to(weight.dtype)
        lora_A = torch.cat([lora_A for lora_A, *_ in adapters])
        lora_B = torch.cat([lora_B * scaling for _, lora_B, _, scaling, _ in adapters], 1)
        ranks = [lora_A.shape[0] for lora_A, *_ in adapters]
        dropouts = tuple(p for *_, p in adapters)
        return lora_linear_stacked(x, weight, bias, lora_A, lora_B, 1.0, dropouts, ranks, name, way, True)


# lora_A, lora_B, the bias of lora_B's module, scaling, probability of dropout
_Adapter: TypeAlias = tuple[Tensor, Tensor, Maybe, Any, float]


# What follows runs on every call of every layer. It reads modules and parameters from their dicts, since
# nn.Module.__getattr__ takes a microsecond a name, and tests nothing twice.


def _fused_call(layer: lora.Linear, x: Tensor) -> tuple[Route, Tensor, Maybe, list[_Adapter]] | None:
    """The route, weight, bias and active adapters, if one call of the operator covers them; None if PEFT's own forward
    has to run."""
    if layer._disable_adapters or layer.merged_adapters or not layer.cast_input_dtype_enabled or has_global_hook():
        return None
    if not isinstance(x, Tensor) or (way := route(x)) is BY_TORCH:
        return None
    if _called() != _OWN and (torch.compiler.is_dynamo_compiling() or _why_replaced(layer)):
        return None
    modules = layer._modules
    base = _base(modules["base_layer"])
    if isinstance(base, str):
        return None
    weight, bias = base
    dtype = x.dtype
    autocast = False
    if way is BY_DISPATCHER:
        autocast = autocast_enabled(x.device.type)
        if x.layout is not torch.strided:
            return None
    if dtype is torch.float64 if autocast else weight.dtype is not dtype:
        return None
    all_A, all_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    all_dropouts = modules["lora_dropout"]._modules
    adapters: list[_Adapter] = []
    adapter_dtype = None
    for name in layer.active_adapters:
        if name not in all_A:
            continue
        adapter = _adapter(layer, name, all_A[name], all_B[name], all_dropouts[name])
        if isinstance(adapter, str):
            return None
        adapters.append(adapter)
        if autocast:
            continue
        if adapter_dtype is None:
            adapter_dtype = adapter[0].dtype
            if adapter_dtype is not dtype and (adapter_dtype is not _FLOAT32 or dtype not in HALF):
                return None
        elif adapter[0].dtype is not adapter_dtype:
            return None
        if adapter[1].dtype is not adapter_dtype:
            return None
    return (way, weight, bias, adapters) if adapters else None


def _base(base: nn.Module) -> tuple[Any, Any] | str:
    """The weight, N x K, and bias of a base layer; or why no call of a layer over it can be fused."""
    if type(base) is not _LINEAR and type(base) is not Conv1D:
        return f"base layer is a {type(base).__module__}.{type(base).__qualname__}, not exactly nn.Linear or Conv1D"
    found = _weight_and_bias(base)
    if isinstance(found, str):
        return f"base layer has {found}"
    return found if type(base) is _LINEAR else (found[0].t(), found[1])


def _adapter(layer: lora.Linear, name: str, A: nn.Module, B: nn.Module, dropout: nn.Module) -> _Adapter | str:
    """An adapter of a layer; or why it cannot be fused."""
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}, not plain LoRA"
    if type(A) is not _LINEAR or type(B) is not _LINEAR:
        return f"adapter {name!r} is made of {type(A).__qualname__} and {type(B).__qualname__}, not of nn.Linear"
    p = 0.0
    if type(dropout) is not _IDENTITY:
        if type(dropout) is not _DROPOUT or dropout.p >= 1:
            return f"adapter {name!r} has {dropout} for dropout, not nn.Dropout with p < 1"
        p = dropout.p if dropout.training else 0.0
    of_A, of_B, of_dropout = _weight_and_bias(A), _weight_and_bias(B), _weight_and_bias(dropout)
    if isinstance(of_A, str) or isinstance(of_B, str) or isinstance(of_dropout, str):
        return f"adapter {name!r} has {next(found for found in (of_A, of_B, of_dropout) if isinstance(found, str))}"
    return of_A[0], of_B[0], of_B[1], layer.scaling[name], p


# What PEFT's own forward of a layer calls, by the class of module that calls it.
_CALLS: dict[type, list[tuple[Any, str]]] = {
    nn.Linear: [(nn.Linear, "forward"), (nn.Linear, "__call__"), (nn.Linear, "_call_impl"), (F, "linear")],
    nn.Dropout: [(nn.Dropout, "forward"), (nn.Dropout, "__call__"), (F, "dropout")],
    nn.Identity: [(nn.Identity, "forward"), (nn.Identity, "__call__")],
    Conv1D: [(Conv1D, "forward"), (Conv1D, "__call__"), (torch, "addmm")],
    lora.Linear: [
        (lora.Linear, name)
        for name in ("forward", "_cast_input_dtype", "_check_forward_args", "disable_adapters", "merged")
    ],
}
_OWN = tuple(getattr(*call) if is_own(*call) else None for calls in _CALLS.values() for call in calls)
_LINEAR, _DROPOUT, _IDENTITY, _LORA_LINEAR = nn.Linear, nn.Dropout, nn.Identity, lora.Linear  # read faster


def _called() -> tuple[Any, ...]:
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
        _LORA_LINEAR.forward,
        _LORA_LINEAR._cast_input_dtype,
        _LORA_LINEAR._check_forward_args,
        _LORA_LINEAR.disable_adapters,
        _LORA_LINEAR.merged,
    )


def _why_replaced(layer: lora.Linear) -> str | None:
    """Why a layer has to call what somebody replaced for the whole process, or None."""
    modules = layer.base_layer, *layer.lora_dropout.values()
    calls = (_CALLS.get(kind, ()) for kind in (lora.Linear, nn.Linear, *map(type, modules)))
    return why_replaced(dict.fromkeys(itertools.chain.from_iterable(calls)))


_NO_DROPOUT: tuple[float, ...] = ()
_STRIDED, _FLOAT32 = torch.strided, torch.float32  # read faster


def _weight_and_bias(module: nn.Module) -> tuple[Any, Any] | str:
    """A module's weight and bias, None for none; or why reading them would not do what calling the module does.

    FSDP1 puts plain views of its flat parameter in the parameters' place."""
    fields = module.__dict__
    parameters = fields["_parameters"]
    weight = parameters.get("weight")
    if weight is None:
        weight = fields.get("weight")
    bias = parameters.get("bias")
    if bias is None:
        bias = fields.get("bias")
    if type(weight) not in OWN_TYPES or type(bias) not in OWN_TYPES:
        name, value = ("bias", bias) if type(weight) in OWN_TYPES else ("weight", weight)
        return f"a {name} that is a {type(value).__qualname__}, a tensor subclass"
    if weight is not None and weight.layout is not _STRIDED:
        return f"a weight whose layout is {weight.layout}"
    if (
        fields["_forward_hooks"]
        or fields["_forward_pre_hooks"]
        or fields["_backward_hooks"]
        or fields["_backward_pre_hooks"]
        or "forward" in fields
    ):
        return "hooks or a replaced forward"
    return weight, bias


def _why_not_all_adapters(layer: lora.Linear) -> str | None:
    """Why none of the layer's adapters can be fused, or None."""
    parts = (layer.lora_A, layer.lora_B, layer.lora_dropout)
    found = [_adapter(layer, name, *(part[name] for part in parts)) for name in layer.lora_A._modules]
    reasons = [reason for reason in found if isinstance(reason, str)]
    return "; ".join(reasons) if reasons and len(reasons) == len(found) else None


def patch_peft(model: nn.Module, copy_input: bool = False) -> PatchReport:
    """Let every plain LoRA layer of ``model`` compute with `torch_fused_lora.lora_linear`.

    In place and idempotent: a layer that is patched already is reported as patched. Adapters added, switched,
    merged or deleted afterwards are followed, since a patched layer decides anew at each call; a call that the
    operator does not cover (merged or disabled adapters, mixed batches, variants such as DoRA) runs PEFT's own
    forward, and so does every call while something that it would have called is replaced for the whole process, such
    as `nn.Linear.forward`. A declined layer is left exactly as it was. The environment's ``TORCH_FUSED_LORA=off``
    declines every layer.

    Copies of the model are patched. Pickles are of PEFT's own classes and load without this package, so that a model
    loaded by torch.load, or given to a spawned process, is patched there again by whoever wants that.

    Args:
        model: a PeftModel, or any module that contains `peft.tuners.lora` layers.
        copy_input: save a copy of each layer's input for backward, for models that change it in place after the layer.
            (Stock PEFT saves a copy only with dropout or where it casts.) Inside torch.compile it may save no copy.

    Returns:
        A `PatchReport`: the names of patched modules, and a reason for each LoRA layer left to PEFT.

    Raises:
        TypeError: ``model`` is not a module.
    """
    report = PatchReport([], {}, kind="LoRA layers", owner="PEFT")
    off = switched_off()
    for name, layer in _lora_layers(model):
        if type(layer) not in (lora.Linear, Linear):
            report.declined[name] = f"a {type(layer).__module__}.{type(layer).__qualname__}"
            continue
        base = _base(layer.base_layer)
        reason = off or (base if isinstance(base, str) else _why_replaced(layer) or _why_not_all_adapters(layer))
        if reason is None:
            patch(layer, Linear, name, copy_input)
            report.patched.append(name)
        else:
            unpatch(layer)
            report.declined[name] = reason
    return report


def unpatch_peft(model: nn.Module) -> None:
    """Undo `patch_peft`: give every patched layer of ``model`` PEFT's own class back."""
    for _, module in _lora_layers(model):
        if type(module) is Linear:
            unpatch(module)


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)]
