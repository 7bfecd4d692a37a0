"""The LoRA layer in plain calls."""

from __future__ import annotations

from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor = 1.0,
    mask: Tensor | float = 1.0,
) -> Tensor:
    """``mask``: what dropout multiplies x with."""
    base = x @ weight.mT
    if bias is not None:
        base = base + bias
    return base + scaling * ((mask * x) @ lora_A.mT @ lora_B.mT)
