"""The layer in float64, and how far from it an implementation may be.

Every bound is derived, none tuned. With u the unit roundoff of the summing dtype, a sum of n products in any
order and association is within n u / (1 - n u) times the sum of the products' magnitudes (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., section 3.1); each rounding to a narrower dtype adds its own unit
roundoff times what is rounded. `Exact` carries a value together with that sum of magnitudes.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 0.0, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
HALF = (torch.bfloat16, torch.float16)
NARROW = (torch.float32, *HALF)  # what every device has
MIXED = [(dtype, torch.float32) for dtype in NARROW] + [(dtype, dtype) for dtype in HALF]  # x and base, adapters
# On mps a base product of so many terms or more is added up in parts of so many (csrc/mps/products.mm).
LONG_SUM, PART = 32_767, 32_704


@dataclasses.dataclass
class Exact:
    """A float64 value, the sum of magnitudes it is made of, the length of its longest sums, and what was rounded
    to the layer's dtype on the way (as magnitudes)."""

    value: Tensor
    magnitude: Tensor
    terms: int
    rounded: Tensor | float = 0.0

    def reshape(self, *shape: int) -> Exact:
        parts = (t.reshape(shape) if isinstance(t, Tensor) else t for t in (self.value, self.magnitude, self.rounded))
        value, magnitude, rounded = parts
        return Exact(value, magnitude, self.terms, rounded)

    def bound(self, dtype: torch.dtype) -> Tensor:
        """How far a result of ``dtype`` may be off: sums in float32 (float64 for float64), then its roundings."""
        unit = UNIT[torch.float32 if dtype in HALF else dtype]
        n = self.terms + 8  # scaling, dropout factor, bias, the final addition and conversions
        error = n * unit / (1 - n * unit) * self.magnitude
        if dtype in HALF:
            half = UNIT[dtype]
            error = error + half * (1 + 2 * half) * (self.value.abs() + self.rounded + error) + 2 * SMALLEST[dtype]
        return error + 4 * SMALLEST[torch.float32]

    def check(self, actual: Tensor, what: str = "y") -> None:
        """Assert that ``actual`` is within the bound everywhere; NaN never is."""
        assert actual.shape == self.value.shape, f"{what}: shape {actual.shape}, expected {self.value.shape}"
        error = (actual.cpu().double() - self.value).abs()
        bound = self.bound(actual.dtype)
        bad = ~(error <= bound)
        assert not bad.any(), (
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are off; worst error / bound "
            f"{(error / bound.clamp_min(1e-300)).max():.3g}"
        )


@dataclasses.dataclass
class Layer:
    """The operands of one call, with the float64 reference of its output and gradients.

    ``masks``: for each adapter its slice of the rank and what multiplies x on its way into lora_A (None: 1).
    ``launches`` add to y, and to dx, one after the other: all but the last round what the next one adds to.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    masks: list[tuple[slice, Tensor | None]] = dataclasses.field(default_factory=lambda: [(slice(None), None)])
    launches: int = 1

    def _operands(self) -> tuple[Tensor, ...]:
        operands = (self.x, self.weight, self.lora_A, self.lora_B)
        x, W, A, B = (t.detach().cpu().double() for t in operands)
        b = self.bias.detach().cpu().double() if self.bias is not None else x.new_zeros(len(W))
        return x.reshape(math.prod(x.shape[:-1]), W.shape[1]), W, b, A, B

    def _h(self, x: Tensor, A: Tensor) -> Tensor:
        parts = [(x if mask is None else x * mask) @ A[rank].T for rank, mask in self.masks]
        return torch.cat(parts, 1)

    def output(self) -> Exact:
        """y = x Wᵀ + b + s x̃ Aᵀ Bᵀ. A half base product is rounded; so is h where the adapters are half.

        On mps the bias of a single row, or of a long sum, is added to what is rounded already.
        """
        x, W, b, A, B = self._operands()
        product, off = self._product(x, W.T)
        if self.x.is_mps and self.bias is not None and (len(x) == 1 or x.shape[1] >= LONG_SUM):
            off = self._round(product, off)
        base, s = product + b, float(self.scaling)
        delta_magnitude = abs(s) * self._h(x.abs(), A.abs()) @ B.abs().T
        return Exact(
            base + s * self._h(x, A) @ B.T,
            x.abs() @ W.abs().T + b.abs() + delta_magnitude,
            W.shape[1] + A.shape[0],
            self._rounded(base, off, delta_magnitude),
        ).reshape(*self.x.shape[:-1], len(W))

    def gradients(self, grad: Tensor) -> dict[str, Exact]:
        """The gradients of (y * grad).sum(): z = s dY B; dx = dY W + mask ⊙ (z A); dA = zᵀ x̃; dB = s dYᵀ h."""
        x, W, _, A, B = self._operands()
        g, s = grad.cpu().double().reshape(len(x), len(W)), float(self.scaling)
        (M, K), N, r = x.shape, len(W), len(A)
        xa, Wa, Aa, Ba, ga, sa = x.abs(), W.abs(), A.abs(), B.abs(), g.abs(), abs(s)
        z, za = s * g @ B, sa * ga @ Ba
        h, ha = self._h(x, A), self._h(xa, Aa)
        delta, delta_a, dA, dA_a = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(A), torch.zeros_like(A)
        for rank, mask in self.masks:
            m = 1.0 if mask is None else mask
            delta += m * (z[:, rank] @ A[rank])
            delta_a += m * (za[:, rank] @ Aa[rank])
            dA[rank] += z[:, rank].T @ (m * x)
            dA_a[rank] += za[:, rank].T @ (m * xa)
        dB_a, ds_a = sa * ga.T @ ha, (ga.T @ ha * Ba).sum()
        (base, base_off), (dW, dW_off) = self._product(g, W), self._product(g.T, x)
        half = UNIT[self.lora_A.dtype] if self.lora_A.dtype in HALF else 0.0
        dx_rounded = self._rounded(base, base_off, delta_a)
        return {
            "x": Exact(base + delta, ga @ Wa + delta_a, N + r, dx_rounded).reshape(*self.x.shape),
            "weight": Exact(dW, ga.T @ xa, M, dW_off),
            "bias": Exact(g.sum(0), ga.sum(0), M),
            "lora_A": Exact(dA, dA_a, M + N, self._if_half(dA_a)),
            "lora_B": Exact(s * g.T @ h, dB_a, M + K, self._if_half(dB_a)),
            # A float32 number, whatever h was rounded to.
            "scaling": Exact((g.T @ h * B).sum(), ds_a * (1 + half / UNIT[torch.float32]), M + K + N * r),
        }

    def _product(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """A base product, and how far off it is before it is rounded itself, in units of x's roundoff: not at all, but
        for a long sum on mps. Each of its parts is rounded, and each sum of them is before the next one is added."""
        is_long = self.x.is_mps and left.shape[1] >= LONG_SUM
        size = PART if is_long else max(left.shape[1], 1)
        first, *others = (a @ b for a, b in zip(left.split(size, 1), right.split(size), strict=True))
        total, off = first, torch.zeros_like(first)
        for part in others:
            off = self._round(total, off) + part.abs()
            total = total + part
        return total, off

    def _round(self, value: Tensor, off: Tensor) -> Tensor:
        """How far off is what is computed of ``value``, once it is rounded: see `_product`."""
        return off + value.abs() + UNIT[self.x.dtype] * off

    def _rounded(self, base: Tensor, off: Tensor, delta_magnitude: Tensor) -> Tensor:
        """The base product, a half h or z, and what every launch but the last adds up to."""
        between = (self.launches - 1) * (base.abs() + delta_magnitude)
        return self._round(base, off) + self._if_half(delta_magnitude) + between

    def _if_half(self, magnitude: Tensor) -> Tensor:
        """What a half h or z carries on, where the adapters are half."""
        return magnitude if self.lora_A.dtype in HALF else torch.zeros_like(magnitude)
