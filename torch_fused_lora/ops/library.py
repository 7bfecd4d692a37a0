"""How this package's operators are registered with torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

NAMESPACE = "torch_fused_lora"
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS", "xpu": "AutocastXPU"}

_F = TypeVar("_F", bound=Callable)


def define(name: str, schema: str) -> None:
    """Define operator ``torch_fused_lora::name``.

    `cudagraph_unsafe`: scaling and seed may be CPU tensors that a kernel reads while it is encoded, so a
    captured graph would replay their first values.
    """
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=tags)


def kernel(name: str, *dispatch_keys: str) -> Callable[[_F], _F]:
    """Register the decorated function as the operator's kernel at each dispatch key, and return it."""

    def register(function: _F) -> _F:
        for key in dispatch_keys:
            torch.library.impl(f"{NAMESPACE}::{name}", key, function)
        return function

    return register


def fake(name: str) -> Callable[[_F], _F]:
    """Register the decorated function as the operator's shape function, and return it."""

    def register(function: _F) -> _F:
        torch.library.register_fake(f"{NAMESPACE}::{name}", function)
        return function

    return register


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; False where torch knows no autocast (it raises for meta)."""
    return device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


_autocast_keyset = functools.reduce(
    lambda keys, name: keys.add(getattr(torch._C.DispatchKey, name)),
    AUTOCAST_KEYS.values(),
    torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined),
)


def below_autocast() -> torch._C._ExcludeDispatchKeyGuard:
    """A context in which autocast casts nothing: what an operator's own kernels run in."""
    return torch._C._ExcludeDispatchKeyGuard(_autocast_keyset)
