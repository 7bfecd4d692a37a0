"""Which way a call of an operator takes: the one place for autograd, autocast, functorch, tracing and refusals.

An operator's own file says what it computes: schemas, checks, shapes, forward, backward and a twin of both in
differentiable aten calls. `Operator` registers that for every way in which a call may come, and `route` chooses:

=============  =========================================  ==================================================
`Route`        for                                        the call is
=============  =========================================  ==================================================
`TORCH`        exports, traces, nested tensors, and       made of torch's own calls, which inductor fuses: there the
               compilers where kernels are portable       operator would be in its way
`DISPATCHER`   compilers on mps, dispatch modes,          ``torch.ops.torch_fused_lora.<name>_forward``, which they
               autocast, profilers, functorch, tensor     want to see
               subclasses
`PORTABLE`     all else, on devices without kernels       the portable kernel, called from here
`DEVICE`       all else, on mps                           the kernel in C++
=============  =========================================  ==================================================

The last two are what the dispatcher would call, without its way from Python through C++ to Python and back. Where the
portable kernel is torch's own calls alone, autograd may follow these instead of a node of ours (`Operator.followed`).
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any, ClassVar, Final, NoReturn, TypeAlias

import torch
from torch import Tensor

from .. import torch_private
from ..mps import extension
from ..torch_private import (
    FakeTensor,
    any_autocast,
    below_autograd,
    dispatch_modes,
    is_exporting,
    is_legacy_batched,
    is_tracing,
    profiling,
    raw_saved_tensors,
    transformed,
)

NAMESPACE = "torch_fused_lora"
PORTABLE_DEVICES = ("cpu", "cuda", "xpu")  # device types whose kernels are the portable ones
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS", "xpu": "AutocastXPU"}
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))  # subclasses want to see the calls made with them
OWN_TYPES = PLAIN_TYPES | {NoneType, FakeTensor}  # of a module's own tensors: an export puts fake ones in their place

# Short names for the types of operators' arguments, as their schemas have them.
Maybe: TypeAlias = Tensor | None
Pair: TypeAlias = tuple[Tensor, Tensor]
Floats: TypeAlias = Sequence[float]
Ints: TypeAlias = Sequence[int]
Flags: TypeAlias = Sequence[bool]
Seed: TypeAlias = int | Tensor | None  # a number where no dispatcher is on the way, which takes tensors
Saved: TypeAlias = Any  # a tensor where a gradient that was asked for needs it, otherwise None

# ------------------------------------------------------------------------------------------------- the way of a call


class Route(enum.Enum):
    TORCH = enum.auto()
    DISPATCHER = enum.auto()
    PORTABLE = enum.auto()
    DEVICE = enum.auto()


# Read faster than an enumeration's members.
BY_TORCH: Final = Route.TORCH
BY_DISPATCHER: Final = Route.DISPATCHER
BY_PORTABLE: Final = Route.PORTABLE
BY_DEVICE: Final = Route.DEVICE

_STRIDED: Final = torch.strided  # read faster
_keeping = False  # for the whole process, as torch.export's own state is


@contextlib.contextmanager
def keep_operators() -> Iterator[None]:
    """A context in which exports and compiled code keep this package's operators in their graphs.

    Outside it `torch.export`, and what is built on it (ONNX, AOTInductor), sees torch's own calls only, so that the
    exported program runs where this package is not. One exported inside loads and runs where it is imported. So it is
    with `torch.compile` but on mps, since inductor fuses torch's calls better::

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


def route(x: Tensor) -> Route:
    """The way of a call with this x, if all its other operands are plain tensors and dense."""
    if torch.compiler.is_compiling():  # or exporting
        wanted = _keeping or (x.device.type not in PORTABLE_DEVICES and not is_exporting())
        return BY_DISPATCHER if wanted and not x.is_nested else BY_TORCH
    if is_tracing() or x.is_nested:
        return BY_TORCH
    device_type = device_type_of(x)
    if _watched(x, device_type):
        return BY_DISPATCHER
    return BY_PORTABLE if device_type in PORTABLE_DEVICES else BY_DEVICE if device_type == "mps" else BY_DISPATCHER


def device_type_of(x: Tensor) -> str:
    # x.device.type takes three times as long as all of these
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else "mps" if x.is_mps else x.device.type


def _watched(x: Tensor, device_type: str) -> bool:
    """Whether a subclass, a dispatch mode, autocast, a profiler, a functorch transform or forward-mode AD wants to see
    calls with x."""
    return (
        type(x) not in PLAIN_TYPES
        or x.layout is not _STRIDED
        or dispatch_modes() > 0
        or profiling()
        or transformed()
        or ((device_type not in ("cpu", "cuda") or any_autocast()) and autocast_enabled(device_type))
    )


def are_plain(*operands: Maybe) -> bool:
    """Whether these are dense tensors of no subclass, or None."""
    for operand in operands:
        if operand is not None and (type(operand) not in PLAIN_TYPES or operand.layout is not _STRIDED):
            return False
    return True


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; False where torch knows no autocast (it raises for meta)."""
    return device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


# ------------------------------------------------------------------------------------------------------ registration


def define(name: str, schema: str) -> None:
    """Define operator ``torch_fused_lora::name``."""
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=torch.Tag.pt2_compliant_tag)


def implement(name: str, function: Callable, *dispatch_keys: str) -> None:
    """Register a function as the operator's kernel at each dispatch key."""
    for key in dispatch_keys:
        torch.library.impl(f"{NAMESPACE}::{name}", key, function)


def _overload(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# A context in which autocast casts nothing: what an operator's own kernels run in.
_below_autocast = torch_private.below_autocast(AUTOCAST_KEYS)


def _autocast(name: str, cast: Callable[..., Sequence[object]]) -> None:
    """Register an operator at every autocast key: ``cast(device_type, *arguments)`` gives the arguments that its
    kernels get, which run below autocast."""
    operator = _overload(name)

    def below(device_type: str, *arguments: Any) -> Any:
        cast_arguments = cast(device_type, *arguments)
        with _below_autocast():
            return operator(*cast_arguments)

    def register(device_type: str, key: str) -> None:
        implement(name, lambda *arguments: below(device_type, *arguments), key)

    for device_type, key in AUTOCAST_KEYS.items():
        register(device_type, key)


def casting(operator: Any) -> list[str]:
    """The device types whose autocast casts the operands of one of torch's operators."""
    return [device_type for device_type, key in AUTOCAST_KEYS.items() if operator.has_kernel_for_dispatch_key(key)]


def to_float(x: Tensor) -> Tensor:
    """What torch's autocast makes of an argument that it casts to float32."""
    return x.float() if x.is_floating_point() and x.dtype != torch.float64 else x


class Operator:
    """Operators ``<name>_forward`` and ``<name>_backward``, registered for every way in which a call may come.

    A subclass says what they compute, and is made once. The forward's first result is the output; a second one
    serves the backward. The schemas have no default values: a dispatcher would drop them.
    """

    made: ClassVar[list[Operator]] = []

    name: str  # the public operator's
    schemas: tuple[str, str]  # of forward and backward; this returns Tensor[], or Tensor where there is one input
    inputs: int  # how many of the forward's leading arguments have gradients
    adds_to_first = False  # whether the first of them is a term of the output: its gradient, the output's, is passed on
    patch: str = ""  # what puts the operator under a model, for errors
    instead: str  # what to do where mps has no kernels, for errors

    @staticmethod
    def check(*arguments: Any) -> None:
        """Raise for arguments of the forward, dense tensors all, that do not fit together."""
        raise NotImplementedError

    @staticmethod
    def check_backward(*arguments: Any) -> None:
        """Raise for arguments of the backward that do not fit together."""
        raise NotImplementedError

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """The portable kernel, of arguments that fit. A second result is None where nothing needs it."""
        raise NotImplementedError

    @staticmethod
    def followed(*arguments: Any) -> Maybe:
        """The output by calls that autograd follows itself, where that takes less of the host's time than a node of the
        operator's does; else None. The arguments are those of `forward`, the inputs may require gradients."""
        return None

    @staticmethod
    def unneeded(*arguments: Any) -> Tensor:
        """What stands in the forward's results for a second one that nothing needs, of no elements."""
        raise NotImplementedError

    @staticmethod
    def backward(*arguments: Any) -> Sequence[Maybe]:
        """The portable kernel, of arguments that fit: a gradient for each input (but a first one that is added to),
        None if it was not asked for."""
        raise NotImplementedError

    @staticmethod
    def shapes(*arguments: Any) -> Any:
        """The forward's results, empty."""
        raise NotImplementedError

    @staticmethod
    def shapes_backward(*arguments: Any) -> Sequence[Maybe]:
        """The backward's results, empty."""
        raise NotImplementedError

    @staticmethod
    def twin(*arguments: Any) -> Any:
        """The forward in differentiable aten calls."""
        raise NotImplementedError

    @staticmethod
    def twin_backward(*arguments: Any) -> Sequence[Maybe]:
        """The backward in differentiable aten calls. Its second argument, which a double backward has, is the gradient
        of the forward's second result; the others are the backward's."""
        raise NotImplementedError

    @staticmethod
    def cast(device_type: str, *arguments: Any) -> Sequence[object]:
        """The forward's arguments as autocast has them."""
        raise NotImplementedError

    @staticmethod
    def record(kernel: Callable[..., Any], needs: Flags, *arguments: Any) -> tuple[Any, Sequence[Maybe], Any]:
        """Call a kernel of the forward where gradients will be asked for: its results, the tensors saved for backward,
        x or None first, and what else backward needs."""
        raise NotImplementedError

    @staticmethod
    def restore(saved: Any, rest: Any, needs: Flags, anew: bool) -> tuple[Any, ...]:
        """The backward's arguments after the gradient, of what `record` kept; ``anew``: what was made of x is made of
        it again, in differentiable calls, if x was saved."""
        raise NotImplementedError

    def __init__(self) -> None:
        self.made.append(self)
        forward, backward = f"{self.name}_forward", f"{self.name}_backward"
        for name, schema in zip((forward, backward), self.schemas, strict=True):
            define(name, schema)
        self._forward_operator, self._backward_operator = _overload(forward), _overload(backward)
        self._on_device = torch_private.kernel_of(self._forward_operator, "MPS")
        self._apply = torch_private.apply_of(_recorded(self))
        implement(forward, self._portable_forward, "CompositeExplicitAutograd")
        implement(forward, self._autograd_forward, "Autograd")
        implement(forward, self._twin_forward, "FuncTorchBatched")
        implement(backward, self._portable_backward, "CompositeExplicitAutograd")
        implement(backward, self._autograd_backward, "Autograd", "FuncTorchBatched")
        torch.library.register_fake(f"{NAMESPACE}::{forward}", self._fake_forward)
        torch.library.register_fake(f"{NAMESPACE}::{backward}", self._fake_backward)
        _autocast(forward, self.cast)
        _autocast(backward, lambda device_type, *arguments: arguments)

    def call(
        self, route: Route, caller: str | None, inputs: tuple[Any, ...], *options: Any, checked: bool = False
    ) -> Tensor:
        """The output of the inputs that have gradients and the other arguments, by the operator in any case. Errors of
        backward name ``caller``, the module that calls. ``checked``: dtypes and layouts are known to fit; shapes
        that do not, aten's own calls refuse."""
        if route is BY_PORTABLE:
            if not checked:
                self.check(*inputs, *options)
            kernel = self.forward
        elif route is BY_DEVICE:
            kernel = self._on_device
        else:
            return _tell_caller(_output(self._forward_operator(*inputs, *options)), caller)
        try:
            if route is BY_PORTABLE and (y := self.followed(*inputs, *options)) is not None:
                return y
            if torch.is_grad_enabled() and _record(inputs):
                return _output(self._apply(*inputs, (kernel, caller, False, options)))
            return _output(kernel(*inputs, *options))
        except (RuntimeError, IndexError):  # a kernel in C++ can raise no other
            self._check_forward(*inputs, *options)  # says it as everywhere
            raise

    def autocast(self, *tensors: Any) -> Any:
        """The forward's leading tensors as its kernels get them, for a call by torch's own calls."""
        like: Tensor = tensors[0]
        device_type = like.device.type
        return self.cast(device_type, *tensors) if autocast_enabled(device_type) else tensors

    def _below_autograd(self, *arguments: Any) -> Any:
        try:
            with below_autograd():
                return self._forward_operator(*arguments)
        except RuntimeError:
            self._check_forward(*arguments)
            raise

    def _autograd_forward(self, *arguments: Any) -> Any:
        if transformed():
            return self._twin_forward(*arguments)
        inputs, options = arguments[: self.inputs], arguments[self.inputs :]
        if torch.is_grad_enabled() and _record(inputs):
            return self._apply(*inputs, (self._below_autograd, None, True, options))
        return self._below_autograd(*arguments)

    def _twin_forward(self, *arguments: Any) -> Any:
        self._check_forward(*arguments)
        return self.twin(*arguments)

    def _autograd_backward(self, *arguments: Any) -> Any:
        if transformed() or (torch.is_grad_enabled() and _record(arguments)):
            grad, *rest = arguments
            return self._found(self.twin_backward(grad, None, *rest))
        try:
            with below_autograd():
                return self._backward_operator(*arguments)
        except RuntimeError:
            self._check_backward(*arguments)
            raise

    def _portable_forward(self, x: Tensor, *arguments: Any) -> Any:
        self._refuse_mps(x)
        self._check_forward(x, *arguments)
        results = self.forward(x, *arguments)
        if isinstance(results, Tensor):
            return results
        y, second = results
        return y, self.unneeded(x, *arguments) if second is None else second

    def _portable_backward(self, *arguments: Any) -> Any:
        self._check_backward(*arguments)
        return self._found(self.backward(*arguments))

    def _fake_forward(self, *arguments: Any) -> Any:
        self._check_forward(*arguments)
        return self.shapes(*arguments)

    def _fake_backward(self, *arguments: Any) -> Any:
        self._check_backward(*arguments)
        return self._found(self.shapes_backward(*arguments))

    def _check_forward(self, *arguments: Any) -> None:
        _refuse_sparse(self.name, self.schemas[0], arguments)
        self.check(*arguments)

    def _check_backward(self, *arguments: Any) -> None:
        _refuse_sparse(f"{self.name}_backward", self.schemas[1], arguments)
        self.check_backward(*arguments)

    def _found(self, gradients: Sequence[Maybe]) -> Any:
        """As the backward's schema has them: its Tensor[] holds those that were asked for."""
        found = [gradient for gradient in gradients if gradient is not None]
        return found if self.inputs > 1 else found[0]

    def gradients(self, grad: Tensor, arguments: tuple[Any, ...], needs: Flags) -> Sequence[Maybe]:
        """One for each input, by the backward operator."""
        with below_autograd():
            found = self._backward_operator(grad, *arguments)
        if self.inputs == 1:
            return (found,)
        each = iter(found)
        return [next(each) if need else None for need in needs]

    def _refuse_mps(self, x: Tensor) -> None:
        """The portable kernel is called on mps where no extension has registered one of its own; and for a sparse x,
        which is refused by name."""
        if x.device.type == "mps" and x.layout is torch.strided:
            raise NotImplementedError(
                f"{self.name}: device 'mps' needs this package's Metal extension, and {extension.reason}; "
                f"or {self.instead}"
            )


def _output(results: Any) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]


def _record(arguments: Sequence[Any]) -> bool:
    for argument in arguments:  # noqa: SIM110  (any() of a generator takes three times as long)
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False


def _recorded(operator: Operator) -> type[torch.autograd.Function]:
    """The operator as a node of the autograd graph."""

    class Recorded(torch.autograd.Function):
        # The classic form, forward(ctx, ...): with setup_context apart a call costs about twice as much.

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            # What has no gradient goes as one argument: each has its cost, both ways.
            *inputs, (kernel, caller, whole, options) = arguments
            results, saved, rest = operator.record(kernel, ctx.needs_input_grad[:-1], *inputs, *options)
            ctx.save_for_backward(*saved)
            ctx.rest = rest, caller, kernel is operator.forward
            if isinstance(results, Tensor):
                return results
            y, second = results
            # A double backward makes the second result anew of x, or, where x is not saved, asks for its gradient.
            differentiable = saved[0] is None and second is not None and second.numel() > 0
            if not (whole or differentiable):
                return y
            ctx.set_materialize_grads(False)
            ctx.like = y.shape, y.dtype
            if not differentiable:
                ctx.mark_non_differentiable(second)
            return results

        @staticmethod
        def backward(ctx: Any, grad: Any, grad_second: Maybe = None) -> tuple[Maybe, ...]:
            if grad is None:
                if grad_second is None:
                    return (None,) * (operator.inputs + 1)
                shape, dtype = ctx.like
                grad = grad_second.new_zeros(shape, dtype=dtype)
            rest, caller, portable = ctx.rest
            try:
                saved = ctx.saved_tensors
            except RuntimeError as error:
                _explain_change(error, ctx, operator, caller)
                raise
            needs = ctx.needs_input_grad[operator.adds_to_first : -1]
            # The vmap of `torch.autograd.grad(is_grads_batched=True)`, older than torch.func's, knows aten calls only.
            if grad_second is not None or torch.is_grad_enabled() or is_legacy_batched(grad):
                with _below_autocast():
                    arguments = operator.restore(saved, rest, needs, True)
                    found = operator.twin_backward(grad, grad_second, *arguments)
            else:
                arguments = operator.restore(saved, rest, needs, False)
                if portable and not _watched(grad, device_type_of(grad)):
                    found = operator.backward(grad, *arguments)
                else:
                    found = operator.gradients(grad, arguments, needs)
            if operator.adds_to_first:
                return grad if ctx.needs_input_grad[0] else None, *found, None
            return *found, None

    Recorded.__name__ = Recorded.__qualname__ = operator.name
    return Recorded


def savable(x: Tensor) -> Tensor:
    """An input, or a copy of one made under inference mode, which autograd refuses to save."""
    return x.clone() if x.is_inference() else x


# -------------------------------------------------------------------------------------------------------------- errors


def refuse(operator: str, name: str, value: object, expected: str) -> NoReturn:
    """Raise ValueError: what an operator expected of an argument, and what it got."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{value.layout}, "
        value = f"{layout}shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    raise ValueError(f"{operator}: {name}: expected {expected}; got {value}")


def _refuse_sparse(operator: str, schema: str, arguments: Sequence[Any]) -> None:
    """Raise ValueError for the first of an operator's tensors that is not dense."""
    for parameter, argument in zip(schema.split(")")[0].split(", "), arguments, strict=True):
        if isinstance(argument, Tensor) and argument.layout is not torch.strided and not argument.is_nested:
            refuse(operator, parameter.split(" ")[-1], argument, "a dense tensor")


def _tell_caller(y: Tensor, caller: str | None) -> Tensor:
    """Leave a patched module's name where `_explain_change` finds it, for a call that goes by the dispatcher: with the
    node of the autograd graph that made ``y``."""
    if not torch.compiler.is_compiling() and caller and y.requires_grad:  # a compiler would guard the name
        node: Any = y.grad_fn
        node.metadata["caller"] = caller
    return y


def _explain_change(error: RuntimeError, ctx: Any, operator: Operator, caller: str | None) -> None:
    """Where an error says that a saved tensor was changed in place, and it was x, the first of them: raise one that
    names the module, if it is one that a patch made call the operator, and the remedy."""
    if "modified by an inplace operation" not in str(error):  # freed
        return
    what = _changed_input(ctx)
    if what is None:
        return
    caller = caller or ctx.metadata.get("caller")
    who, remedy = operator.name, "give it x.clone()"
    if caller:
        who, remedy = caller, f"{operator.patch}(model, copy_input=True)"
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
