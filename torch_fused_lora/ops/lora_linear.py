"""``y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ`` as one operator with its own backward.

Three operators are registered:

``lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0, seed=None) -> y``
    The public one. It is ``_lora_linear`` for one adapter, without the rank-r product.
``_lora_linear(..., seed, dropout_p[], ranks[], save_h) -> (y, h)``
    h = dropout(x) Aᵀ is kept for backward where it will be needed. Several adapters with dropouts of their own
    share one call: lora_A and lora_B are stacked along the rank, ``ranks`` says where each adapter ends, and
    each draws its mask from a stream of its own.
``lora_linear_backward(...) -> Tensor[]``
    The gradients asked for, in the order of the forward's tensor arguments.

This file holds their schemas, checks, autograd, autocast and the portable kernels; `portable` in a name means
plain aten calls for any device that has no kernels of its own.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_seed, keep_mask
from .library import AUTOCAST_KEYS, NAMESPACE, below_autocast, define, fake, kernel

define(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "float dropout_p=0.0, Tensor? seed=None) -> Tensor",
)
define(
    "_lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling, "
    "Tensor? seed=None, float[] dropout_p=[], SymInt[] ranks=[], bool save_h=False) -> (Tensor, Tensor)",
)
define(
    "lora_linear_backward",
    "(Tensor grad, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? h, "
    "Tensor? seed, float[] dropout_p, SymInt[] ranks, bool[] needs) -> Tensor[]",
)
_ops = getattr(torch.ops, NAMESPACE)
_forward_op = _ops._lora_linear.default
_backward_op = _ops.lora_linear_backward.default


# ---------------------------------------------------------------------------------------------- public function


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A linear layer with a low-rank adapter: ``x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`` (LoRA, arXiv:2106.09685).

    Args:
        x: (..., K), 1-D or more, any strides.
        weight: (N, K). bias: (N,) or None. Both of x's dtype: float16, bfloat16, float32 or float64.
        lora_A: (r, K) and lora_B: (N, r), r >= 1: both of x's dtype, or both float32 over a half-precision x.
        scaling: a number or a 0-dim floating tensor on the CPU or x's device; a tensor may ask for a gradient.
        dropout_p: probability in [0, 1) that an element of x is dropped on its way into lora_A.
        training: dropout is active only when True.

    Returns:
        (..., N) in x's dtype. The base product is rounded to x's dtype first; the low-rank term is formed in
        float32 (float64 for float64) where the adapters are float32, added, and the sum is rounded again, as
        PEFT does.

    Differentiable twice in every tensor argument, scaling included; saves x itself, the small tensors and one
    (M, r) product for backward, never a mask. Under autocast all operands are cast to its dtype, as in PEFT.

    Raises:
        TypeError: an argument is not a tensor (scaling: a tensor or a number).
        ValueError: a shape, dtype or device that does not fit; dropout_p outside [0, 1).
    """
    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a Tensor or None, got {type(bias).__name__}")
    if not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    return lora_linear_stacked(x, weight, bias, lora_A, lora_B, scaling, (dropout_p,) if training else ())


def lora_linear_stacked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    dropout_p: Sequence[float] = (),
    ranks: Sequence[int] = (),
) -> Tensor:
    """`lora_linear` for adapters stacked along the rank: adapter i owns ``ranks[i]`` rows of lora_A, columns of
    lora_B and drops x with ``dropout_p[i]``. Empty ``ranks`` means one adapter; empty ``dropout_p`` no dropout."""
    scale = _as_scaling(scaling, x.dtype)
    seed = None
    if any(dropout_p):
        seed = draw_seed()
    else:
        dropout_p = ranks = ()
    arguments = (x, weight, bias, lora_A, lora_B, scale, seed, dropout_p, ranks)
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return _forward_op(*arguments)[0]
    return _autograd(*arguments)[0]  # the dispatcher would call it from C++, for 3 us more


_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def _as_scaling(scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`scaling` as the operator takes it: a 0-dim float32 tensor (float64 beside float64)."""
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(scaling, Tensor):
        return scaling if scaling.dtype == wanted or not scaling.is_floating_point() else scaling.to(wanted)
    if not isinstance(scaling, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scaling: expected a number or a 0-dim Tensor, got {type(scaling).__name__}")
    if torch.compiler.is_compiling():
        # A product keeps a float that changes from call to call symbolic; torch.tensor(scaling) recompiles.
        return _ONE.to(wanted) * scaling
    if torch._C._len_torch_dispatch_stack() > 0:  # a mode may wrap new tensors: keep them out of the cache
        return torch.tensor(scaling, dtype=wanted, device="cpu")
    return _cached_scalar(float(scaling), wanted)


@functools.lru_cache(maxsize=1024)
def _cached_scalar(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


@kernel("lora_linear", "CompositeImplicitAutograd")
def _public(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    if dropout_p > 0 and seed is None:
        raise ValueError(f"seed: dropout_p={dropout_p} needs a 0-dim int64 CPU tensor, got None")
    dropout = (dropout_p,) if seed is not None else ()
    return _forward_op(x, weight, bias, lora_A, lora_B, scaling, seed, dropout)[0]


# ------------------------------------------------------------------------------------------------------- checks

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)


def _check(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks) -> None:
    """Raise ValueError, naming the argument, unless the operands fit together."""

    def expect(fits: bool, name: str, value: Tensor, expected: str) -> None:
        if not fits:
            got = f"{tuple(value.shape)} {value.dtype} on {value.device}"
            raise ValueError(f"lora_linear: {name}: expected {expected}, got {got}")

    expect(weight.dim() == 2, "weight", weight, "shape (N, K)")
    N, K = weight.shape
    expect(x.dtype in _DTYPES, "x", x, "a floating dtype (float16, bfloat16, float32, float64)")
    expect(x.dim() >= 1 and x.shape[-1] == K, "x", x, f"shape (..., {K}), since weight is ({N}, {K})")
    expect(weight.dtype == x.dtype, "weight", weight, f"x's dtype {x.dtype}")
    expect(lora_A.dim() == 2 and lora_A.shape[1] == K, "lora_A", lora_A, f"shape (r, {K})")
    r = lora_A.shape[0]
    expect(r >= 1, "lora_A", lora_A, "a rank of at least 1")
    expect(lora_B.dim() == 2 and lora_B.shape[0] == N and lora_B.shape[1] == r, "lora_B", lora_B, f"shape ({N}, {r})")
    adapter_dtypes = f"{x.dtype}" + (" or torch.float32" if x.dtype in _HALF else "")
    adapter_fits = lora_A.dtype == x.dtype or (lora_A.dtype == torch.float32 and x.dtype in _HALF)
    expect(adapter_fits, "lora_A", lora_A, f"dtype {adapter_dtypes}, since x is {x.dtype}")
    expect(lora_B.dtype == lora_A.dtype, "lora_B", lora_B, f"lora_A's dtype {lora_A.dtype}")
    if bias is not None:
        expect(bias.dim() == 1 and bias.shape[0] == N, "bias", bias, f"shape ({N},)")
        expect(bias.dtype == x.dtype, "bias", bias, f"x's dtype {x.dtype}")
        expect(bias.device == x.device, "bias", bias, f"x's device {x.device}")
    for name, operand in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        expect(operand.device == x.device, name, operand, f"x's device {x.device}")
    expect(scaling.dim() == 0, "scaling", scaling, "a 0-dim tensor")
    expect(scaling.dtype in (torch.float32, torch.float64), "scaling", scaling, "dtype float32 or float64")
    expect(scaling.device.type == "cpu" or scaling.device == x.device, "scaling", scaling, f"the CPU or {x.device}")
    if seed is not None:
        expect(seed.dim() == 0 and seed.dtype == torch.int64, "seed", seed, "a 0-dim int64 tensor")
        expect(seed.device.type == "cpu", "seed", seed, "a tensor on the CPU")
    if not all(0.0 <= p < 1.0 for p in dropout_p):
        raise ValueError(f"lora_linear: dropout_p: expected probabilities in [0, 1), got {list(dropout_p)}")
    if ranks and (sum(ranks) != r or len(ranks) != len(dropout_p)):
        raise ValueError(f"lora_linear: ranks: expected {len(dropout_p)} ranks that add up to {r}, got {list(ranks)}")


# ---------------------------------------------------------------------------------------------- portable kernels


def _adapters(seed: Tensor | None, dropout_p: Sequence[float], ranks: Sequence[int], r: int) -> list[tuple[slice, float]]:
    """(rank slice, drop probability) of each adapter; without dropout one slice serves them all."""
    if seed is None:
        return [(slice(None), 0.0)]
    ranks = ranks or (r,)
    ends = itertools.accumulate(ranks)
    return [(slice(end - rank, end), p) for end, rank, p in zip(ends, ranks, dropout_p, strict=True)]


def _accumulation_dtype(x: Tensor, lora_A: Tensor, seed: Tensor | None) -> torch.dtype:
    """In which dtype the low-rank products are formed: x's, or float32 for a half x.

    A GPU multiplies half by half with float32 sums in hardware, so there half adapters without dropout stay as
    they are. A CPU without half arithmetic is two to four times faster through float32 blocks.
    """
    native = lora_A.dtype == x.dtype and seed is None and x.device.type != "cpu"
    return torch.float32 if x.dtype in _HALF and not native else x.dtype


def _block_rows(M: int, weight_shape: Sequence[int], device: torch.device, whole: bool) -> int:
    """Rows that are converted or masked at a time: 1 MiB of float32 on a CPU (its L2), 64 MiB elsewhere."""
    if whole:
        return max(M, 1)
    elements = 1 << (18 if device.type == "cpu" else 24)
    return max(elements // max(*weight_shape, 1), 16)


def _block(tensor: Tensor, start: int, size: int) -> Tensor:
    return tensor if size >= tensor.shape[0] else tensor[start : start + size]


def _flat(x: Tensor) -> Tensor:
    """x as a matrix (M, last dimension): a view wherever one exists."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _dropped(block: Tensor, mask: Tensor | None) -> Tensor:
    return block if mask is None else block * mask


def _masks(adapters, seed, start: int, rows: int, K: int, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """What each adapter's dropout multiplies rows ``start`` onwards of x with: 0 or 1 / (1 - p)."""
    return [
        keep_mask(int(seed), stream, start, rows, K, p, device).to(dtype).mul_(1.0 / (1.0 - p)) if p else None
        for stream, (_, p) in enumerate(adapters)
    ]


def _add_product_(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """``out += alpha · a b``, summed in a's dtype and rounded once to out's."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, alpha=alpha)
    else:
        out.copy_(torch.addmm(out.to(a.dtype), a, b, alpha=alpha))


@kernel("_lora_linear", "CompositeExplicitAutograd")
def _portable_forward(x, weight, bias, lora_A, lora_B, scaling, seed=None, dropout_p=(), ranks=(), save_h=False):
    """The base product, then block by block of rows h = x̃ Aᵀ and y += s h Bᵀ in place."""
    _check(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    x_rows = _flat(x)
    (M, K), N = x_rows.shape, weight.shape[0]
    y = F.linear(x_rows, weight, bias)
    dtype = _accumulation_dtype(x, lora_A, seed)
    A, B = lora_A.to(dtype).t(), lora_B.to(dtype).t()
    if scaling.device.type == "cpu":
        alpha = scaling.item()
    else:  # reading it would synchronise with the device
        alpha, B = 1.0, B * scaling
    adapters = _adapters(seed, dropout_p, ranks, lora_A.shape[0])
    size = _block_rows(M, weight.shape, x.device, whole=dtype == x.dtype and seed is None)
    saved = []
    for start in range(0, max(M, 1), size):
        x_block = _block(x_rows, start, size).to(dtype)
        masks = _masks(adapters, seed, start, x_block.shape[0], K, dtype, x.device)
        parts = [_dropped(x_block, mask) @ A[:, rank] for (rank, _), mask in zip(adapters, masks, strict=True)]
        h = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        _add_product_(_block(y, start, size), h, B, alpha)
        if save_h:
            saved.append(h.to(lora_A.dtype))
    if save_h:
        h = saved[0] if len(saved) == 1 else torch.cat(saved)
    else:
        h = lora_A.new_empty(0)
    return y.view(*x.shape[:-1], N), h


@kernel("lora_linear_backward", "CompositeExplicitAutograd")
def _portable_backward(grad, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs):
    """z = s dY B; dx = dY W + mask ⊙ (z A); dA = zᵀ x̃; dB = s dYᵀ h; ds = Σ (dYᵀ h) ⊙ B."""
    need_x, need_weight, need_bias, need_A, need_B, need_scaling = needs
    grad_rows = _flat(grad)
    (M, N), (r, K) = grad_rows.shape, lora_A.shape
    x_rows = _flat(x) if x is not None else None
    dtype = _accumulation_dtype(grad, lora_A, seed)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    factor = scaling.to(grad.device, dtype)

    grad_x = grad_rows @ weight if need_x else None
    grad_A = grad.new_zeros(r, K, dtype=dtype) if need_A else None
    grad_B = grad.new_zeros(N, r, dtype=dtype) if need_B or need_scaling else None  # dYᵀ h, s still to come
    adapters = _adapters(seed, dropout_p, ranks, r)
    size = _block_rows(M, (N, K), grad.device, whole=dtype == grad.dtype and seed is None)
    for start in range(0, M if need_x or need_A or grad_B is not None else 0, size):
        grad_block = _block(grad_rows, start, size).to(dtype)
        if grad_B is not None:
            grad_B.addmm_(grad_block.t(), _block(h, start, size).to(dtype))
        if not (need_x or need_A):
            continue
        z = (grad_block @ B).mul_(factor)
        masks = _masks(adapters, seed, start, z.shape[0], K, dtype, grad.device)
        if grad_A is not None:
            x_block = _block(x_rows, start, size).to(dtype)
            for (rank, _), mask in zip(adapters, masks, strict=True):
                grad_A[rank].addmm_(z[:, rank].t(), _dropped(x_block, mask))
        if grad_x is not None:
            out = _block(grad_x, start, size)
            if seed is None:
                _add_product_(out, z, A)
            else:
                delta = [_dropped(z[:, rank] @ A[rank], mask) for (rank, _), mask in zip(adapters, masks, strict=True)]
                out.copy_(functools.reduce(torch.add, delta, out))

    grads = (
        grad_x.view(*grad.shape[:-1], K) if grad_x is not None else None,
        grad_rows.t() @ x_rows if need_weight else None,
        grad_rows.sum(0) if need_bias else None,
        grad_A.to(lora_A.dtype) if grad_A is not None else None,
        (grad_B * factor).to(lora_B.dtype) if need_B else None,
        (grad_B * B).sum().to(scaling.device, scaling.dtype) if need_scaling else None,
    )
    return [g for g in grads if g is not None]


# -------------------------------------------------------------------------------------------------------- shapes


@fake("_lora_linear")
def _fake_forward(x, weight, bias, lora_A, lora_B, scaling, seed=None, dropout_p=(), ranks=(), save_h=False):
    _check(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    h_shape = (math.prod(x.shape[:-1]), lora_A.shape[0]) if save_h else (0,)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), lora_A.new_empty(h_shape)


@fake("lora_linear_backward")
def _fake_backward(grad, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs):
    (r, K), N = lora_A.shape, lora_B.shape[0]
    grads = (
        (grad, (*grad.shape[:-1], K)),
        (grad, (N, K)),
        (grad, (N,)),
        (lora_A, (r, K)),
        (lora_B, (N, r)),
        (scaling, ()),
    )
    return [like.new_empty(shape) for (like, shape), need in zip(grads, needs, strict=True) if need]


# --------------------------------------------------------------------------------- autograd, functorch, autocast


def _aten_masks(x, lora_A, seed, dropout_p, ranks) -> list[tuple[slice, Tensor | None]]:
    """(rank slice, what its dropout multiplies all of x with) of each adapter."""
    M, K = x.shape
    return [
        (rank, _ops.dropout_mask(seed, stream, M, K, p, x.device).to(lora_A.dtype) / (1.0 - p) if p else None)
        for stream, (rank, p) in enumerate(_adapters(seed, dropout_p, ranks, lora_A.shape[0]))
    ]


def _aten_forward(x, weight, bias, lora_A, lora_B, scaling, seed=None, dropout_p=(), ranks=(), save_h=False):
    """The forward in differentiable aten calls, for functorch transforms and forward-mode AD."""
    _check(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    x_rows = _flat(x)
    wide = x_rows.to(lora_A.dtype)
    masks = _aten_masks(x_rows, lora_A, seed, dropout_p, ranks)
    h = torch.cat([_dropped(wide, mask) @ lora_A[rank].t() for rank, mask in masks], 1)
    base = F.linear(x_rows, weight, bias)
    y = (base + (h @ lora_B.t()) * scaling).to(base.dtype)
    return y.view(*x.shape[:-1], weight.shape[0]), h if save_h else lora_A.new_empty(0)


def _aten_backward(grad, grad_h, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs):
    """The backward in differentiable aten calls, for double backward; grad_h is what reaches the saved h."""
    need_x, need_weight, need_bias, need_A, need_B, need_scaling = needs
    grad_rows = _flat(grad)
    wide_grad = grad_rows.to(lora_A.dtype)
    z = (wide_grad @ lora_B) * scaling
    if grad_h is not None:
        z = z + grad_h
    x_rows = _flat(x) if x is not None else None
    grads = []
    if need_x or need_A:
        masks = _aten_masks(grad.new_empty(len(grad_rows), lora_A.shape[1]), lora_A, seed, dropout_p, ranks)
    if need_x:
        delta = functools.reduce(torch.add, [_dropped(z[:, rank] @ lora_A[rank], mask) for rank, mask in masks])
        grads.append((grad_rows @ weight + delta).to(grad.dtype).view(*grad.shape[:-1], -1))
    if need_weight:
        grads.append(grad_rows.t() @ x_rows)
    if need_bias:
        grads.append(grad_rows.sum(0))
    if need_A:
        wide = x_rows.to(lora_A.dtype)
        grads.append(torch.cat([z[:, rank].t() @ _dropped(wide, mask) for rank, mask in masks]))
    if need_B:
        grads.append((wide_grad.t() @ h) * scaling)
    if need_scaling:
        grads.append(((wide_grad.t() @ h) * lora_B).sum().to(scaling.device, scaling.dtype))
    return grads


def _transformed() -> bool:
    """Inside torch.func (vmap, grad, jvp, ...) or forward-mode AD, which need differentiable aten calls."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class _LoRALinear(torch.autograd.Function):
    # The classic form, forward(ctx, ...): with setup_context apart a call costs about twice as much.

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks):
        need_x, need_weight, _, need_A, need_B, need_scaling = ctx.needs_input_grad[:6]
        save_h = need_B or need_scaling
        with torch._C._AutoDispatchBelowAutograd():
            y, h = _forward_op(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)
        ctx.set_materialize_grads(False)
        if not save_h:
            ctx.mark_non_differentiable(h)
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            scaling,
            h if save_h else None,
            seed,
        )
        ctx.dropout_p, ctx.ranks = dropout_p, ranks
        ctx.y_shape, ctx.y_dtype = y.shape, y.dtype
        return y, h

    @staticmethod
    def backward(ctx, grad, grad_h):
        needs = ctx.needs_input_grad[:6]
        saved = (*ctx.saved_tensors, ctx.dropout_p, ctx.ranks, needs)
        if grad is None:  # only reached through a caller of _lora_linear that uses h alone
            if grad_h is None:
                return (None,) * 9
            grad = grad_h.new_zeros(ctx.y_shape, dtype=ctx.y_dtype)
        if torch.is_grad_enabled() or grad_h is not None or _transformed():
            with below_autocast():
                grads = _aten_backward(grad, grad_h, *saved)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = _backward_op(grad, *saved)
        found = iter(grads)
        return (*(next(found) if need else None for need in needs), None, None, None)


@kernel("_lora_linear", "Autograd")
def _autograd(x, weight, bias, lora_A, lora_B, scaling, seed=None, dropout_p=(), ranks=(), save_h=False):
    if _transformed():
        return _aten_forward(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)
    if torch.is_grad_enabled() and (
        lora_A.requires_grad
        or lora_B.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or scaling.requires_grad
    ):
        return _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(x, weight, bias, lora_A, lora_B, scaling, seed, dropout_p, ranks, save_h)


@kernel("lora_linear_backward", "Autograd")
def _autograd_backward(grad, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs):
    arguments = (x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs)
    tensors = (grad, x, weight, lora_A, lora_B, scaling, h)
    if _transformed() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return _aten_backward(grad, None, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(grad, *arguments)


def _vmap(info, in_dims, x, weight, bias, lora_A, lora_B, scaling, seed=None, dropout_p=(), ranks=(), save_h=False):
    """One vmap level of the differentiable form; only the tensors carry a batch dimension."""

    def one(*tensors):
        return _aten_forward(*tensors, dropout_p, ranks, save_h)

    dims = (*in_dims, None)[:7]
    return torch.vmap(one, dims, randomness=info.randomness)(x, weight, bias, lora_A, lora_B, scaling, seed), (0, 0)


def _vmap_public(info, in_dims, x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    tensor_dims = (*in_dims[:6], in_dims[7] if len(in_dims) > 7 else None)
    (y, _), _ = _vmap(info, tensor_dims, x, weight, bias, lora_A, lora_B, scaling, seed, (dropout_p,) if seed is not None else ())
    return y, 0


torch.library.register_vmap(_forward_op, _vmap)
torch.library.register_vmap(_ops.lora_linear.default, _vmap_public)


def _register_autocast(key: str) -> None:
    device_type = key.removeprefix("Autocast").lower()

    def forward(x, weight, bias, lora_A, lora_B, scaling, *rest):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = [t if t is None or t.dtype not in (*_HALF, torch.float32) else t.to(dtype) for t in (x, weight, bias, lora_A, lora_B)]
        with below_autocast():
            return _forward_op(*tensors, scaling, *rest)

    def backward(*arguments):
        with below_autocast():
            return _backward_op(*arguments)

    kernel("_lora_linear", key)(forward)
    kernel("lora_linear_backward", key)(backward)


for _key in AUTOCAST_KEYS:
    _register_autocast(_key)
