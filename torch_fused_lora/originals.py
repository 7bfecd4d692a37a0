"""What a patch takes the place of: whether it is still its owner's, how a module takes it and how it gives it back."""

from __future__ import annotations

import copy
import copyreg
import functools
import os
import warnings
from collections.abc import Iterable
from types import BuiltinFunctionType
from typing import Any

from . import system


def why_replaced(places: Iterable[tuple[Any, str]]) -> str | None:
    """Which of these functions, each a class's or module's with its name, somebody replaced for the whole process, who
    wants to see them called; or None."""
    replaced = [f"{_path(owner)}.{name}" for owner, name in places if not is_own(owner, name)]
    return f"{' and '.join(replaced)} replaced for the whole process" if replaced else None


def _path(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__


def is_own(owner: Any, name: str) -> bool:
    """Whether a class's or module's function is the one that its owner wrote, however early it was replaced.

    It has its owner's name, and its code its owner's package: a wrapper has the names of what it wraps. One of
    torch.fx's, which traces what is called, is torch's own.
    """
    function = getattr(owner, name)
    function = getattr(function, "fget", function)  # of a property
    if isinstance(function, BuiltinFunctionType):
        return function.__name__ == name
    package, names = owner.__name__, [name]
    if isinstance(owner, type):
        owner = next(cls for cls in owner.__mro__ if name in cls.__dict__)
        package, names = owner.__module__, [f"{owner.__qualname__}.{name}", "Module._wrapped_call_impl"]
    code_package = getattr(function, "__globals__", {}).get("__name__", "")
    return getattr(function, "__qualname__", "") in names and code_package.split(".")[0] == package.split(".")[0]


class Patched:
    """Goes before a patched module's own class in the method resolution order.

    Copies of a patched module are patched. Its pickle, which is what `torch.save(model)` writes and a spawned process
    gets, is one of its own class: it loads without this package.
    """

    _original: Any  # the module's own class
    _state: tuple[str, ...] = ("_patched_name", "_copy_input")  # what patching adds to the module
    _patched_name: str  # the module's in the model that was patched
    _copy_input: bool

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        state = {name: value for name, value in state.items() if name not in self._state}
        return copyreg._reconstructor, (self._original, object, None), state, *rest  # type: ignore[attr-defined]

    def __copy__(self: Any) -> Any:
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__(self.__dict__)
        return twin

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin


def class_of(cls: type, mixin: type, **attributes: Any) -> type:
    """The class that instances of ``cls`` become when they are patched: the mixin goes before it. Made once."""
    subclass: type
    for subclass in cls.__subclasses__():
        if subclass.__dict__.get("_original") is cls and issubclass(subclass, mixin):
            return subclass
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (mixin, cls), {"_original": cls, **attributes, **names})


def patch(module: Any, cls: type, **state: Any) -> None:
    """Make a module one of a `Patched` class, with the state that this adds."""
    module.__dict__.update(state)  # first: an interrupt leaves a module that can be called and patched
    module.__class__ = cls


def unpatch(module: Any) -> None:
    """Make a module one of its own class again, without a trace, if it is patched."""
    if isinstance(module, Patched):
        cls: Any = type(module)
        state = module._state
        module.__class__ = _unpatched(cls)
        for name in state:
            del module.__dict__[name]


@functools.cache
def _unpatched(cls: Any) -> Any:
    """A patched class's own; of a subclass, which FSDP2 makes for a module that it shards, a like one without it."""
    if "_original" in cls.__dict__:
        return cls._original
    bases = tuple(_unpatched(base) if issubclass(base, Patched) else base for base in cls.__bases__)
    return type(cls.__name__, bases, dict(cls.__dict__))


def switched_off() -> str | None:
    """The reason to patch nothing, where the environment has one; a warning says so once."""
    reason = system.switched_off(os.environ)
    if reason:
        _warn_once(f"{reason}: {system.OFF}")
    return reason


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(f"torch_fused_lora: {text}", stacklevel=4)
