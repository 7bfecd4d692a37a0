"""How far a patched model is from stock PEFT, in units of what rounding may do to it.

A unit is how far the model gets if all its LoRA layers are off by as much as rounding allows (`Roughly`): what it makes
of such errors, in its loss and in its gradients, is seen, not guessed, and no tolerance is chosen.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import torch_fused_lora as tfl
from tests.models.sweep.architectures import step
from tests.reference import UNIT

DRAWS = 3  # of errors, of which the worst counts


@dataclasses.dataclass
class Differences:
    """Between a stock and a patched model, in units of what rounding may do to it."""

    loss: float
    gradients: float  # the worst parameter's
    seen: float  # the unit of the whole gradient, relative to it: the smallest error that is seen


def layers_of(model: nn.Module) -> list[lora.Linear]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def differences(model: nn.Module, batch: dict[str, Tensor]) -> Differences:
    """Patch a model, and tell what it makes of that."""
    stock = step(model, batch)
    units = {what: UNIT[value.dtype] * float(_norm(value)) for what, value in stock.items()}
    raise_to(units, stock, step(model, batch))  # itself not always the same
    GENERATOR.manual_seed(0)
    for _ in range(DRAWS):
        for layer in layers_of(model):
            be_rough(layer)
        raise_to(units, stock, step(model, batch))
        for layer in layers_of(model):
            del layer.forward
    tfl.patch_peft(model)
    patched = step(model, batch)
    if patched.keys() != stock.keys():
        raise AssertionError(f"gradients of {stock.keys() ^ patched.keys()}")
    ratios = {what: _off_by(value, patched[what]) / max(units[what], 1e-300) for what, value in stock.items()}
    loss = ratios.pop("loss")
    seen = math.hypot(*(units[what] for what in ratios)) / math.hypot(*(float(_norm(stock[what])) for what in ratios))
    return Differences(loss, max(ratios.values()), seen)


def raise_to(units: dict[str, float], stock: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Stock's and the patched model's errors may go in opposite directions: twice one's."""
    units.update({what: max(unit, 2 * _off_by(stock[what], other[what])) for what, unit in units.items()})


def _off_by(expected: Tensor, actual: Tensor) -> float:
    difference = float(_norm(expected - actual))
    return math.inf if math.isnan(difference) else difference


def output(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: float) -> Tensor:
    return nn.functional.linear(x, weight, bias) + s * (x @ lora_A.T) @ lora_B.T


def gradients(grad: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, s: float) -> list[Tensor]:
    """Of x, lora_A and lora_B; x and grad are matrices."""
    z = s * grad @ lora_B
    return [grad @ weight + z @ lora_A, z.T @ x, s * grad.T @ (x @ lora_A.T)]


class Roughly(torch.autograd.Function):
    """A LoRA layer and its gradients, each element off by all that rounding may do to it, up or down at random.

    A sum of n products is off by at most n u times the sum of their magnitudes (tests/reference.py), which is what the
    same formula makes of the operands' magnitudes.
    """

    @staticmethod
    def forward(ctx, *operands):
        x, _, bias, lora_A, _, _ = operands
        ctx.save_for_backward(*(t for t in operands[:-1] if t is not bias))
        ctx.scaling = operands[-1]
        return _off(output(*operands), output(*map(_abs, operands)), x.shape[-1] + len(lora_A))

    @staticmethod
    def backward(ctx, grad):
        x, *matrices = *ctx.saved_tensors, ctx.scaling
        operands = grad.flatten(0, -2), x.flatten(0, -2), *matrices
        (M, N), K, r = operands[0].shape, x.shape[-1], len(matrices[1])
        found = zip(gradients(*operands), gradients(*map(_abs, operands)), (N + r, M + N, M + K), strict=True)
        dx, dA, dB = (_off(*parts) for parts in found)
        return dx.reshape(x.shape), None, None, dA, dB, None


def _abs(operand: Tensor | float | None) -> Tensor | float | None:
    return None if operand is None else abs(operand)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor)


def _off(exact: Tensor, magnitude: Tensor, terms: int) -> Tensor:
    sign = torch.randint(0, 2, exact.shape, generator=GENERATOR) * 2 - 1
    return exact + sign * magnitude * (terms + 8) * UNIT[exact.dtype]


GENERATOR = torch.Generator()  # its own: models may draw, too


def be_rough(layer: lora.Linear) -> None:
    """Until its `forward` is deleted, a layer computes roughly."""

    def forward(x: Tensor) -> Tensor:
        base, A, B = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = base.weight.T if type(base) is Conv1D else base.weight
        return Roughly.apply(x, weight, base.bias, A, B, layer.scaling["default"])

    layer.forward = forward
