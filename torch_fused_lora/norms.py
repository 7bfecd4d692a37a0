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
from torch.nn import functional as F

from .ops.dispatch import BY_TORCH, PLAIN_TYPES, PORTABLE_DEVICES, autocast_enabled, route
from .ops.rms_norm.operator import rms_norm_for
from .ops.rms_norm.portable import FUSED_BY_TORCH
from .ops.rows import HALF
from .originals import Patched, class_of, is_own, patch, switched_off, unpatch, why_replaced
from .report import PatchReport


class _Form(NamedTuple):
    """A way to write an RMS norm: `weight` gives what `rms_norm` takes for x, or None if it can't compute the same."""

    weight: Callable[[Any, Tensor], Tensor | None]
    eps: str
    reference: tuple[str, str] | None = None  # module and class of transformers.models
    autocasts: bool = False  # as F.rms_norm does


def _llama_weight(module: Any, x: Tensor) -> Tensor | None:
    return module.weight if module.weight.dtype == x.dtype else None  # otherwise the result is of the wider type


def _gpt_oss_weight(module: Any, x: Tensor) -> Tensor | None:
    return module.weight if module.weight.dtype in (x.dtype, torch.float32) else None


def _gemma_weight(module: Any, x: Tensor) -> Tensor | None:
    return 1.0 + module.weight.float()


def _torch_weight(module: Any, x: Tensor) -> Tensor | None:
    if x.device.type in FUSED_BY_TORCH or ((F.rms_norm, torch.rms_norm) != _OWN and why_replaced(_CALLS)):
        return None
    return _gpt_oss_weight(module, x)


_CALLS = (F, "rms_norm"), (torch, "rms_norm")  # by torch.nn.RMSNorm's forward
_OWN = tuple(getattr(*call) if is_own(*call) else None for call in _CALLS)


_FORMS = {
    "torch": _Form(_torch_weight, "eps", autocasts=True),
    "llama": _Form(_llama_weight, "variance_epsilon", ("llama.modeling_llama", "LlamaRMSNorm")),
    "gpt_oss": _Form(_gpt_oss_weight, "variance_epsilon", ("gpt_oss.modeling_gpt_oss", "GptOssRMSNorm")),
    "gemma": _Form(_gemma_weight, "eps", ("gemma.modeling_gemma", "GemmaRMSNorm")),
}


def _form_of(cls: Any) -> str | None:
    if cls is nn.RMSNorm:
        return "torch"
    if "transformers" not in sys.modules:  # then no module of the model is one of Transformers'
        return None
    for name, form in _FORMS.items():
        reference = form.reference and _class(*form.reference)
        if reference and _codes(cls) == _codes(reference) and not _why_replaced(reference):
            return name
    return None


@functools.cache
def _class(path: str, name: str) -> type | None:
    """A class of Transformers; None where this version has no such class."""
    try:
        return getattr(importlib.import_module(f"transformers.models.{path}"), name)
    except (ImportError, AttributeError):
        return None


def _why_replaced(cls: type) -> str | None:
    methods = [(cls, name) for name in ("forward", "_norm") if hasattr(cls, name)]
    return why_replaced((*methods, *_CALLS) if cls is nn.RMSNorm else methods)


def _codes(cls: type) -> tuple[object, object]:
    return _code(cls, "forward"), _code(cls, "_norm")


def _code(cls: type, name: str) -> tuple[object, ...] | None:
    """What a method does, whatever its local names; None if there is none."""
    method = getattr(cls, name, None)
    code = getattr(method, "__code__", None)
    if code is None:
        return None
    # A method that wraps another, or closes over something, does more than its code says: it equals itself alone.
    hidden = method if getattr(method, "__closure__", None) or hasattr(method, "__wrapped__") else None
    return code.co_code, code.co_names, code.co_consts, hidden


class _Fused(Patched):
    """Goes before a norm's class in the method resolution order."""

    _form: str
    _methods: tuple[Any, Any]  # that `_form` stands for

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, _Fused):  # undone while a wrapper still holds this method
            return type(self).forward(self, *args, **kwargs)
        if not kwargs and len(args) == 1 and (found := _arguments(self, args[0])):
            if _FORMS[self._form].autocasts or not autocast_enabled(args[0].device.type):
                return rms_norm_for(*found, self._patched_name)
            with torch.autocast(args[0].device.type, enabled=False):
                return rms_norm_for(*found, self._patched_name)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _arguments(module: Any, x: Any) -> tuple[Tensor, Tensor, float] | None:
    """What `rms_norm` is called with, or None if the module's own forward has to run. It has to under a compiler that
    fuses its calls with their neighbours, too, where there are no kernels of ours."""
    if type(x) not in PLAIN_TYPES or type(module.weight) not in PLAIN_TYPES or route(x) is BY_TORCH:
        return None
    if x.dtype not in (torch.float32, *HALF) or (torch.compiler.is_compiling() and x.device.type in PORTABLE_DEVICES):
        return None
    if _methods(module._original) != module._methods or "_norm" in module.__dict__:
        return None
    form = _FORMS[module._form]
    weight, eps = form.weight(module, x), getattr(module, form.eps)
    if weight is None:
        return None
    if module._copy_input and torch.is_grad_enabled():
        x = x.clone()
    # nn.RMSNorm's None is that of the type it computes in.
    return x, weight, torch.finfo(torch.float32).eps if eps is None else eps


def _methods(cls: Any) -> tuple[Any, Any]:
    return cls.forward, getattr(cls, "_norm", None)


def _fused_class(cls: Any, form: str) -> Any:
    """The one subclass of cls that computes fused; it goes when nobody uses it."""
    return class_of(cls, _Fused, _form=form, _methods=_methods(cls))


def patch_norms(model: nn.Module, copy_input: bool = False) -> PatchReport:
    """Let the RMS norms of ``model`` compute with `torch_fused_lora.rms_norm`.

    In place and idempotent: what is patched already stays as it is. Patched are torch.nn.RMSNorm over one dimension and
    the RMS norms of Transformers that are written as Llama's, GPT-OSS's or Gemma's (with weight 1 + w) are, whatever
    their class is called. Where torch has one kernel each way of its own (`F.rms_norm` on CUDA), torch.nn.RMSNorm is
    left alone. A call with a dtype for which the result would differ (Llama's form with a weight of another dtype than
    x, float64) runs the module's own forward, and so does one inside torch.compile on a CPU or CUDA, where the compiler
    fuses a norm with its neighbours, and one while the class's own forward (or F.rms_norm, for torch.nn.RMSNorm) is
    replaced for the whole process. Results agree within rounding: Llama's form rounds twice, before and after the
    weight, this once. Copies, pickles, spawned processes and ``TORCH_FUSED_LORA=off``: as for `patch_peft`.

    Args:
        model: any module.
        copy_input: save a copy of each norm's input for backward, for models that change it in place after the norm.

    Returns:
        A `PatchReport`: the names of patched modules, and a reason for each other RMS norm.

    Raises:
        TypeError: ``model`` is not a module.
    """
    report = PatchReport([], {}, kind="RMS norms", owner="their own code")
    off = switched_off()
    for name, module in _norms(model):
        fused = isinstance(module, _Fused)
        reason = off or (_why_replaced(module._original) if fused else _why_not(module))
        if reason is None:
            cls = type(module)
            patched_class = cls if fused else _fused_class(cls, str(_form_of(cls)))
            patch(module, patched_class, _patched_name=name or cls.__name__, _copy_input=copy_input)
            report.patched.append(name)
        else:
            unpatch(module)
            report.declined[name] = reason
    return report


def unpatch_norms(model: nn.Module) -> None:
    """Undo `patch_norms`: give every patched module of ``model`` its own class back.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: something else changed a module's class after it was patched, and has to be undone first.
    """
    patched = {name: module for name, module in _norms(model) if isinstance(module, _Fused)}
    changed = [name for name, module in patched.items() if "_original" not in type(module).__dict__]
    if changed:
        raise RuntimeError(f"unpatch_norms: the class of {', '.join(changed)} was changed again after patch_norms")
    for module in patched.values():
        unpatch(module)


def _norms(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")

    def is_norm(cls: Any) -> bool:
        return "RMSNorm" in cls.__name__ or _form_of(cls) is not None

    return [(name, module) for name, module in model.named_modules() if is_norm(type(module))]


def _why_not(module: Any) -> str | None:
    """Why a module is not patched, or None."""
    cls = type(module)
    if _form_of(cls) is None:
        reason = _why_replaced(cls)
        unknown = f"{cls.__module__}.{cls.__qualname__} is written in a way that is not known"
        return f"{unknown}: {reason}" if reason else unknown
    if cls is nn.RMSNorm and (reason := _why_replaced(cls)):
        return reason
    if "forward" in module.__dict__ or "_norm" in module.__dict__:
        return "its forward is replaced"
    weight = module._parameters.get("weight")
    if type(weight) not in PLAIN_TYPES:
        return f"its weight is no plain parameter but a {type(getattr(module, 'weight', None)).__name__}"
    if weight.dim() != 1:
        return f"its weight has {weight.dim()} dimensions"
    if cls is nn.RMSNorm and weight.device.type in FUSED_BY_TORCH:
        return f"torch's own is one kernel each way on {weight.device.type} already"
    return None
