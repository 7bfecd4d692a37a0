"""The first answer to "my loss differs": every patched layer of a model, computed both ways on what it is given."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import hooks, linear4bit, peft
from .affine import Packed
from .decide import bytes_of, plain_base
from .ops.dispatch import autocast_enabled
from .ops.rows import HALF, wide_dtype
from .report import Calls, pattern

_ROUNDINGS = 4  # to a half dtype, of each way at most: of h, of the term, of it scaled (or of the base), of the sum


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """Of one layer: the worst difference between the two ways over its bound, by tensor ("y", and, as gradients, "x",
    "<adapter>.lora_A", "<adapter>.lora_B"); none where its call was PEFT's own, for a ``reason``."""

    errors: dict[str, float]
    reason: str | None = None

    @property
    def ok(self) -> bool:
        return all(error <= 1.0 for error in self.errors.values())  # not so for NaN

    def __str__(self) -> str:
        if self.reason is not None:
            return f"PEFT's own forward: {self.reason}"
        return ", ".join(f"{name} {error:.2g}" for name, error in self.errors.items())


class CheckReport(dict[str, LayerCheck]):
    """`LayerCheck` by the layer's name; ``print`` shows the worst of each kind of layer. ``ok``: none is off."""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.values())

    def __str__(self) -> str:
        off = [name for name, check in self.items() if not check.ok]
        lines = [
            f"{len(self)} layers both ways, {len(off)} off; differences as shares of their bounds, worst of a kind:"
        ]
        kinds: dict[str, list[str]] = {}
        for name in self:
            kinds.setdefault(pattern(name), []).append(name)
        width = max(map(len, kinds), default=0)
        for kind, names in kinds.items():
            worst = max(names, key=lambda name: (not self[name].ok, max(self[name].errors.values(), default=-1.0)))
            lines.append(f"  {len(names):>4} x {kind:<{width}}  {self[worst]}")
        return "\n".join([*lines, *(f"  off: {name}: {self[name]}" for name in off)])


def check_peft(model: nn.Module, *args: Any, **batch: Any) -> CheckReport:
    """Call ``model(*args, **batch)``, and in it each patched layer both ways, PEFT's own and this package's, with the
    same input and the same random gradient; print and return how far output and gradients differ.

    A share of 1 is what rounding explains: twice the bound of one way, (n u / (1 - n u) + 4 v) times the magnitude of
    what is summed, with n terms summed with unit roundoff u, of float32 or float64, and v that of a half dtype that is
    rounded to. Dropout is off for the time of the check, since the two ways draw different masks. Parameters and their
    gradients stay as they are.

    Args:
        model: a model that `patch_peft` has patched.
        args, batch: what to call it with: a batch of its training data.

    Returns:
        A `CheckReport` of the layers that were called; ``report.ok`` says whether all are within their bounds.

    Raises:
        ValueError: no layer of ``model`` is patched.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, peft.Fused)}
    if not layers:
        raise ValueError("model: expected one that torch_fused_lora.patch_peft has patched, got none of its layers")
    report = CheckReport()

    def compare(name: str, layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if name not in report:
            report[name] = _compare(layer, inputs, keywords)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_dropout(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled calls are PEFT's both ways
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(
                lambda layer, inputs, keywords, name=name: compare(name, layer, inputs, keywords), with_kwargs=True
            )
            stack.callback(hook.remove)
        with torch.no_grad():
            model(*args, **batch)
    print(report)
    return report


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    try:
        for module in dropouts:
            module.eval()
        yield
    finally:
        for module in dropouts:
            module.train()


def _compare(layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> LayerCheck:
    if keywords or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return LayerCheck({}, "it is called with more than x")
    if not inputs[0].is_floating_point():
        return LayerCheck({}, f"x is {inputs[0].dtype}")
    x = inputs[0].detach().requires_grad_()
    cls, counted, layer._calls = type(layer), layer._calls, Calls()
    try:
        with torch.enable_grad():
            y = _forward(layer, x)
            layer.__class__ = layer._original
            own_y = _forward(layer, x)
        reason = layer._calls.reason
    finally:
        layer.__class__, layer._calls = cls, counted
    if reason is not None:
        return LayerCheck({}, reason)
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    parts = {f"{name}.lora_{side}": getattr(layer, f"lora_{side}")[name].weight for name in names for side in "AB"}
    leaves = {"x": x, **{name: part for name, part in parts.items() if part.requires_grad}}
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device, y.dtype)
    both = [torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True) for out in (y, own_y)]
    pairs = {"y": (y, own_y), **dict(zip(leaves, zip(*both, strict=True), strict=True))}
    modules = [getattr(layer, f"lora_{side}")[name] for name in names for side in "AB"]
    with hooks.running([layer, *modules], x.detach()):
        bounds = _bounds(layer, names, x.detach(), own_y.detach(), both[1][0], grad)
    return LayerCheck({name: _share(*pair, bound=bounds[name]) for name, pair in pairs.items() if pair[0] is not None})


def _forward(layer: Any, x: Tensor) -> Tensor:
    """What a layer makes of x, with the same random numbers each time, if its base draws any."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        y: Tensor = layer.forward(x)
    return y


def _share(ours: Tensor, theirs: Tensor, *, bound: Tensor) -> float:
    ours, theirs = ours.detach().to(bound.dtype), theirs.detach().to(bound.dtype)
    difference = (ours - theirs).abs().reshape(bound.shape)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinities, too
    share = (difference / bound.clamp_min(torch.finfo(bound.dtype).tiny)).masked_fill(same.reshape(bound.shape), 0.0)
    return float(share.max()) if share.numel() else 0.0


def _bounds(layer: Any, names: list[str], x: Tensor, y: Tensor, grad_x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """How far the two ways may be apart, by tensor."""
    dtypes = {x.dtype, y.dtype, *(layer.lora_A[name].weight.dtype for name in names)}
    if isinstance(read := bytes_of(layer.base_layer), linear4bit.Read):
        dtypes |= {read.dtype, read.stored} - {None}
    if autocast_enabled(x.device.type):
        dtypes.add(torch.get_autocast_dtype(x.device.type))
    wide = wide_dtype(x.dtype)
    unit = torch.finfo(wide).eps / 2
    narrow = max((torch.finfo(dtype).eps / 2 for dtype in dtypes & HALF), default=0.0)

    def magnitude(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1, tensor.shape[-1]).to(wide).abs()

    def bound(size: Tensor, terms: int) -> Tensor:
        n = terms + 8  # scaling, bias and the like
        return 2 * (n * unit / (1 - n * unit) + _ROUNDINGS * narrow) * size

    rows, grads = magnitude(x), magnitude(grad)
    (M, K), N = rows.shape, grads.shape[1]
    of_y, of_x, rank, bounds = torch.zeros_like(grads), torch.zeros_like(rows), 0, {}
    for name in names:
        A, module_B = magnitude(layer.lora_A[name].weight), layer.lora_B[name]
        B, scaling = magnitude(module_B.weight), abs(float(layer.scaling[name]))
        h, z = rows @ A.T, scaling * grads @ B
        of_y += scaling * h @ B.T
        of_x += z @ A
        if module_B.bias is not None:
            of_y += scaling * magnitude(module_B.bias)
        rank += len(A)
        bounds[f"{name}.lora_A"], bounds[f"{name}.lora_B"] = (
            bound(z.T @ rows, M + N),
            bound(scaling * grads.T @ h, M + K),
        )
    base = plain_base(layer.base_layer)
    if base is None:  # what it makes is the same both ways, and no larger than the sum and the term together
        of_y, of_x = 2 * of_y + magnitude(y), 2 * of_x + magnitude(grad_x)
    else:
        weight, bias = base
        weight = magnitude(weight.dequantize(wide) if isinstance(weight, Packed) else weight)
        of_y, of_x = of_y + rows @ weight.T, of_x + grads @ weight
        if bias is not None:
            of_y += magnitude(bias)
    return bounds | {"y": bound(of_y, K + rank), "x": bound(of_x, N + rank)}
