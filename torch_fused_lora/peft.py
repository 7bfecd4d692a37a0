"""Put the operators under the LoRA layers of a PEFT model, in place, and take them away again.

PEFT has no hook for a layer of a model that is already built, so a layer's class is swapped: a subclass of PEFT's own,
with another `forward` and no state of its own but a name for errors and counts of calls. Everything else (state_dict,
merging, adding, switching and deleting adapters, pickles) stays PEFT's.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTuner
except ImportError as error:
    raise ImportError(
        "torch_fused_lora.patch_peft needs PEFT: pip install 'torch-fused-lora[peft]' (or pip install peft)"
    ) from error

from . import decide, hooks, linear4bit
from .affine import Packed
from .ops.dispatch import BY_DISPATCHER, PLAIN_TYPES, Maybe, autocast_enabled
from .ops.lora_delta.operator import lora_delta_stacked
from .ops.lora_linear.operator import lora_linear_stacked
from .ops.lora_linear_quantized.operator import lora_linear_quantized_stacked
from .originals import Patched, class_of, patch, switched_off, unpatch
from .report import Calls, LoRAReport

_NO_DROPOUT: tuple[float, ...] = ()


class Fused(Patched):
    """Goes before a LoRA class of PEFT's whose plain forward becomes one operator."""

    _state = ("_patched_name", "_copy_input", "_calls")
    _forward: Any  # of the class of PEFT's
    _calls: Calls

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, __class__):  # type: ignore[name-defined]  # a wrapper holds this method from before
            return type(self).forward(self, x, *args, **kwargs)
        call = decide.ARGUMENTS if args or kwargs else decide.decide(self, x)
        if isinstance(call, str):
            if decide.HOOKS in call:
                found = _between_hooks(self, x, call)
                if not isinstance(found, str):
                    return found
                call = found
            _declined(self, call)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self._copy_input and torch.is_grad_enabled():
            x = x.clone()
        way, base, adapters, _ = call
        if base is None:
            return _over_any_base(self, x, call)
        fields = self.__dict__
        if way is not BY_DISPATCHER or not torch.compiler.is_compiling():
            fields["_calls"].fused += 1
        (weight, bias), name = base, fields["_patched_name"]
        stacked = lora_linear_quantized_stacked if type(weight) is Packed else lora_linear_stacked
        if len(adapters) == 1:
            lora_A, lora_B, lora_bias, scaling, p = adapters[0]
            if lora_bias is None:
                dropout = (p,) if p else _NO_DROPOUT
                return stacked(x, weight, bias, lora_A, lora_B, scaling, dropout, (), name, way, True)
        lora_bias = _bias(adapters, x.dtype if type(weight) is Packed else weight.dtype)
        if lora_bias is not None:  # over a half base it joins the base product's rounding
            bias = lora_bias if bias is None else bias + lora_bias
        lora_A, lora_B, dropouts, ranks = _stacked(adapters)
        return stacked(x, weight, bias, lora_A, lora_B, 1.0, dropouts, ranks, name, way, True)


def _over_any_base(layer: Any, x: Tensor, call: decide.Call) -> Tensor:
    """Call the base, and fuse the rest if that is possible with what it makes of x."""
    y = _of_base(layer, x)
    way, _, adapters, cast = call
    if len(adapters) == 1:
        lora_A, lora_B, _, scaling, p = adapters[0]
        dropouts, ranks = [p], [lora_A.shape[0]]
    else:
        (lora_A, lora_B, dropouts, ranks), scaling = _stacked(adapters), 1.0
    rows = x.to(lora_A.dtype) if cast else x
    autocast = way is BY_DISPATCHER and autocast_enabled(x.device.type)
    reason = decide.takes(y, rows, lora_A, lora_B, autocast)
    if reason is not None:
        _declined(layer, reason)
        return _by_modules(layer, y, x)
    if way is not BY_DISPATCHER or not torch.compiler.is_compiling():
        layer._calls.fused += 1
    if type(y) not in PLAIN_TYPES:
        way = BY_DISPATCHER
    lora_bias = _bias(adapters, y.dtype)
    if lora_bias is not None:
        y = y + lora_bias
    found = lora_delta_stacked(y, rows, lora_A, lora_B, scaling, dropouts, ranks, layer._patched_name, way, True)
    return found if found.dtype is y.dtype else found.to(y.dtype)


def _of_base(layer: Any, x: Tensor) -> Any:
    """What the base makes of x: called, or by the operator that reads its bytes where they are bitsandbytes'."""
    base = layer._modules["base_layer"]
    if x.is_mps and (found := decide.bytes_of(base)) is not None:
        if not isinstance(found, str):
            return linear4bit.product(found, x)
        layer._calls.base = found
    return base(x)


def _between_hooks(layer: Any, x: Tensor, reason: str) -> Tensor | str:
    """The fused call between the hooks of accelerate and diffusers around the adapters' modules, which they get their
    weights from; or why it is not to be fused: this reason, if the hooks are other ones."""
    parts = [layer.lora_dropout, layer.lora_A, layer.lora_B]
    modules = [part[name] for name in layer.active_adapters for part in parts if name in part]
    if any(hooks.around(module) is None for module in modules):
        return reason
    with hooks.running(modules, x) as rows:
        call = decide.decide(layer, rows, hooks_run=True)
        if isinstance(call, str):
            return call
        way, _, adapters, cast = call
        aliases = [(hooks.alias(A), hooks.alias(B), *rest) for A, B, *rest in adapters]
        return _over_any_base(layer, x, (way, None, aliases, cast))


def _by_modules(layer: Any, y: Any, x: Tensor) -> Any:
    """What PEFT's forward adds to its base's output, as PEFT does, where the base has been called already."""
    dtype = y.dtype
    for name in layer.active_adapters:
        if name in layer.lora_A:
            x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
            y = y + layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * layer.scaling[name]
    return y.to(dtype)


def _bias(adapters: list[decide.Adapter], dtype: torch.dtype) -> Maybe:
    """What the biases of lora_B's modules add up to, or None if there are none."""
    biases = [bias * scaling for _, _, bias, scaling, _ in adapters if bias is not None]
    return sum(biases[1:], biases[0]).to(dtype) if biases else None


def _stacked(adapters: list[decide.Adapter]) -> tuple[Tensor, Tensor, list[float], list[int]]:
    """Adapters side by side, with their scalings in lora_B: it, lora_A, probabilities of dropout and ranks."""
    lora_A = torch.cat([lora_A for lora_A, *_ in adapters])
    lora_B = torch.cat([lora_B * scaling for _, lora_B, _, scaling, _ in adapters], 1)
    return lora_A, lora_B, [p for *_, p in adapters], [lora_A.shape[0] for lora_A, *_ in adapters]


_PATIENCE = 3  # calls of a layer that decline for a lasting reason, until a warning says so


def _declined(layer: Any, reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    calls = layer._calls
    calls.declined += 1
    calls.reason = reason
    if reason not in decide.PASSING and calls.fused == 0 and calls.declined >= _PATIENCE:
        _warn_once(reason, layer._patched_name)


_warned: set[str] = set()


def _warn_once(reason: str, name: str) -> None:
    """Say that a layer is not fused, once a reason."""
    if reason not in _warned:
        _warned.add(reason)
        text = f"torch_fused_lora: {name} and others like it run PEFT's own forward: {reason}; see report.calls()"
        warnings.warn(text, stacklevel=4)


# ------------------------------------------------------------------------------------------------------------ patching


def _fused_class(cls: Any) -> type:
    return class_of(cls, Fused, _forward=cls.forward)


Linear = _fused_class(lora.Linear)


class _Part(nn.Module):
    """What a function makes of x, whatever is done at the time to all modules and their parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor], weight: Tensor):
        super().__init__()
        self.function, self.weight = function, weight

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def _is_plain_lora(layer: Any, forward: Any) -> bool:
    """Whether the forward of a layer's class adds scaling · B(A(dropout(x))) to its base's output and does nothing
    else: it is tried, with small whole numbers, on a copy of the layer over another base."""

    tensor = functools.partial(torch.tensor, device="cpu", dtype=torch.float32)
    A, B = tensor([[1, -2, 3], [0, 1, 2]]), tensor([[2, 0], [-1, 1], [0, 3], [1, 1]])
    x, y = tensor([[1, 2, 4], [0, -1, 1]]), tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    inputs: list[Tensor] = []

    def base_of(x: Tensor) -> Tensor:
        inputs.append(x)
        return y.clone()

    base = _Part(base_of, y)
    probe: Any = object.__new__(type(layer))  # FSDP2's classes have a __new__ that copy.copy cannot call
    probe.__dict__.update(layer.__dict__)
    parts = {
        "lora_A": _Part(lambda x: F.linear(x, A), A),
        "lora_B": _Part(lambda x: F.linear(x, B), B),
        "lora_dropout": _Part(lambda x: x, A),
    }
    probe.__dict__.update(
        _modules={name: base if module is layer.base_layer else module for name, module in layer._modules.items()}
        | {name: nn.ModuleDict({"probe": part}) for name, part in parts.items()},
        _active_adapter=["probe"],
        _disable_adapters=False,
        merged_adapters=[],
        scaling={"probe": 2.0},
        lora_variant={},
    )
    try:
        with torch.no_grad():
            found = forward(probe, x)
            expected = y + 2.0 * F.linear(F.linear(x, A), B)
            return len(inputs) == 1 and inputs[0] is x and torch.equal(found, expected)
    except Exception:  # it wants something else: whatever it is, this is not the forward of a linear layer
        return False


_plain: weakref.WeakSet[type] = weakref.WeakSet()


def _why_not(layer: Any) -> str | None:
    """Why no call of a layer can be fused, or None. What may change from call to call is no reason."""
    cls = getattr(type(layer), "_original", type(layer))
    if reason := decide.why_replaced_for(layer):
        return reason
    if cls not in _plain:
        if cls.forward.__module__.split(".")[0] != "peft" or not _is_plain_lora(layer, cls.forward):
            return f"a {cls.__module__}.{cls.__qualname__}"
        _plain.add(cls)
    reasons = [_why_not_adapter(layer, name) for name in layer.lora_A]
    return "; ".join(map(str, reasons)) if reasons and all(reasons) else None


def _why_not_adapter(layer: Any, name: str) -> str | None:
    modules = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    known_hooks = all(hooks.around(module) is not None for module in modules)
    found = decide.adapter_of(layer, name, known_hooks)
    # FSDP2's weights are a subclass's between calls, plain ones within.
    return found if isinstance(found, str) and decide.SUBCLASS not in found else None


def patch_peft(model: nn.Module | None = None, copy_input: bool = False) -> LoRAReport:
    """Let every plain LoRA layer of ``model`` compute with `torch_fused_lora.lora_linear`, or, over a base that is not
    exactly an `nn.Linear` or Conv1D, call that base and add the rest by `torch_fused_lora.lora_delta`.

    In place and idempotent: a layer that is patched already is reported as patched. Adapters added, switched, merged or
    deleted afterwards are followed, those in further layers too, since a patched layer decides anew at each call; a
    call that the operators do not cover (merged or disabled adapters, mixed batches, variants such as DoRA) runs PEFT's
    own forward, and so does every call while something that it would have called is replaced for the whole process,
    such as `nn.Linear.forward`. A declined layer is left exactly as it was. The environment's
    ``TORCH_FUSED_LORA=off`` declines every layer.

    Without a model: every model that PEFT puts LoRA layers into from now on is patched, until `unpatch_peft` is called
    without one, for scripts that build their model out of reach.

    Copies of the model are patched. Pickles are of PEFT's own classes and load without this package, so that a model
    loaded by torch.load, or given to a spawned process, is patched there again by whoever wants that.

    Args:
        model: a PeftModel, or any module that contains `peft.tuners.lora` layers.
        copy_input: save a copy of each layer's input for backward, for models that change it in place after the layer.
            (Stock PEFT saves a copy only with dropout or where it casts.) Inside torch.compile it may save no copy.

    Returns:
        A `LoRAReport`: the names of patched modules, a reason for each LoRA layer left to PEFT, and, by its `calls()`,
        what became of the calls so far.

    Raises:
        TypeError: ``model`` is not a module.
    """
    report = LoRAReport([], {}, kind="LoRA layers", owner="PEFT")
    if model is None:
        _everywhere[:] = [(report, copy_input)]
    else:
        _patch_into(report, model, copy_input)
        _followed[model] = (report, copy_input)
    if not hasattr(BaseTuner.inject_adapter, "_follows"):
        BaseTuner.inject_adapter = _and_patch(BaseTuner.inject_adapter)
    return report


def _patch_into(report: LoRAReport, model: nn.Module, copy_input: bool) -> None:
    """Patch a model's layers, and tell the report of them."""
    layers, off = _lora_layers(model), switched_off()
    if not any(known() is model for known in report.models):
        report.models.append(weakref.ref(model))
    for name, layer in layers:
        reason = off or _why_not(layer)
        if reason is None:
            if not isinstance(layer, Fused):
                unpatch(layer)  # of this module, before it was reloaded
                cls: Any = type(layer)
                state = {"_patched_name": name or cls.__name__, "_copy_input": copy_input, "_calls": Calls()}
                patch(layer, _fused_class(cls), **state)
                hooks.rebind(layer, cls.forward, Fused.forward)
            layer._copy_input = copy_input
            if name not in report.patched:
                report.patched.append(name)
            report.declined.pop(name, None)
        else:
            unpatch(layer)
            if name in report.patched:
                report.patched.remove(name)
            report.declined[name] = reason


def unpatch_peft(model: nn.Module | None = None) -> None:
    """Undo `patch_peft`: give every patched layer of ``model`` PEFT's own class back; without a model, patch those that
    are built from now on no more.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if model is None:
        _everywhere.clear()
    else:
        for _, module in _lora_layers(model):
            unpatch(module)
        _followed.pop(model, None)
    ours = getattr(BaseTuner.inject_adapter, "_follows", None) is BaseTuner.inject_adapter
    if ours and not _everywhere and not _followed:
        BaseTuner.inject_adapter = BaseTuner.inject_adapter.__wrapped__


# Models that were patched, with what they were patched with; and what those are that PEFT builds, if they are.
_followed: weakref.WeakKeyDictionary[nn.Module, tuple[LoRAReport, bool]] = weakref.WeakKeyDictionary()
_everywhere: list[tuple[LoRAReport, bool]] = []


def _and_patch(inject_adapter: Any) -> Any:
    """PEFT's way to put an adapter's layers into a model, whoever asks for it; and then these are patched, if all
    are, or the model they are in was."""

    @functools.wraps(inject_adapter)
    def inject_and_patch(tuner: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject_adapter(tuner, model, *args, **kwargs)
        inside = set(model.modules())
        roots = [root for root in list(_followed) if root in inside or any(part is model for part in root.modules())]
        for root in roots:
            _patch_into(_followed[root][0], root, _followed[root][1])
        for report, copy_input in () if roots else _everywhere:
            _patch_into(report, tuner.model, copy_input)  # what a PeftMixedModel gives is itself from its second on
        return result

    inject_and_patch._follows = inject_and_patch  # type: ignore[attr-defined]  # a wrapper's is not itself
    return inject_and_patch


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)]
