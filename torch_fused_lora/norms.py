"""Put `rms_norm` under the RMS norms of a model, in place, and take it away again.

Transformers repeats its norm in every model's file under another class name. Such a class is known by its code: its
`forward` has the instructions, names and constants of one of the forms below. Its modules get a subclass of their class
that overrides `forward` alone; parameters, hooks, state_dict, pickles and everything else stay as they were.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops.library import autocast_enabled
from .ops.rms_norm import rms_norm, torch_is_fused
from .report import PatchReport


class _Form(NamedTuple):
    """A way to write an RMS norm: `weight` gives what `rms_norm` takes for x, or None if it can't compute the same."""

    weight: Callable[[Any, Tensor], Tensor | None]
    eps: str
    autocasts: bool = False  # as F.rms_norm does


def _llama_weight(module: Any, x: Tensor) -> Tensor | None:
    return module.weight if module.weight.dtype == x.dtype else None  # otherwise the result is of the wider type


def _gpt_oss_weight(module: Any, x: Tensor) -> Tensor | None:
    return module.weight if module.weight.dtype in (x.dtype, torch.float32) else None


def _gemma_weight(module: Any, x: Tensor) -> Tensor | None:
    return 1.0 + module.weight.float()


def _torch_weight(module: Any, x: Tensor) -> Tensor | None:
    return None if torch_is_fused(x.device.type) else _gpt_oss_weight(module, x)


_TORCH = _Form(_torch_weight, "eps", autocasts=True)
_TRANSFORMERS = {  # module of transformers.models, class -> form
    ("llama.modeling_llama", "LlamaRMSNorm"): _Form(_llama_weight, "variance_epsilon"),
    ("gpt_oss.modeling_gpt_oss", "GptOssRMSNorm"): _Form(_gpt_oss_weight, "variance_epsilon"),
    ("gemma.modeling_gemma", "GemmaRMSNorm"): _Form(_gemma_weight, "eps"),
}


@functools.cache
def _form_of(cls: Any) -> _Form | None:
    if cls is nn.RMSNorm:
        return _TORCH
    if "transformers" not in sys.modules:  # then no module of the model is one of Transformers'
        return None
    for (path, name), form in _TRANSFORMERS.items():
        reference = getattr(importlib.import_module(f"transformers.models.{path}"), name)
        if _code(cls, "forward") == _code(reference, "forward") and _code(cls, "_norm") == _code(reference, "_norm"):
            return form
    return None


def _code(cls: type, name: str) -> tuple[object, ...] | None:
    """What a method does, whatever its local names; None if there is none."""
    code = getattr(getattr(cls, name, None), "__code__", None)
    return (code.co_code, code.co_names, code.co_consts) if code is not None else None


class _Fused:
    """Goes before a norm's class in the method resolution order."""

    _original: Any  # the module's own class
    _form: _Form

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not kwargs and len(args) == 1 and isinstance(x := args[0], Tensor):
            form = self._form
            weight = form.weight(self, x) if x.dtype != torch.float64 else None
            if weight is not None:
                eps = getattr(self, form.eps)
                if eps is None:  # nn.RMSNorm: of the type that it computes in
                    eps = torch.finfo(torch.float32).eps
                if form.autocasts or not autocast_enabled(x.device.type):
                    return rms_norm(x, weight, eps)
                with torch.autocast(x.device.type, enabled=False):
                    return rms_norm(x, weight, eps)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        how: Any = super().__reduce_ex__(protocol)
        return (_new, (self._original,), *how[2:])


def _new(cls: Any) -> nn.Module:
    fused: Any = _fused_class(cls)
    return fused.__new__(fused)


@functools.cache
def _fused_class(cls: Any) -> type[nn.Module]:
    fields = {"_original": cls, "_form": _form_of(cls), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (_Fused, cls), fields)


def patch_norms(model: nn.Module) -> PatchReport:
    """Let the RMS norms of ``model`` compute with `torch_fused_lora.rms_norm`.

    In place and idempotent. Patched are torch.nn.RMSNorm over one dimension and the RMS norms of Transformers that are
    written as Llama's, GPT-OSS's or Gemma's (with weight 1 + w) are, whatever their class is called. Where torch has
    one kernel each way of its own (`F.rms_norm` on CUDA), torch.nn.RMSNorm is left alone. A call with a dtype for
    which the result would differ (Llama's form with a weight of another dtype than x, float64) runs the module's own
    forward. Results agree within rounding: Llama's form rounds twice, before and after the weight, this once.

    Returns:
        A `PatchReport`: the names of patched modules, and a reason for each other RMS norm.

    Raises:
        TypeError: ``model`` is not a module.
    """
    report = PatchReport([], {}, kind="RMS norms", owner="their own code")
    for name, module in _modules(model):
        original: Any = module._original if isinstance(module, _Fused) else type(module)
        reason = _why_not(module, original)
        module.__class__ = original if reason else _fused_class(original)
        if reason is None:
            report.patched.append(name)
        else:
            report.declined[name] = reason
    return report


def unpatch_norms(model: nn.Module) -> None:
    """Undo `patch_norms`: give every patched module of ``model`` its own class back."""
    for _, module in _modules(model):
        if isinstance(module, _Fused):
            module.__class__ = module._original


def _modules(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")

    def is_norm(cls: Any) -> bool:
        return "RMSNorm" in cls.__name__ or _form_of(cls) is not None

    return [(name, module) for name, module in model.named_modules() if is_norm(type(module))]


def _why_not(module: Any, original: Any) -> str | None:
    if _form_of(original) is None:
        return f"{original.__module__}.{original.__qualname__} is written in a way that is not known"
    if "forward" in module.__dict__:
        return "its forward is replaced"
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1:
        return "it has no weight of one dimension"
    if original is nn.RMSNorm and torch_is_fused(weight.device.type):
        return f"torch's own is one kernel each way on {weight.device.type} already"
    return None
