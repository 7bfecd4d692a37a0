"""Every private name of torch that this package uses, each with what serves where a torch has none of that name.

What stands in is right everywhere and may be slower: it says that somebody watches, and calls go the public way. A C
function is bound as it is, since calls of it are counted in nanoseconds. (The dicts of nn.Module, such as `_modules`,
are in every pickle of a module and as good as public.)
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _private(path: str, otherwise: Any, owner: Any = torch) -> Any:
    try:
        return attrgetter(path)(owner)
    except AttributeError:
        return otherwise


def _always(*_: object) -> bool:
    return True


# ---------------------------------------------------------------------------------------------- who wants to see calls

dispatch_modes: Callable[[], int] = _private("_C._len_torch_dispatch_stack", _always)
profiling: Callable[[], bool] = _private("autograd._profiler_enabled", _always)
is_tracing: Callable[[], bool] = _private("_C._is_tracing", torch.jit.is_tracing)
has_global_hook: Callable[[], bool] = _private("nn.modules.module._has_any_global_hook", _always)
FakeTensor: type = _private("_subclasses.fake_tensor.FakeTensor", Tensor)

_in_functorch = _private("_C._are_functorch_transforms_active", None)
_level = _private("autograd.forward_ad._current_level", None)
_guard = _private("_C._AutoDispatchBelowAutograd", None)

# A context in which autograd's kernels are passed by. Without it no kernel of this package's may call another below
# autograd's: all calls are then `transformed` ones, made of differentiable aten calls.
below_autograd: Callable[[], contextlib.AbstractContextManager] = _guard or torch.no_grad


def _transformed() -> bool:
    """Inside torch.func (vmap, grad, jvp, ...) or forward-mode AD, which need differentiable aten calls."""
    return _in_functorch() or forward_ad._current_level >= 0


transformed: Callable[[], bool] = _always if None in (_in_functorch, _level, _guard) else _transformed


def _is_exporting() -> bool:
    """As torch.compiler.is_exporting(), which torch 2.11's dynamo takes for True whatever it compiles."""
    return torch.compiler._is_exporting_flag


_exporting = _private("compiler._is_exporting_flag", None)
is_exporting: Callable[[], bool] = torch.compiler.is_exporting if _exporting is None else _is_exporting


def _has_no_storage(tensor: Tensor) -> bool:
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return True
    return False


# Of the vmap of `torch.autograd.grad(is_grads_batched=True)`, older than torch.func's.
is_legacy_batched: Callable[[Tensor], bool] = _private("_C._functorch.is_legacy_batchedtensor", _has_no_storage)


def has_compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    return bool(counters)


# ------------------------------------------------------------------------------------------------------------ autocast

# Whether autocast is on for any of the device types that torch counts, not mps.
any_autocast: Callable[[], bool] = _private("_C._is_any_autocast_enabled", _always)
_ExcludeGuard = _private("_C._ExcludeDispatchKeyGuard", None)
_KeySet = _private("_C.DispatchKeySet", None)
_Key = _private("_C.DispatchKey", None)


def below_autocast(keys: dict[str, str]) -> Callable[[], contextlib.AbstractContextManager]:
    """What makes contexts in which the autocast of no device type casts; ``keys`` are their dispatch keys."""
    if None in (_ExcludeGuard, _KeySet, _Key):
        return functools.partial(_without_autocast, list(keys))
    keyset = functools.reduce(
        lambda found, name: found.add(getattr(_Key, name)), keys.values(), _KeySet(_Key.Undefined)
    )
    return functools.partial(_ExcludeGuard, keyset)


@contextlib.contextmanager
def _without_autocast(device_types: list[str]) -> Any:
    with contextlib.ExitStack() as stack:
        for device_type in filter(torch.is_autocast_enabled, device_types):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


# ----------------------------------------------------------------------------------------- autograd.Function, operators


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its functorch bookkeeping, where calls run under no transform."""
    return _private("apply", function.apply, super(torch.autograd.Function, function))


def kernel_of(operator: Any, dispatch_key: str) -> Callable[..., Any]:
    """An operator's kernel for a dispatch key; for dense tensors on its device, and where nobody watches."""
    key = None if None in (_KeySet, _Key) else _private(dispatch_key, None, _Key)
    redispatch = _private("_handle.redispatch_boxed", None, operator)
    return _below(operator) if None in (key, redispatch) else functools.partial(redispatch, _KeySet(key))


def _below(operator: Any) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with below_autograd():
            return operator(*arguments)

    return call


raw_saved_tensors: Callable[[Any], tuple[Any, ...]] = _private(
    "autograd.Function._raw_saved_tensors.__get__", lambda ctx: ()
)
base_of: Callable[[Tensor], Tensor | None] = _private("Tensor._base.__get__", lambda view: None)

# --------------------------------------------------------------------------------------------------- aten's own names

# Of F.rms_norm, forward and backward in one kernel each; None: they are made of other calls.
fused_rms_norm = _private("ops.aten._fused_rms_norm.default", None)
fused_rms_norm_backward = _private("ops.aten._fused_rms_norm_backward.default", None)


def _public_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return torch.softmax(x, dim)


def _public_softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    product = grad.to(wide) * y
    return (product - y * product.sum(dim, keepdim=True)).to(dtype)


softmax = _private("_softmax", _public_softmax)
softmax_backward = _private("_softmax_backward_data", _public_softmax_backward)
