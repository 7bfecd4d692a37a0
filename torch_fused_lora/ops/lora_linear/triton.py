"""The low-rank term as Triton kernels: half rows that meet adapters, with or without dropout, on an NVIDIA GPU.

Beside torch's product for the base a forward is two launches: h, in parts (`_product_kernel`), and what it adds to y
(`_expand_kernel`). So is a backward: z in parts, and all that is made of it (`_gradients_kernel`). Up to 16 rows, 64
on Hopper, a forward without dropout is one pass over the weight (`_few_rows_kernel`), in one launch, or after h's.

The base comes first: cuBLAS rounds what it adds to an output before it adds it, so that the other order rounds once
more. On Hopper it carries the rank, where there are rows enough (`gluon.py`), and only h, z and the adapters' gradients
are made here. There a launch begins before the one before it is done (`Launcher`): h is made while the weight streams.

Operands of the full width are read as they are, masks drawn in registers. Sums are in float32, in a fixed order;
products are within 3 * 2**-16 of their magnitude (`_dot`), a hundredth of a bfloat16 rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..dropout.triton import keep_tile, key_words, stream_words
from ..launcher import Launcher, Launches, begins_early, kind, prepared
from ..rows import flat, folds
from .ways import carrying_rank, tuned_layers

FEW = 16  # rows, the least that the matrix units take
ONE_PASS = 64  # rows, the most of a forward in one pass over the weight, where it `streams`
WIDE = 64  # ranks, the most that one tile has
PROGRAMS = 264  # that a launch should have: two for each multiprocessor of an H100


class Tile(NamedTuple):
    """Of a kernel: rows, columns of the full width, and how it is compiled."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3

    @property
    def how(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# What is tuned beside `tile`: all of it fits the 99 KiB of shared memory that the smaller cards' blocks have.
CANDIDATES = {
    "few_rows": (Tile(16, 128, 2), Tile(32, 128, 2), Tile(32, 128), Tile(32, 256, 2, 2), Tile(64, 128)),
    "product": (Tile(16, 64), Tile(16, 128), Tile(32, 64), Tile(32, 128), Tile(64, 64), Tile(128, 64)),
    "expand": (*(Tile(rows, 128, stages=1) for rows in (16, 32, 64)), Tile(64, 256, 8, 1), Tile(128, 128, 8, 1)),
    "gradients": (
        *(Tile(rows, 128, stages=2) for rows in (16, 32, 64)),
        Tile(32, 64, stages=2),
        Tile(64, 64, stages=2),
    ),
}
Tiles: TypeAlias = "tuple[tuple[str, Tile], ...] | None"  # by kernel, instead of `tile`


def candidates(backward: bool, M: int, N: int, r: int, device: int) -> list[list[dict[str, int]]]:
    """What can be tuned of a layer, in the words of its overrides: its way, and the tile of each kernel."""
    kernels = "product", "gradients" if backward else "few_rows" if is_one_pass(M, N, r, device) else "expand"
    tiles = [
        [{f"{kernel}.{field}": number for field, number in one._asdict().items()} for one in CANDIDATES[kernel]]
        for kernel in kernels
    ]
    return [[{"lora_linear.way": 1}, {"lora_linear.way": 3}], *tiles]


def tiles_of(overrides: dict[str, int]) -> Tiles:
    """The reverse. Raises ValueError for what is not among the candidates."""
    found: dict[str, dict[str, int]] = {}
    for name, number in overrides.items():
        kernel, _, field = name.partition(".")
        found.setdefault(kernel, {})[field] = number
    for kernel, fields in found.items():
        if fields not in [one._asdict() for one in CANDIDATES.get(kernel, ())]:
            raise ValueError(f"{kernel}: {fields} is no candidate")
    return tuple((kernel, Tile(**fields)) for kernel, fields in found.items()) or None


def streams(N: int, device: int) -> bool:
    """Whether a weight of N rows is read fastest by 64 of them at a time, as Hopper's matrix units take them."""
    return N >= 2048 and begins_early(device)


def is_one_pass(M: int, N: int, r: int, device: int) -> bool:
    """Whether a forward without dropout is one pass over the weight."""
    return r <= WIDE and (M <= FEW or (M <= ONE_PASS and streams(N, device)))


def tile(
    kernel: str,
    M: int,
    r: int,
    drops: bool = False,
    carried: bool = False,
    tiles: Tiles = None,
    beside: bool = False,
) -> Tile:
    """The best of a sweep on an H200, at ranks 16 and 64. ``carried``: of what the base product carries, on Hopper;
    ``beside``: of a weight that `streams`, while another launch makes h."""
    for name, own in tiles or ():
        if name == kernel:
            return own
    if kernel == "few_rows":  # rows of the weight
        if beside:
            return Tile(64, 256, stages=4) if M <= FEW else Tile(64, 128, stages=5)
        return Tile(32, 256 if r <= 16 else 128, 2, 4)
    if kernel == "product":
        if r <= 32:
            return Tile(FEW, 128) if M <= FEW else Tile(64, 128, stages=4 if carried else 3)
        return Tile(FEW, 128) if M <= FEW else Tile(128 if carried else 32, 64)
    if kernel == "expand":
        if M <= 1024:
            return Tile(FEW if M <= FEW else 64, 64 if FEW < M <= 128 else 128, stages=1)
        return Tile(128, 128, 8, stages=1)
    if carried:
        return Tile(64, 128, 8 if drops and r <= 32 else 4, stages=4)
    return Tile(FEW if M <= FEW else 32 if drops else 64, 64 if FEW < M <= 128 else 128, stages=2)


class Dropout(NamedTuple):
    """Of one adapter: its ranks, whether it drops elements of its side of an M x K matrix, what it multiplies the rest
    with, and the words that say, beside the seed's, which these are."""

    rank: slice
    drops: bool = False
    inverse_keep: float = 1.0
    words: tuple[int, int] = (0, 0)

    @staticmethod
    def of(rank: slice, p: float, stream: int) -> Dropout:
        return Dropout(rank, True, 1.0 / (1.0 - p), stream_words(stream, p)) if p else Dropout(rank)


class Dropouts(NamedTuple):
    """Of adapters side by side, none where nothing drops; and the seed, where it is on the device, or its words."""

    each: tuple[Dropout, ...] = ()
    seed: Tensor | None = None
    low: int = 0
    high: int = 0

    @staticmethod
    def of(each: tuple[Dropout, ...], seed: Tensor | int) -> Dropouts:
        return Dropouts(each, *key_words(seed))

    def kind(self) -> tuple[Any, ...]:
        """What decides how kernels read it."""
        each = self.each
        ranks = [(d.drops, d.rank.start, d.rank.stop) for d in each] if len(each) > 1 else each and (each[0].drops,)
        return *ranks, kind(self.seed)

    def words(self, dropout: Dropout) -> tuple[int, int, int, int]:
        return self.low, self.high, *dropout.words


NO_DROPOUT, NO_DROPOUTS = Dropout(slice(None)), Dropouts()
Scale: TypeAlias = tuple[float, "Tensor | None"]  # a number, and what multiplies it on the device
ONE: Scale = (1.0, None)


class _Plan(NamedTuple):
    """Of one direction of a layer, what is decided and `prepared`. ``shape``: of the result of the full width, and
    ``whole``: whether torch's product makes it so, as no view. ``gluon``: the kernels whose base product carries the
    rank, if it does. h or z is made in parts of the columns, added up where it is carried. A backward makes sums over
    rows in splits of them: where in its work space of ``size`` float32 these begin, after z, and the counters."""

    shape: tuple[int, ...]
    whole: bool
    M: int
    r: int
    parts: int
    gluon: Any
    tiles: Tiles
    launches: Launches
    one_pass: bool = False
    splits: int = 1
    sums: int = 0
    counters: int = 0
    size: int = 0


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    dropouts: Dropouts,
    save_h: bool,
) -> tuple[Tensor, Tensor | None]:
    """``x Wᵀ + b + scaling · h Bᵀ`` for half x (..., K), `by_rows`; h = dropout(x) Aᵀ (M, r), of the adapters' dtype,
    if asked."""
    scale = as_scale(scaling, x)
    tuned = None if dropouts.each else tuned_layers(x.get_device()).of(False, x, A, B)
    key = (
        *(forward, save_h, tuned, dropouts.kind()),
        *(kind(x), kind(weight), kind(bias), kind(A), kind(B), kind(scale[1])),
    )
    plan = prepared.get(key) or prepared.keep(key, _plan_forward(x, weight, bias, A, B, tuned))
    if plan.one_pass:
        return _few_rows(plan, x, weight, bias, A, B, scale, save_h)
    if plan.gluon is None:
        y = F.linear(x if plan.whole else flat(x), weight, bias)
        return y, _add_delta_(plan, y, x, A, B, scale, dropouts, save_h)
    found, h, saved = _low_rank(plan, x, A, dropouts, save_h)
    return plan.gluon.product(plan.launches, plan.shape, x, weight, True, bias, plan.parts, found, B, scale, h), saved


def _plan_forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, tuned: Any) -> _Plan:
    """``tuned``: None where x is dropped."""
    check_fit(x, A, B, weight.shape, weight)
    shape, whole, x = (*x.shape[:-1], B.shape[0]), bias is None and folds(x), flat(x)
    (M, K), (N, r) = x.shape, B.shape
    way, tiles = tuned or (0, None)
    gluon = carrying_rank(x, weight, N, way)
    one_pass = tuned is not None and gluon is None and is_one_pass(M, N, r, x.get_device())
    # One pass makes h itself, but to split each tile of A in two would take longer than all else.
    alone = one_pass and M <= FEW and A.dtype is x.dtype
    parts = 0 if alone else parts_of(M, K, r, gluon is not None, tiles)
    return _Plan(shape, whole, M, r, parts, gluon, tiles, {}, one_pass)


def check_fit(x: Tensor, A: Any, B: Any, shape: tuple[int, ...], of_base: Tensor) -> None:
    """Raise RuntimeError, as torch's products do, for operands that fit no base of this shape, or are not all on one
    device: the kernels do not."""
    N, K = shape
    devices = {t.device for t in (x, A, B, of_base) if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"operands on several devices: {sorted(map(str, devices))}")
    if x.shape[-1] != K or (A is not None and (A.shape != (B.shape[1], K) or B.shape[0] != N)):
        shapes = [tuple(t.shape) for t in (x, A, B) if t is not None]
        raise RuntimeError(f"operands of shapes {shapes} do not fit a base of shape {(N, K)}")


def _few_rows(
    plan: _Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: Scale,
    save_h: bool,
) -> tuple[Tensor, Tensor | None]:
    """`forward` in one pass over the weight."""
    M, r, parts = plan.M, plan.r, plan.parts
    y = x.new_empty(plan.shape)
    h = x.new_empty(M, r, dtype=A.dtype) if save_h else None
    a = A
    if parts:
        a = x.new_empty(parts * M, r, dtype=torch.float32)
        _product(plan.launches, a, parts, r, x, A, True, tiles=plan.tiles)
    number, factor = scale
    _launch_few_rows((y, x, weight, bias, a, B, h, factor), (number,), (parts, plan.tiles), plan.launches)
    return y, h


def add_delta_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    dropouts: Dropouts = NO_DROPOUTS,
    save_h: bool = True,
) -> Tensor | None:
    """``y += scaling · h Bᵀ`` in place, rounded once, y (..., N) and x (..., K) half, both `by_rows`. Returns
    h = dropout(x) Aᵀ (M, r) in the adapters' dtype, if it is to be saved."""
    scale = as_scale(scaling, x)
    tensors = kind(y), kind(x), kind(A), kind(B), kind(scale[1])
    key = add_delta_, save_h, dropouts.kind(), *tensors
    plan = prepared.get(key) or prepared.keep(key, _plan_delta(y, x, A, B))
    return _add_delta_(plan, y, x, A, B, scale, dropouts, save_h)


def _plan_delta(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> _Plan:
    check_fit(x, A, B, (y.shape[-1], x.shape[-1]), y)
    (M, K), r = flat(x).shape, A.shape[0]
    return _Plan((), False, M, r, parts_of(M, K, r), None, None, {})


def _add_delta_(
    plan: _Plan, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Scale, dropouts: Dropouts, save_h: bool
) -> Tensor | None:
    found, h, saved = _low_rank(plan, x, A, dropouts, save_h)
    _expand(plan.launches, y, found, plan.parts, plan.r, B, True, scale, h, tiles=plan.tiles)
    return saved


def low_rank(
    launches: Launches, parts: int, x: Tensor, A: Tensor, save_h: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x Aᵀ of a matrix x in float32, in so many parts; what is to become h, and what is to be saved."""
    return _low_rank(_Plan((), False, x.shape[0], A.shape[0], parts, None, None, launches), x, A, NO_DROPOUTS, save_h)


def _low_rank(
    plan: _Plan, x: Tensor, A: Tensor, dropouts: Dropouts, save_h: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _, _, M, r, parts, gluon, tiles, launches, *_ = plan
    carried = gluon is not None
    found = x.new_empty(parts * M, r, dtype=torch.float32)
    each = dropouts.each
    if len(each) > 1:
        for i, one in enumerate(each):
            own = launches.setdefault(i, {})
            _product(own, found[:, one.rank], parts, r, x, A[one.rank], True, ONE, one, dropouts, carried=carried)
    else:
        one = each[0] if each else NO_DROPOUT
        _product(launches, found, parts, r, x, A, True, ONE, one, dropouts, carried=carried, tiles=tiles)
    if not save_h or (parts == 1 and A.dtype is torch.float32):
        return found, None, found if save_h else None
    h = x.new_empty(M, r, dtype=A.dtype)
    return found, h, h


def backward(
    grad: Tensor,
    weight: Tensor | None,
    base: Callable[[Tensor], Tensor] | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    h: Tensor | None,
    need_x: bool,
    scale_h: bool,
    dropouts: Dropouts = NO_DROPOUTS,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``base(grad) + dropout(z A)`` with z = s dY B, without ``base`` if it is None, and by a product of our own where
    base makes dY W of a ``weight`` that this takes; zᵀ dropout(x), of the adapters' dtype; and dYᵀ h, times s and of
    the adapters' dtype if ``scale_h``, else float32. None where not needed, or where a tensor is not given. ``grad``
    and x are `by_rows`, and what ``base`` makes is contiguous."""
    scale, each = as_scale(scaling, grad), dropouts.each
    tuned = None if each else tuned_layers(grad.get_device()).of(True, grad, A, B)
    key = (
        *(backward, need_x, scale_h, base is None, tuned, dropouts.kind()),
        *(kind(grad), kind(weight), kind(x), kind(A), kind(B), kind(h), kind(scale[1])),
    )
    plan = prepared.get(key)
    if plan is None:
        plan = prepared.keep(key, _plan_backward(grad, weight, A, B, need_x, x is not None, len(each), tuned))
    (r, K), launches, gluon = A.shape, plan.launches, plan.gluon
    grad_x = None
    if need_x and gluon is None:
        grad_x = grad.new_empty(plan.shape) if base is None else base(grad if plan.whole else flat(grad))
    grad_A = None if x is None else grad.new_empty(r, K, dtype=A.dtype)
    grad_B = None if h is None else grad.new_empty(B.shape, dtype=B.dtype if scale_h else torch.float32)
    scale_B = scale if scale_h else ONE
    work = grad.new_empty(plan.size, dtype=torch.float32)
    if plan.parts:
        one, fresh = each[0] if each else NO_DROPOUT, base is None
        zeroed, carried = (plan.counters, plan.size - plan.counters), gluon is not None
        _product(launches, work, plan.parts, r, grad, B, False, scale, zeroed=zeroed, carried=carried, tiles=plan.tiles)
        if gluon:
            z = work if plan.parts > 1 else None
            grad_x = gluon.product(
                launches, plan.shape, grad, weight, False, None, plan.parts, work, A, ONE, z, dropouts
            )
        to_add = None if gluon else grad_x
        if len(each) < 2 and (r <= WIDE or to_add is None):
            of_rows = grad, h, grad_B, scale_B
            _gradients(plan, launches, work, work, x, A, grad_A, to_add, fresh, one, dropouts, *of_rows)
            return grad_x, grad_A, grad_B
        for i, one in enumerate(each or (Dropout(slice(0, r)),)):
            rank, own = one.rank, launches.setdefault(i, {})
            z, own_A, own_grad_A = work[rank.start :], A[rank], None if grad_A is None else grad_A[rank]
            in_one = to_add if own_A.shape[0] <= WIDE else None
            _gradients(plan, own, work, z, x, own_A, own_grad_A, in_one, fresh, one, dropouts)
            if to_add is not None and in_one is None:
                _expand(own, to_add, z, plan.parts, r, own_A, False, ONE, None, fresh, one, dropouts, plan.tiles)
            fresh = False
    _gradients(plan, launches, work, grad=grad, h=h, grad_B=grad_B, scale_B=scale_B)
    return grad_x, grad_A, grad_B


def _plan_backward(
    grad: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, need_x: bool, need_A: bool, dropping: int, tuned: Any
) -> _Plan:
    """``tuned``: None where so many adapters drop."""
    (r, K), shape, whole, grad = A.shape, (*grad.shape[:-1], A.shape[1]), folds(grad), flat(grad)
    M, N = grad.shape
    way, tiles = tuned or (0, None)
    gluon = carrying_rank(grad, weight, K, way) if need_x and dropping < 2 else None
    carried, drops = gluon is not None, dropping > 0
    if not (need_x or need_A):  # nothing zeroes counters
        return _Plan(shape, whole, M, r, 0, gluon, None, {})
    parts, splits = parts_of(M, N, r, carried, tiles), 1
    rows, columns, *_ = tile("gradients", M, r, drops, carried, tiles)
    blocks = (ceil_div(K, columns) + ceil_div(N, columns)) * ceil_div(r, _rank_block(r))
    # Those that draw a mask take longer than those of dY's columns, which make room for others.
    programs = 2 * PROGRAMS if drops and carried and r <= 32 and M > 1024 else PROGRAMS
    while 3 * splits * blocks <= 2 * programs and 2 * splits * rows <= M:
        splits *= 2
    sums = ceil_div(parts * M * r, 16) * 16  # aligned
    counters = sums + (splits * r * (K + N) if splits > 1 else 0)
    size = counters + (blocks if splits > 1 else 0)
    return _Plan(shape, whole, M, r, parts, gluon, tiles, {}, False, splits, sums, counters, size)


def _product(
    launches: Launches,
    out: Tensor,
    parts: int,
    width: int,
    rows: Tensor,
    small: Tensor,
    turned: bool,
    scale: Scale = ONE,
    dropout: Dropout = NO_DROPOUT,
    dropouts: Dropouts = NO_DROPOUTS,
    zeroed: tuple[int, int] = (0, 0),
    carried: bool = False,
    tiles: Tiles = None,
) -> None:
    """``scale · dropout(rows) small`` in so many parts, which lie in out as (parts, M, width) one after the other: rows
    half (M, K), small (K, C), or ``turned`` (C, K), with C about the rank. ``zeroed``: from where on, and how many
    elements of out become 0."""
    number, factor = scale
    numbers = number * dropout.inverse_keep, *dropouts.words(dropout)
    options = dropout.drops, parts, width, turned, zeroed, carried, tiles
    _launch_product((out, rows, small, factor, dropouts.seed if dropout.drops else None), numbers, options, launches)


def _expand(
    launches: Launches,
    out: Tensor,
    a: Tensor,
    parts: int,
    width: int,
    b: Tensor,
    turned: bool,
    scale: Scale = ONE,
    h: Tensor | None = None,
    fresh: bool = False,
    dropout: Dropout = NO_DROPOUT,
    dropouts: Dropouts = NO_DROPOUTS,
    tiles: Tiles = None,
) -> None:
    """``out += dropout(scale · a b)`` rounded once, out half (M, C), a the sum of its parts (parts, M, width), b (r, C)
    or ``turned`` (C, r); a ``fresh`` out is only written. h (M, r) of b's dtype, if given, becomes a."""
    number, factor = scale
    numbers = number * dropout.inverse_keep, *dropouts.words(dropout)
    options = dropout.drops, fresh, parts, width, turned, tiles
    _launch_expand((out, a, b, h, factor, dropouts.seed if dropout.drops else None), numbers, options, launches)


def _gradients(
    plan: _Plan,
    launches: Launches,
    work: Tensor,
    z: Tensor | None = None,
    x: Tensor | None = None,
    A: Tensor | None = None,
    grad_A: Tensor | None = None,
    grad_x: Tensor | None = None,
    fresh: bool = False,
    dropout: Dropout = NO_DROPOUT,
    dropouts: Dropouts = NO_DROPOUTS,
    grad: Tensor | None = None,
    h: Tensor | None = None,
    grad_B: Tensor | None = None,
    scale_B: Scale = ONE,
) -> None:
    """In one launch, of one adapter and its z: grad_A = zᵀ dropout(x), and dropout(z A), which is added to grad_x, or
    written; and grad_B = scale_B · dYᵀ h. None of what is None."""
    if grad_A is None and grad_x is None and grad_B is None:
        return
    number, factor = scale_B
    numbers = dropout.inverse_keep, number, *dropouts.words(dropout)
    tensors = work, z, x, A, grad_A, grad_x, grad, h, grad_B, factor, dropouts.seed if dropout.drops else None
    _launch_gradients(tensors, numbers, (dropout.drops, fresh, plan), launches)


@functools.lru_cache(4096)
def parts_of(M: int, K: int, r: int, carried: bool = False, tiles: Tiles = None) -> int:
    """In how many parts rows of K elements meet an adapter. Whoever reads the product adds them up, so that they must
    stay small beside rows of the full width, unless that is done once."""
    own = tile("product", M, r, carried=carried, tiles=tiles)
    parts, blocks = 1, ceil_div(M, own.rows) * ceil_div(r, _rank_block(r))
    most = 256 if M <= FEW or carried else 128 if M <= 1024 else 32
    while 2 * parts * blocks <= PROGRAMS and 512 * parts <= K and 2 * parts * r <= most:
        parts *= 2
    return parts


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def _rank_block(r: int) -> int:
    return min(max(triton.next_power_of_2(r), 16), WIDE)


def as_scale(scaling: float | Tensor, like: Tensor) -> Scale:
    if not isinstance(scaling, Tensor):
        return scaling, None
    return (1.0, scaling.float()) if scaling.device == like.device else (scaling.item(), None)


@triton.jit
def _dot(a, b, total):  # type: ignore[no-untyped-def]
    """total + a b on the matrix units. Beside another dtype a float32 or float16 operand is the sum of two bfloat16
    numbers, to within 2**-16 of it (float16 exactly); the product of the low ones, another 2**-16, is left out."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        total = tl.dot(a, b, total)
    else:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        total = tl.dot(a_high, b_high, total)
        if a.dtype != tl.bfloat16:
            total = tl.dot((a.to(tl.float32) - a_high.to(tl.float32)).to(tl.bfloat16), b_high, total)
        if b.dtype != tl.bfloat16:
            total = tl.dot(a_high, (b.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16), total)
    return total


@triton.jit
def times(number, factor):  # type: ignore[no-untyped-def]
    if factor is not None:
        number = number * tl.load(factor)
    return number


@triton.jit
def sum_of_parts(parts, stride, inside, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.load(parts, mask=inside, other=0.0)
    for i in tl.static_range(1, PARTS):
        total += tl.load(parts + i * stride, mask=inside, other=0.0)
    return total


# Neither compiled for 1 nor for multiples of 16.
_NUMBERS = ["low", "high", "stream", "threshold", "M", "counters", "zeros", "blocks"]


@triton.jit(do_not_specialize=_NUMBERS)
def _product_kernel(  # type: ignore[no-untyped-def]
    out, rows, small, factor, seed, number, low, high, stream, threshold,
    M, K, C, part, counters, zeros, out_part, out_m, rows_m, rows_k, small_k, small_c,
    DROPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = row.to(tl.int64)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        for start in range(0, zeros, BLOCK_K):
            zero = start + tl.arange(0, BLOCK_K)
            tl.store(out + counters + zero, zero * 0.0, mask=zero < zeros)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = tl.program_id(2) * part
    for start in range(first, tl.minimum(first + part, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        where = rows + m * rows_m + k[None, :].to(tl.int64) * rows_k
        a = tl.load(where, mask=(m < M) & (k[None, :] < K), other=0.0)
        if DROPS:
            a = tl.where(keep_tile(seed, low, high, stream, threshold, row, start, K, BLOCK_K), a, 0.0)
        b = tl.load(small + k[:, None] * small_k + c * small_c, mask=(k[:, None] < K) & (c < C), other=0.0)
        total = _dot(a, b, total)
    where = out + tl.program_id(2) * out_part + m * out_m + c
    tl.store(where, times(number, factor) * total, mask=(m < M) & (c < C))


def _prepare_product(  # type: ignore[no-untyped-def]
    out, rows, small, factor, seed, drops, parts, width, turned, zeroed, carried, tiles
):  # fmt: skip
    rows = flat(rows)
    (M, K), C = rows.shape, small.shape[0 if turned else 1]
    own, block_C = tile("product", M, width, carried=carried, tiles=tiles), _rank_block(C)
    part = ceil_div(ceil_div(K, parts), own.columns) * own.columns
    strides = M * width, width, *rows.stride(), *small.stride()[:: -1 if turned else 1]
    arguments = M, K, C, part, *zeroed, *strides, drops, own.rows, own.columns, block_C
    return (ceil_div(M, own.rows), ceil_div(C, block_C), parts), arguments, own.how


@triton.jit(do_not_specialize=_NUMBERS)
def _expand_kernel(  # type: ignore[no-untyped-def]
    out, a, b, h, factor, seed, number, low, high, stream, threshold,
    M, C, R, out_m, out_c, a_part, a_m, b_r, b_c, DROPS: tl.constexpr, FRESH: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, first = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_C
    m, c = row.to(tl.int64)[:, None], first + tl.arange(0, BLOCK_C)[None, :]
    inside, where = (m < M) & (c < C), out + m * out_m + c.to(tl.int64) * out_c
    if not FRESH:  # at once, not to wait for it
        before = tl.load(where, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        of_a = (m < M) & (r[None, :] < R)
        a_block = sum_of_parts(a + m * a_m + r[None, :], a_part, of_a, PARTS)
        if h is not None and tl.program_id(1) == 0:
            tl.store(h + m * R + r[None, :], a_block.to(h.dtype.element_ty), mask=of_a)
        b_block = tl.load(b + r[:, None] * b_r + c * b_c, mask=(r[:, None] < R) & (c < C), other=0.0)
        total = _dot(a_block, b_block, total)
    total = times(number, factor) * total
    if DROPS:
        total = tl.where(keep_tile(seed, low, high, stream, threshold, row, first, C, BLOCK_C), total, 0.0)
    if not FRESH:
        total += before.to(tl.float32)
    tl.store(where, total.to(out.dtype.element_ty), mask=inside)


def _prepare_expand(out, a, b, h, factor, seed, drops, fresh, parts, width, turned, tiles):  # type: ignore[no-untyped-def]
    out = flat(out)
    (M, C), R = out.shape, b.shape[1 if turned else 0]
    own = tile("expand", M, width, tiles=tiles)
    strides = *out.stride(), M * width, width, *b.stride()[:: -1 if turned else 1]
    arguments = M, C, R, *strides, drops, fresh, parts, own.rows, own.columns, 16
    return (ceil_div(M, own.rows), ceil_div(C, own.columns), 1), arguments, own.how


@triton.jit
def _store_sum(  # type: ignore[no-untyped-def]
    out, total, sums, counter, r, c, R, C, out_r, out_c, SPLITS: tl.constexpr
):  # fmt: skip
    """A sum over all rows: of this program, or of all its splits, added up in their order by the last one to come."""
    inside = (r < R) & (c < C)
    last = True
    if SPLITS > 1:
        sums += r * C + c
        tl.store(sums + tl.program_id(2).to(tl.int64) * R * C, total, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(counter, 1.0, sem="acq_rel") == SPLITS - 1
        if last:
            total = tl.zeros_like(total)
            for i in range(SPLITS):
                total += tl.load(sums + i * R * C, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0.0)  # for the next adapter
    if last:
        tl.store(out + r * out_r + c * out_c, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def _gradients_kernel(  # type: ignore[no-untyped-def]
    work, z, x, A, grad_A, grad_x, grad, h, grad_B, factor, seed, inverse_keep, number, low, high, stream, threshold,
    M, K, N, R, part, blocks, sums, counters, z_part, z_m, x_m, x_k, A_r, A_k, grad_x_m, grad_x_k,
    grad_m, grad_n, h_m, h_r, DROPS: tl.constexpr, FRESH: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CARRIED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY and not CARRIED:
        gdc_wait()
        gdc_launch_dependents()
    # The first programs have blocks of x's columns, the others of dY's; each of them some rows, one tile at a time.
    block, end = tl.program_id(0), (tl.program_id(2) + 1) * part
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    counter = work + counters + block * tl.num_programs(1) + tl.program_id(1)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if block < blocks:
        if z is not None:
            first = block * BLOCK_C
            c = first + tl.arange(0, BLOCK_C)[None, :]
            if grad_x is not None:
                A_block = tl.load(A + r[:, None] * A_r + c * A_k, mask=(r[:, None] < R) & (c < K), other=0.0)
            for start in range(end - part, end, BLOCK_M):
                row = start + tl.arange(0, BLOCK_M)
                m = row.to(tl.int64)[:, None]
                inside = (m < M) & (c < K)
                if grad_x is not None:
                    where = grad_x + m * grad_x_m + c.to(tl.int64) * grad_x_k
                    if not FRESH:  # at once, not to wait for it
                        before = tl.load(where, mask=inside, other=0.0)
                z_tile = sum_of_parts(z + m * z_m + r[None, :], z_part, (m < M) & (r[None, :] < R), PARTS)
                if DROPS:
                    keep = keep_tile(seed, low, high, stream, threshold, row, first, K, BLOCK_C)
                if grad_A is not None:
                    tile = tl.load(x + m * x_m + c.to(tl.int64) * x_k, mask=inside, other=0.0)
                    if DROPS:
                        tile = tl.where(keep, tile, 0.0)
                    total = _dot(tl.trans(z_tile), tile, total)
                if grad_x is not None:
                    delta = inverse_keep * _dot(z_tile, A_block, tl.zeros([BLOCK_M, BLOCK_C], tl.float32))
                    if DROPS:
                        delta = tl.where(keep, delta, 0.0)
                    if not FRESH:
                        delta += before.to(tl.float32)
                    tl.store(where, delta.to(grad_x.dtype.element_ty), mask=inside)
            if grad_A is not None:
                _store_sum(grad_A, inverse_keep * total, work + sums, counter, r[:, None], c, R, K, K, 1, SPLITS)
    elif grad_B is not None:
        c = (block - blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        for start in range(end - part, end, BLOCK_M):
            m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
            h_tile = tl.load(h + m * h_m + r[None, :] * h_r, mask=(m < M) & (r[None, :] < R), other=0.0)
            tile = tl.load(grad + m * grad_m + c.to(tl.int64) * grad_n, mask=(m < M) & (c < N), other=0.0)
            total = _dot(tl.trans(h_tile), tile, total)
        total = times(number, factor) * total
        _store_sum(grad_B, total, work + sums + SPLITS * R * K, counter, r[:, None], c, R, N, 1, R, SPLITS)
    if EARLY and CARRIED:  # nothing here reads dx, which the launch before makes: this fills what that leaves idle
        gdc_wait()


def _prepare_gradients(  # type: ignore[no-untyped-def]
    work, z, x, A, grad_A, grad_x, grad, h, grad_B, factor, seed, drops, fresh, plan
):  # fmt: skip
    R, K = (grad_B.shape[1], 0) if A is None else A.shape
    M, N = plan.M, 0 if grad_B is None else grad_B.shape[0]
    own, block_R = tile("gradients", M, plan.r, drops, plan.gluon is not None, plan.tiles), _rank_block(R)
    part, blocks = ceil_div(ceil_div(M, plan.splits), own.rows) * own.rows, ceil_div(K, own.columns)
    strides = [stride for t in (x, A, grad_x, grad, h) for stride in ((0, 0) if t is None else flat(t).stride())]
    arguments = (
        M, K, N, R, part, blocks, plan.sums, plan.counters, M * plan.r, plan.r, *strides,
        drops, fresh, plan.parts if plan.gluon is None else 1, plan.splits, own.rows, block_R, own.columns,
        plan.gluon is not None,
    )  # fmt: skip
    return (blocks + ceil_div(N, own.columns), ceil_div(R, block_R), plan.splits), arguments, own.how


@triton.jit(do_not_specialize=_NUMBERS)
def _few_rows_kernel(  # type: ignore[no-untyped-def]
    y, x, weight, bias, a, B, h, factor, number,
    M, N, K, R, y_m, x_m, x_k, weight_n, weight_k, bias_n, a_r, a_k, B_n, B_r, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # Transposed, since the rows are few. `a` is A, and each program makes all of h, of what L2 has; or h's parts, which
    # the launch before makes while this one multiplies.
    if EARLY and PARTS == 0:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m, r = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_R)
    base = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    low_rank = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    inside = (m < M) & (r[:, None] < R)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        across, wide_k = k[None, :] < K, k.to(tl.int64)
        where = weight + n.to(tl.int64) * weight_n + wide_k[None, :] * weight_k
        w_tile = tl.load(where, mask=(n < N) & across, other=0.0)
        x_tile = tl.load(x + m * x_m + wide_k[:, None] * x_k, mask=(m < M) & (k[:, None] < K), other=0.0)
        base = _dot(w_tile, x_tile, base)
        if PARTS == 0:
            A_tile = tl.load(a + r[:, None] * a_r + k[None, :] * a_k, mask=(r[:, None] < R) & across, other=0.0)
            low_rank = _dot(A_tile, x_tile, low_rank)
    if PARTS > 0:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        low_rank = sum_of_parts(a + m * R + r[:, None], M * R, inside, PARTS)
    if h is not None and tl.program_id(0) == 0:
        tl.store(h + m * R + r[:, None], low_rank.to(h.dtype.element_ty), mask=inside)
    B_tile = tl.load(B + n * B_n + r[None, :] * B_r, mask=(n < N) & (r[None, :] < R), other=0.0)
    total = base + times(number, factor) * _dot(B_tile, low_rank, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    if bias is not None:
        total += tl.load(bias + n * bias_n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * y_m + n, total.to(y.dtype.element_ty), mask=(m < M) & (n < N))


def _prepare_few_rows(y, x, weight, bias, a, B, h, factor, parts, tiles):  # type: ignore[no-untyped-def]
    y, x = flat(y), flat(x)
    (M, K), (N, R) = x.shape, B.shape
    bias_n = 0 if bias is None else bias.stride(0)
    strides = y.stride(0), *x.stride(), *weight.stride(), bias_n, *a.stride(), *B.stride()
    own = tile("few_rows", M, R, tiles=tiles, beside=parts > 0 and streams(N, x.get_device()))
    block = max(triton.next_power_of_2(M), FEW)
    arguments = M, N, K, R, *strides, parts, block, own.rows, own.columns, _rank_block(R)
    return (ceil_div(N, own.rows), 1, 1), arguments, own.how


_launch_product = Launcher(_product_kernel, _prepare_product, dependent=True)
_launch_expand = Launcher(_expand_kernel, _prepare_expand, dependent=True)
_launch_gradients = Launcher(_gradients_kernel, _prepare_gradients, dependent=True)
_launch_few_rows = Launcher(_few_rows_kernel, _prepare_few_rows, dependent=True)
