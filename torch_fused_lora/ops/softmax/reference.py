"""softmax along the last dimension in plain calls."""

from __future__ import annotations

from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    powers = (x - x.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)
