"""What lora_linear, lora_linear_quantized and lora_delta keep of a call for its backward, and give to that."""

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
    the adapters are the last, scaling, h, seed, dropout_p, ranks, others and needs. Of a call by the portable kernel,
    scaling and seed may be numbers."""

    operands: int  # how many of them
    patch = "patch_peft"

    @staticmethod
    def kept(results: Any, operands: tuple[Any, ...], need_h: bool, scaling: float | Tensor, *options: Any) -> Any:
        """What `record` returns."""
        is_tensor = isinstance(scaling, Tensor)
        saved = *operands, results[1] if need_h else None, scaling if is_tensor else None
        return results, saved, (None if is_tensor else scaling, *options)

    @staticmethod
    def restore(saved: Any, rest: Any, needs: Flags, anew: bool) -> tuple[Any, ...]:
        x, *others, h, saved_scaling = saved
        scaling, seed, dropout_p, ranks, *options = rest
        if anew and x is not None and h is not None:
            h = differentiable.low_rank(x, others[-2], seed, dropout_p, ranks)
        if saved_scaling is not None:
            scaling = saved_scaling
        return x, *others, scaling, h, seed, dropout_p, ranks, *options, needs

    def gradients(self, grad: Tensor, arguments: tuple[Any, ...], needs: Flags) -> Sequence[Maybe]:
        operands, (scaling, h, seed, *options) = arguments[: self.operands], arguments[self.operands :]
        return super().gradients(grad, (*operands, as_scaling(scaling, grad), h, as_seed(seed), *options), needs)
