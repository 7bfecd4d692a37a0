"""How this package's operators are registered with torch.library, which way a call takes, and what it refuses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor

from .. import torch_private
from ..mps import extension
from ..torch_private import (
    FakeTensor,
    below_autograd,
    dispatch_modes,
    is_exporting,
    profiling,
    raw_saved_tensors,
    transformed,
)

NAMESPACE = "torch_fused_lora"
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS", "xpu": "AutocastXPU"}

# Short names for the types of operators' arguments, as their schemas have them.
Maybe: TypeAlias = Tensor | None
Pair: TypeAlias = tuple[Tensor, Tensor]
Floats: TypeAlias = Sequence[float]
Ints: TypeAlias = Sequence[int]
Flags: TypeAlias = Sequence[bool]
Saved: TypeAlias = Any  # a tensor where a gradient that was asked for needs it, otherwise None

_F = TypeVar("_F", bound=Callable)


def define(name: str, schema: str, *tags: torch.Tag) -> None:
    """Define operator ``torch_fused_lora::name``."""
    tags = (torch.Tag.pt2_compliant_tag, *tags)
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


def _operator(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; False where torch knows no autocast (it raises for meta)."""
    return device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


# A context in which autocast casts nothing: what an operator's own kernels run in.
below_autocast = torch_private.below_autocast(AUTOCAST_KEYS)


def autocast(name: str, cast: Callable[..., Sequence[object]]) -> None:
    """Register operator ``torch_fused_lora::name`` at every autocast key: ``cast(device_type, *arguments)`` gives the
    arguments that its kernels get, which run below autocast."""
    operator = _operator(name)

    def register(device_type: str, key: str) -> None:
        @kernel(name, key)
        def below(*arguments: Any) -> Any:
            cast_arguments = cast(device_type, *arguments)
            with below_autocast():
                return operator(*cast_arguments)

    for device_type, key in AUTOCAST_KEYS.items():
        register(device_type, key)


def casting(operator: Any) -> list[str]:
    """The device types whose autocast casts the operands of one of torch's operators."""
    return [device_type for device_type, key in AUTOCAST_KEYS.items() if operator.has_kernel_for_dispatch_key(key)]


def as_given(device_type: str, *arguments: object) -> Sequence[object]:
    """A `cast` of `autocast`: none."""
    return arguments


def to_float(x: torch.Tensor) -> torch.Tensor:
    """What torch's autocast makes of an argument that it casts to float32."""
    return x.float() if x.is_floating_point() and x.dtype != torch.float64 else x


def call_device(operator: Callable, check: Callable[..., None], *arguments: object) -> Any:
    """Call a device's kernel. One in C++ can only raise RuntimeError: ``check(*arguments)`` says what it refuses as
    everywhere."""
    try:
        return operator(*arguments)
    except RuntimeError:
        check(*arguments)
        raise


def differentiable_forward(
    name: str, check: Callable[..., None], with_autograd: Callable[..., Any], twin: Callable[..., Any]
) -> Callable[..., Any]:
    """Register a forward operator's autograd and functorch kernels, and return what calls the device's own kernel.

    ``with_autograd(kernel, *arguments)`` records a call of a kernel; ``twin`` is the operator in differentiable aten
    calls, for functorch transforms and forward-mode AD.
    """
    device_kernel = functools.partial(call_device, torch_private.call_of(_operator(name)), check)

    @kernel(name, "Autograd")
    def autograd(*arguments: Any) -> Any:
        return twin(*arguments) if transformed() else with_autograd(device_kernel, *arguments)

    kernel(name, "FuncTorchBatched")(twin)
    return device_kernel


def differentiable_backward(name: str, check: Callable[..., None], twin: Callable[..., Any]) -> None:
    """Register a backward operator's autograd and functorch kernels: the device's own where nothing is recorded,
    otherwise ``twin``, the operator in differentiable aten calls."""
    operator = _operator(name)

    @kernel(name, "Autograd", "FuncTorchBatched")
    def autograd(*arguments: Any) -> Any:
        records = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
        if records or transformed():
            return twin(*arguments)
        with below_autograd():
            return call_device(operator, check, *arguments)


def refuse(operator: str, name: str, value: object, expected: str) -> NoReturn:
    """Raise ValueError: what an operator expected of an argument, and what it got."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{value.layout}, "
        value = f"{layout}shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    raise ValueError(f"{operator}: {name}: expected {expected}; got {value}")


def refuse_sparse(operator: str, **tensors: Maybe) -> None:
    """Raise ValueError for the first tensor that is not dense."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.layout is not torch.strided:
            refuse(operator, name, tensor, "a dense tensor")


def refuse_mps(operator: str, x: Tensor, instead: str) -> None:
    """Raise NotImplementedError in a portable kernel on mps: no extension has registered one of its own. A sparse x
    comes here in any case, and is refused by name."""
    if x.device.type == "mps" and x.layout is torch.strided:
        raise NotImplementedError(
            f"{operator}: device 'mps' needs this package's Metal extension, and {extension.reason}; or {instead}"
        )


PORTABLE = ("cpu", "cuda", "xpu")  # device types whose kernels are the portable ones
PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))  # subclasses want to see the calls made with them
PLAIN_OR_NONE = PLAIN_TYPES | {NoneType}
OWN_TYPES = PLAIN_OR_NONE | {FakeTensor}  # of a module's own tensors: an export puts fake ones in their place


_keeping = False  # for the whole process, as torch.export's own state is


@contextlib.contextmanager
def keep_operators() -> Iterator[None]:
    """A context in which exports keep this package's operators in their graphs.

    Outside it `torch.export`, and what is built on it (ONNX, AOTInductor), sees torch's own calls only, so that the
    exported program runs where this package is not. One exported inside loads and runs where it is imported::

        with torch_fused_lora.keep_operators():
            program = torch.export.export(model, (x,))

    A trace by `torch.jit.trace` holds torch's own calls in either case.
    """
    global _keeping
    before, _keeping = _keeping, True
    try:
        yield
    finally:
        _keeping = before


def by_torch(x: torch.Tensor) -> bool:
    """Whether a call has to be made of torch's own calls: it is exported or traced, or x is nested."""
    return (is_exporting() and not _keeping) or x.is_nested or torch.jit.is_tracing()


def unwatched(device_type: str) -> bool:
    """No compiler, dispatch mode, autocast, profiler, functorch transform or forward-mode AD wants to see calls."""
    return not (
        torch.compiler.is_compiling()
        or dispatch_modes()
        or autocast_enabled(device_type)
        or profiling()
        or transformed()
    )


def tell_caller(y: Tensor, caller: str | None) -> Tensor:
    """Leave a patched module's name where `saved_tensors` finds it, for a call that goes by the dispatcher: with the
    node of the autograd graph that made ``y``."""
    if caller and y.requires_grad and not torch.compiler.is_compiling():
        node: Any = y.grad_fn
        node.metadata["caller"] = caller
    return y


def saved_tensors(ctx: Any, operator: str, patch: str, caller: str | None) -> tuple[Any, ...]:
    """``ctx.saved_tensors``, of which x is the first. Where x was changed in place since, the error that they raise
    names the module, if it is one that ``patch`` patched, and the remedy."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):  # freed
            raise
        what = _changed_input(ctx)
        if what is None:
            raise
        caller = caller or ctx.metadata.get("caller")
        who, remedy = (caller, f"{patch}(model, copy_input=True)") if caller else (operator, "give it x.clone()")
        raise RuntimeError(f"{who}: {what} was changed in place after the forward: {remedy}. {error}") from error


def _changed_input(ctx: Any) -> str | None:
    """The input, in words, if it is the saved tensor that was changed in place; None if another one was."""
    try:
        raw_saved_tensors(ctx)[0].unpack()
    except RuntimeError:
        return "the input"
    except (AttributeError, IndexError):  # as in torch 2.11: which of them was changed is not to be had
        return "what it saved, most likely the input,"
    return None
