"""Hooks that accelerate and diffusers put around a module's forward, to move or convert its weights for the call.

Both replace ``forward`` in the instance's dict. Their hooks are run by exact type, since another one may do anything.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# By module: the classes of hooks that do nothing but move and convert a module's inputs and weights.
_KNOWN = {
    "accelerate.hooks": ("AlignDevicesHook",),
    "diffusers.hooks.group_offloading": ("GroupOffloadingHook",),
    "diffusers.hooks.layerwise_casting": ("LayerwiseCastingHook",),
}


def around(module: nn.Module) -> list[Any] | None:
    """The hooks around a module's own forward, the outermost first; None where there is something else around it."""
    fields = module.__dict__
    own, forward = types.MethodType(type(module).forward, module), module.forward
    aligning: Any = fields.get("_hf_hook")
    registry: Any = fields.get("_diffusers_hook")
    order = list(registry._hook_order) if registry else []
    hooks: list[Any] = []
    while forward != own:
        owner = getattr(getattr(forward, "func", None), "__module__", None)
        if owner == "accelerate.hooks" and aligning:
            hooks += getattr(aligning, "hooks", (aligning,))
            aligning, forward = None, fields["_old_forward"]
        elif owner == "diffusers.hooks.hooks" and order:
            hooks.append(registry.hooks[order.pop()])
            forward = registry._fn_refs[len(order)].forward
        else:
            return None
    known = {getattr(sys.modules.get(path), name, None) for path, names in _KNOWN.items() for name in names}
    return None if any(type(hook) not in known or getattr(hook, "no_grad", False) for hook in hooks) else hooks


@contextlib.contextmanager
def running(modules: Sequence[nn.Module], x: Tensor) -> Iterator[Tensor]:
    """A context in which these modules, whose hooks are all `around` them, have the weights that their forwards would
    see; it gives x as they would see it."""
    entered: list[tuple[Any, nn.Module]] = []
    try:
        for module in modules:
            for hook in around(module) or ():
                (x, *_), _ = hook.pre_forward(module, x)
                entered.append((hook, module))
        yield x
    finally:
        for hook, module in reversed(entered):
            hook.post_forward(module, None)


def alias(weight: Tensor) -> Tensor:
    """A view of the memory that a parameter has now: such hooks may give the parameter other memory before backward."""
    return weight.view_as(weight) if torch.is_grad_enabled() else weight


def rebind(module: nn.Module, old: Any, new: Any) -> None:
    """Let hooks around a module call ``new`` where they captured ``old``, two functions of its classes."""
    fields = module.__dict__
    references = fields["_diffusers_hook"]._fn_refs if "_diffusers_hook" in fields else ()
    captured: dict[str, Any]
    for captured in (fields, *(reference.__dict__ for reference in references)):
        for name, value in captured.items():
            if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is old:
                captured[name] = types.MethodType(new, module)
