"""How far rounding in float32 can move what a whole model computes, to first order (Linnainmaa, BIT 16, 1976).

The model runs in float64. To the result of every operation that rounds, a zero is added that autograd knows; what the
operation's rounding can make of it is at most its scale. The bound of an output is then the sum, over all operations,
of |d output / d zero| times the scale: gamma_n times the product of absolute values for a sum of n products (see
reference.py), and a few units roundoff of the result elsewhere. It holds for every order of summation, and for every
implementation that rounds no more than ``FEW`` times where the model has one operation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.reference import UNIT

U = UNIT[torch.float32]
FEW = 4  # roundings of an elementwise operation, and units in the last place of a library's functions
PRODUCTS = {"linear", "matmul"}
SUMS = {"mean", "sum"}
ACTIVATIONS = {"silu", "gelu", "tanh"}  # where terms cancel, a unit roundoff of the input is left
ELEMENTWISE = {"add", "sub", "mul", "div", "pow", "rsqrt"}


class InDouble(TorchFunctionMode):
    """Computes in float64 what asks for float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return self.computed(func(*args, **kwargs), func, args, kwargs)

    def computed(self, result, func, args, kwargs):
        return result


class Rounding(InDouble):
    """Records where float32 would round, and how far."""

    def __init__(self):
        super().__init__()
        self.zeros: list[Tensor] = []
        self.scales: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._set_grad_enabled:  # rotary embeddings are made without autograd
            return None
        return super().__torch_function__(func, types, args, kwargs)

    def rounded(self, result: Tensor, scale: Tensor) -> Tensor:
        zero = torch.zeros_like(result, requires_grad=True)
        self.zeros.append(zero)
        self.scales.append(scale.detach().clamp_max(1e30))  # a mask's, whose gradient is zero
        return result + zero

    def computed(self, result, func, args, kwargs):
        if isinstance(result, Tensor) and result.dtype is torch.float64:
            scale = _scale(func.__name__, result.detach(), func, args, kwargs)
            return result if scale is None else self.rounded(result, scale)
        return result

    def bound(self, output: Tensor) -> Tensor:
        """Of each element of an output that was computed under this mode."""
        bounds = []
        for element in output.flatten():
            grads = torch.autograd.grad(element, self.zeros, retain_graph=True, allow_unused=True)
            terms = [(g.abs() * s).sum() for g, s in zip(grads, self.scales, strict=True) if g is not None]
            bounds.append(torch.stack(terms).sum())
        return torch.stack(bounds).view_as(output)


def _scale(name, result, func, args, kwargs) -> Tensor | None:
    """The most by which float32 can miss an operation's result; None for one that does not round."""
    x = args[0].detach() if args and isinstance(args[0], Tensor) else None
    if name in PRODUCTS | SUMS:
        absolute = [arg.detach().abs() if isinstance(arg, Tensor) else arg for arg in args]
        terms = x.shape[-1] if name in PRODUCTS else x.numel() // result.numel()
        return _gamma(terms + 1) * func(*absolute, **kwargs)
    if name == "softmax":
        reach = (x.amax(-1, keepdim=True) - x).clamp_max(100.0)  # beyond that, exp is zero in float32
        return U * (reach + x.shape[-1] + 2 * FEW) * result
    if name == "layer_norm":
        weight, bias, eps = kwargs["weight"], kwargs["bias"], kwargs["eps"]
        centred = x.abs() + x.mean(-1, keepdim=True).abs()
        scaled = 2 * centred * (x.var(-1, keepdim=True, correction=0) + eps).rsqrt() * weight.abs()
        return _gamma(2 * x.shape[-1] + FEW) * (scaled + bias.abs())
    if name in ACTIVATIONS:
        return 2 * FEW * U * x.abs()
    if name in ("cos", "sin"):
        return FEW * U * torch.ones_like(result)
    return FEW * U * result.abs() if name in ELEMENTWISE else None


def _gamma(n: int) -> float:
    return n * U / (1 - n * U)


def rotary_(mode: Rounding, model: torch.nn.Module) -> None:
    """Let a model's rotary frequencies round as a library makes them: base ** -(i / d), whose exponent rounds, too."""
    for module in model.modules():
        for name, frequencies in list(module._buffers.items()):
            if name.endswith("inv_freq"):
                spread = math.log(float((frequencies.max() / frequencies.min()).detach())) + FEW
                setattr(module, name, mode.rounded(frequencies, U * spread * frequencies))
