"""LoRA as a module, for models that do not use PEFT."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops.lora_linear import lora_linear
from .ops.rows import HALF


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter: ``x Wᵀ + b + (lora_alpha / r) · dropout(x) Aᵀ Bᵀ``.

    lora_A (r, in_features) starts Kaiming-uniform and lora_B (out_features, r) at zero, so that a new layer
    computes what its base did (arXiv:2106.09685). ``state_dict`` keys: weight, bias, lora_A, lora_B; it always
    holds the unmerged weight, merged or not, and loading one unmerges the layer.

    Args:
        in_features, out_features: K and N of the base layer.
        r: rank, at least 1.
        lora_alpha: the adapter is scaled by ``lora_alpha / r``.
        lora_dropout: probability in [0, 1) that an element of the adapter's input is dropped in training.
        bias: whether the base has a bias.
        device, dtype: of every parameter, as in `torch.nn.Linear`.
        adapter_dtype: of lora_A and lora_B; float32 over a half-precision base by default, as in PEFT.

    Raises:
        TypeError: r is not an int, or lora_alpha or lora_dropout not a number.
        ValueError: r below 1, or lora_dropout outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._setup(base, r, lora_alpha, lora_dropout, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """An adapter on ``linear``, whose weight and bias are shared, not copied, and frozen.

        Raises:
            TypeError: ``linear`` is not an `nn.Linear`, or its weight is packed words; as the constructor.
            ValueError: as the constructor.
        """
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._setup(linear, r, lora_alpha, lora_dropout, adapter_dtype)
        return layer.train(linear.training)

    def _setup(
        self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, adapter_dtype: torch.dtype | None
    ) -> None:
        if not isinstance(r, int) or isinstance(r, bool):
            raise TypeError(f"r: expected an int, got {r!r}")
        for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if r < 1:
            raise ValueError(f"r: expected a rank of at least 1, got {r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected a probability in [0, 1), got {lora_dropout}")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.merged = False
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias if base.bias is None else base.bias.requires_grad_(False)
        dtype = adapter_dtype or (torch.float32 if base.weight.dtype in HALF else base.weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=base.weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=base.weight.device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the adapter afresh; the layer then computes what its base does."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        """``lora_alpha / r``."""
        return self.lora_alpha / self.r

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        return lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, self.lora_dropout, self.training
        )

    def merge(self) -> None:
        """Add the adapter to the weight, in place, so that inference costs what the base costs. Repeats do nothing."""
        if not self.merged:
            self.weight.data.copy_(self._weight_plus(self.scaling))
            self.merged = True

    def unmerge(self) -> None:
        """Subtract the adapter again; merging and unmerging rounds the weight twice to its dtype."""
        if self.merged:
            self.weight.data.copy_(self._weight_plus(-self.scaling))
            self.merged = False

    @torch.no_grad()
    def _weight_plus(self, scale: float) -> Tensor:
        """``weight + scale · lora_B lora_A`` in float32, or float64."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.to(wide) @ self.lora_A.to(wide)).mul_(scale).add_(self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self._weight_plus(-self.scaling).to(self.weight.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        text += f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        return text + (", merged" if self.merged else "")
