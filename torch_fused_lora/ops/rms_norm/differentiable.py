"""The RMS norm in differentiable aten calls: for torch.func, forward-mode AD, double backward and exports."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Flags, Maybe, Pair, Saved
from ..rows import flat, wide_dtype


def forward(x: Tensor, weight: Maybe, eps: float) -> Pair:
    rstd = rstd_of(x, eps)
    y = x * rstd
    return (y if weight is None else y * weight).to(x.dtype).contiguous(), rstd


def rstd_of(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.to(wide_dtype(x.dtype)).square().mean(-1, keepdim=True) + eps)


def backward(grad: Tensor, _: None, x: Tensor, weight: Saved, rstd: Tensor, needs: Flags) -> tuple[Maybe, Maybe]:
    """dx = rstd (g w - x̂ mean(g w x̂)) and dweight = Σ g x̂ with x̂ = x rstd."""
    normed = x * rstd
    dx = dweight = None
    if needs[0]:
        scaled = grad.to(rstd.dtype) if weight is None else grad * weight.to(rstd.dtype)
        mean = (scaled * normed).mean(-1, keepdim=True)
        dx = ((scaled - normed * mean) * rstd).to(x.dtype).contiguous()
    if needs[1]:
        dweight = flat(grad * normed).sum(0).to(weight.dtype)
    return dx, dweight
