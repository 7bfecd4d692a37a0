"""The layer in float64, and how far from it an implementation may be.

Every bound is derived, none tuned. With u the unit roundoff of the summing dtype, a sum of n products in any
order and association is within n u / (1 - n u) times the sum of the products' magnitudes (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., section 3.1); each rounding to a narrower dtype adds its own unit
roundoff times what is rounded. `Exact` carries a value together with that sum of magnitudes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from torch_fused_lora.affine import Packed

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


class _LowRank:
    """The term s x̃ Aᵀ Bᵀ and its gradients, of the operands that both kinds of a call have."""

    x: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    masks: list[tuple[slice, Tensor | None]]
    launches: int

    def _low_rank_operands(self) -> tuple[Tensor, Tensor, Tensor, float]:
        x, A, B = (_double(t) for t in (self.x, self.lora_A, self.lora_B))
        return _rows(x), A, B, float(self.scaling)

    def _h(self, x: Tensor, A: Tensor) -> Tensor:
        parts = [(x if mask is None else x * mask) @ A[rank].T for rank, mask in self.masks]
        return torch.cat(parts, 1)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The term, and its magnitude."""
        x, A, B, s = self._low_rank_operands()
        return s * self._h(x, A) @ B.T, abs(s) * self._h(x.abs(), A.abs()) @ B.abs().T

    def _low_rank_gradients(self, g: Tensor) -> tuple[Tensor, Tensor, dict[str, Exact]]:
        """Of (term * g).sum(): z = s dY B; mask ⊙ (z A), which is x's, and its magnitude; dA = zᵀ x̃; dB = s dYᵀ h."""
        x, A, B, s = self._low_rank_operands()
        (M, K), (N, r) = x.shape, B.shape
        xa, Aa, Ba, ga, sa = x.abs(), A.abs(), B.abs(), g.abs(), abs(s)
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
        half = UNIT[self.lora_A.dtype] if self.lora_A.dtype in HALF else 0.0
        others = {
            "lora_A": Exact(dA, dA_a, M + N, self._if_half(dA_a)),
            "lora_B": Exact(s * g.T @ h, dB_a, M + K, self._if_half(dB_a)),
            # A float32 number, whatever h was rounded to.
            "scaling": Exact((g.T @ h * B).sum(), ds_a * (1 + half / UNIT[torch.float32]), M + K + N * r),
        }
        return delta, delta_a, others

    def _added(self, to: Tensor | float, magnitude: Tensor) -> Tensor:
        """What is rounded on the way where a term is added: a half h or z, and what every launch but the last adds up
        to."""
        return self._if_half(magnitude) + (self.launches - 1) * (to + magnitude)

    def _if_half(self, magnitude: Tensor) -> Tensor:
        """What a half h or z carries on, where the adapters are half."""
        return magnitude if self.lora_A.dtype in HALF else torch.zeros_like(magnitude)


def _double(t: Tensor) -> Tensor:
    return t.detach().cpu().double()


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _all_ranks() -> list[tuple[slice, Tensor | None]]:
    return [(slice(None), None)]


@dataclasses.dataclass
class Layer(_LowRank):
    """The operands of one call of lora_linear, with the float64 reference of its output and gradients.

    ``masks``: for each adapter its slice of the rank and what multiplies x on its way into lora_A (None: 1).
    ``launches`` add to y, and to dx, one after the other: all but the last round what the next one adds to.
    ``followed``: autograd does by itself, of half operands too, which rounds dY B and dYᵀ h before they are scaled, and
    both terms of dx before they are added.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    masks: list[tuple[slice, Tensor | None]] = dataclasses.field(default_factory=_all_ranks)
    launches: int = 1
    followed: bool = False

    def output(self) -> Exact:
        """y = x Wᵀ + b + s x̃ Aᵀ Bᵀ. A half base product is rounded; so is h where the adapters are half.

        On mps the bias of a single row, or of a long sum, is added to what is rounded already.
        """
        x, W = _rows(_double(self.x)), _double(self.weight)
        b = x.new_zeros(len(W)) if self.bias is None else _double(self.bias)
        product, off = self._product(x, W.T)
        if self.x.is_mps and self.bias is not None and (len(x) == 1 or x.shape[1] >= LONG_SUM):
            off = self._round(product, off)
        base = product + b
        delta, magnitude = self.low_rank()
        return Exact(
            base + delta,
            x.abs() @ W.abs().T + b.abs() + magnitude,
            W.shape[1] + len(self.lora_A),
            self._round(base, off) + self._added(base.abs(), magnitude),
        ).reshape(*self.x.shape[:-1], len(W))

    def gradients(self, grad: Tensor) -> dict[str, Exact]:
        """The gradients of (y * grad).sum(): dx = dY W + mask ⊙ (z A); dW = dYᵀ x."""
        x, W, g = _rows(_double(self.x)), _double(self.weight), _rows(_double(grad))
        delta, delta_a, others = self._low_rank_gradients(g)
        (base, base_off), (dW, dW_off) = self._product(g, W), self._product(g.T, x)
        dx = Exact(
            base + delta,
            g.abs() @ W.abs() + delta_a,
            len(W) + len(self.lora_A),
            self._round(base, base_off) + self._added(base.abs(), delta_a),
        )
        if self.followed and self.lora_A.dtype in HALF:
            dx.rounded = dx.rounded + delta_a + delta.abs()
            others["lora_A"].rounded = 2 * others["lora_A"].rounded
            others["lora_B"].rounded = others["lora_B"].rounded + others["lora_B"].value.abs()
        return {
            "x": dx.reshape(*self.x.shape),
            "weight": Exact(dW, g.abs().T @ x.abs(), len(x), dW_off),
            "bias": Exact(g.sum(0), g.abs().sum(0), len(x)),
            **others,
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


@dataclasses.dataclass
class Delta(_LowRank):
    """As `Layer`, of one call of lora_delta."""

    y: Tensor
    x: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    masks: list[tuple[slice, Tensor | None]] = dataclasses.field(default_factory=_all_ranks)
    launches: int = 1

    def output(self) -> Exact:
        """y + s x̃ Aᵀ Bᵀ, rounded once. A half h is rounded beside a half y only: over a float32 one it is float32."""
        y, (delta, magnitude) = _rows(_double(self.y)), self.low_rank()
        rounded = self._added(y.abs(), magnitude)
        return Exact(y + delta, y.abs() + magnitude, sum(self.lora_A.shape), rounded).reshape(*self.y.shape)

    def gradients(self, grad: Tensor) -> dict[str, Exact]:
        """The gradients of (result * grad).sum() but y's, which is grad."""
        delta, magnitude, others = self._low_rank_gradients(_rows(_double(grad)))
        dx = Exact(delta, magnitude, sum(self.lora_B.shape), self._added(0.0, magnitude))
        return {"x": dx.reshape(*self.x.shape), **others}


@dataclasses.dataclass
class QuantizedLayer(Layer):
    """As `Layer`, over words that are dequantised: in the summing dtype, by a product and a sum, and to x's dtype."""

    formed: Tensor | float = 0.0  # |scale| q + |bias|, of each element of the weight

    @classmethod
    def of(cls, x: Tensor, packed: Packed, bias: Tensor | None, *rest: Any, **options: Any) -> QuantizedLayer:
        weight, formed = dequantized(packed)
        return cls(x, weight, bias, *rest, **options, formed=formed)

    def output(self) -> Exact:
        return self._over_words(super().output(), self.x, self.formed.T)

    def gradients(self, grad: Tensor) -> dict[str, Exact]:
        """But the weight's."""
        found = super().gradients(grad)
        del found["weight"]
        return found | {"x": self._over_words(found["x"], grad, self.formed)}

    def _over_words(self, exact: Exact, left: Tensor, right: Tensor) -> Exact:
        size = (_rows(_double(left)).abs() @ right).reshape(exact.value.shape)
        return dataclasses.replace(exact, magnitude=exact.magnitude + size, rounded=exact.rounded + size)


def unpacked(packed: Packed) -> Tensor:
    """The whole numbers (N, K), as float64."""
    shifts = torch.tensor([4, 0]) if packed.has_table else torch.arange(0, 32, packed.bits)
    return ((packed.words.cpu().to(torch.int64)[..., None] >> shifts) % (1 << packed.bits)).flatten(-2).double()


def dequantized(packed: Packed) -> tuple[Tensor, Tensor]:
    """The weight (N, K) in float64, and the magnitudes it is made of."""
    codes, scales = unpacked(packed), _double(packed.scales).repeat_interleave(packed.group_size, 1)
    if packed.has_table:
        weight = scales * _double(packed.biases)[codes.long()]
        return weight, weight.abs()
    biases = _double(packed.biases).repeat_interleave(packed.group_size, 1)
    return scales * codes + biases, scales.abs() * codes + biases.abs()


def nf4_table() -> Tensor:
    """NF4 as its paper defines it (QLoRA, appendix E): quantiles of the normal distribution, eight above zero and seven
    below, over the largest, and zero."""
    above, below = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n).double())[:-1] for n in (9, 8))
    return (torch.cat([-below, torch.zeros(1).double(), above.flip(0)]) / above[0]).float()


def with_table(N: int, K: int, group_size: int = 64, std: float = 1.0) -> Packed:
    """A random weight in NF4, as bitsandbytes holds it."""
    words = torch.randint(256, (N, K // 2), dtype=torch.uint8)
    scales = std * (0.5 + torch.rand(N, K // group_size))
    return Packed(words, scales, nf4_table(), 4, group_size)
