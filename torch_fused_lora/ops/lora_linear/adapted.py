"""What lora_linear, lora_linear_quantized and lora_delta give to their backward, of what they kept of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import dispatch
from ..dispatch import Flags, Maybe
from ..dropout import as_seed
from . import differentiable
from .arguments import as_scaling


class Adapted(dispatch.Operator):
    """An operator with adapters. Its backward's arguments are the gradient, ``operands``, of which x is the first and
    the adapters are the last, scaling, h, seed, dropout_p, ranks, others and needs. `record` saves the operands, h, and
    a scaling that is a tensor, or None; the rest is a scaling that is none, or None, and a tuple of what comes after h
    but for needs. Of a call by the portable kernel, scaling and seed may be numbers."""

    operands: int  # how many of them
    patch = "patch_peft"

    @staticmethod
    def restore(saved: Any, rest: Any, needs: Flags, anew: bool) -> tuple[Any, ...]:
        operands, h, saved_scaling = saved[:-2], saved[-2], saved[-1]
        scaling, options = rest
        if anew and operands[0] is not None and h is not None:
            h = differentiable.low_rank(operands[0], operands[-2], *options[:3])
        return *operands, scaling if saved_scaling is None else saved_scaling, h, *options, needs

    def gradients(self, grad: Tensor, arguments: tuple[Any, ...], needs: Flags) -> Sequence[Maybe]:
        operands, (scaling, h, seed, *options) = arguments[: self.operands], arguments[self.operands :]
        return super().gradients(grad, (*operands, as_scaling(scaling, grad), h, as_seed(seed), *options), needs)
