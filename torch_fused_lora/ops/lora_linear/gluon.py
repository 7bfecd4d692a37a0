"""A base product that carries the rank in its K loop: bfloat16 rows, on Hopper, through Gluon.

``C = [a | U] [b | V]``: after a's and b's columns of K come those of U (M, R) and V, narrow bfloat16 operands that
`_augment_kernel` makes of a product with an adapter, the scaling, the other adapter and the bias, which may still be at
it when the product begins (`Launcher`). A float32 adapter is there in two bfloat16 parts, as in `triton._dot`: R is
three times the rank. So the adapters' term is rounded with the base product, once, and the full width is written once
and not read again.

A program a multiprocessor goes through 128 x 256 (or 128) tiles of C. One of its warps has the tensor copy engine fill
three (or four) stages of 64 columns of K; two groups of four warps multiply 64 rows each, and hand a stage back when
they are done with it. Bytes moved are cuBLAS's, whose time it has, and those of U and V. With dropout U's columns come
first, and the mask is drawn on what they have made.

Whether a Gluon kernel is right depends on the compiler too, and one that is wrong waits for ever: this one is taken
where Triton's release is one that it has run with (`launcher.TESTED`).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..dropout.triton import philox
from ..launcher import Grid, Launch, Launcher, Launches, start_of
from ..rows import flat
from .triton import NO_DROPOUT, NO_DROPOUTS, Dropouts, Scale, ceil_div, sum_of_parts, times

ROWS, STEP = 128, 64  # of a tile; columns of K in a stage

# A newer Triton, which CI compiles with, has other names.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_philox = gluon.jit(philox.fn)


def product(
    launches: Launches,
    shape: tuple[int, ...],
    rows: Tensor,
    weight: Tensor,
    turned: bool,
    bias: Tensor | None,
    parts: int,
    found: Tensor,
    adapter: Tensor,
    scale: Scale,
    h: Tensor | None = None,
    dropouts: Dropouts = NO_DROPOUTS,
) -> Tensor:
    """``rows weight + bias + dropout(scale · a adapter)``, fresh, of this ``shape`` (..., N) and rounded once: bfloat16
    rows (..., K), `by_rows`, weight (K, N), adapter (r, N), both ``turned``, (N, K) and (N, r), or neither, and a the
    sum of ``found``'s parts (parts, M, r). ``h`` (M, r), if given, becomes a; it may be the first of the parts."""
    M, N = math.prod(shape[:-1]), shape[-1]
    r = adapter.shape[1 if turned else 0]
    terms = 3 if adapter.dtype is torch.float32 else 1
    width = -(-(terms * r + (bias is not None)) // 8) * 8
    u, v = rows.new_empty((M, width)), rows.new_empty((N, width) if turned else (width, N))
    dropout, (number, factor) = dropouts.each[0] if dropouts.each else NO_DROPOUT, scale
    narrow = u, v, found, adapter, bias, h, factor
    _launch_augment(narrow, (number * dropout.inverse_keep,), (parts, terms, width, turned), launches)
    out = rows.new_empty(shape)
    wide = rows, weight, u, v, out, dropouts.seed
    _launch_carrying(wide, dropouts.words(dropout), (dropout.drops, turned), launches)
    return out


# ------------------------------------------------------------------------------------------------- the narrow operands


@triton.jit(do_not_specialize=["M", "number"])
def _augment_kernel(  # type: ignore[no-untyped-def]
    u, v, found, adapter, bias, h, factor, number, M, N, R, row_blocks, v_n, v_r, adapter_n, adapter_r, bias_n,
    PARTS: tl.constexpr, TERMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    # A row of U is a's high part, its low one, the high one again, 1 for the bias and zeros; one of V the adapter's
    # high part twice, its low one, the bias and zeros.
    block = tl.program_id(0)
    i = ((block - tl.where(block < row_blocks, 0, row_blocks)) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    r, rest = tl.arange(0, BLOCK_R)[None, :], WIDTH - 8 + tl.arange(0, 8)[None, :]
    if block < row_blocks:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        inside = (i < M) & (r < R)
        value = sum_of_parts(found + i * R + r, M.to(tl.int64) * R, inside, PARTS)
        if h is not None:
            tl.store(h + i * R + r, value.to(h.dtype.element_ty), mask=inside)
        value = times(number, factor) * value
        where, high = u + i * WIDTH, value.to(tl.bfloat16)
        tl.store(where + rest, (rest == TERMS * R).to(tl.float32).to(tl.bfloat16), mask=(i < M) & (rest >= TERMS * R))
        tl.store(where + r, high, mask=inside)
        if TERMS == 3:
            tl.store(where + R + r, (value - high.to(tl.float32)).to(tl.bfloat16), mask=inside)
            tl.store(where + 2 * R + r, high, mask=inside)
    else:
        if EARLY:  # what is read here is older than the launch before
            gdc_launch_dependents()
        inside, where = (i < N) & (r < R), v + i * v_n
        given = tl.load(adapter + i * adapter_n + r * adapter_r, mask=inside, other=0.0)
        high = given.to(tl.bfloat16)
        last = tl.zeros([BLOCK, 8], tl.bfloat16)
        if bias is not None:
            last = tl.where(rest == TERMS * R, tl.load(bias + i * bias_n, mask=i < N, other=0.0), last)
        tl.store(where + rest * v_r, last, mask=(i < N) & (rest >= TERMS * R))
        tl.store(where + r * v_r, high, mask=inside)
        if TERMS == 3:
            tl.store(where + (R + r) * v_r, high, mask=inside)
            tl.store(where + (2 * R + r) * v_r, (given - high.to(tl.float32)).to(tl.bfloat16), mask=inside)


def _prepare_augment(u, v, found, adapter, bias, h, factor, parts, terms, width, turned):  # type: ignore[no-untyped-def]
    M, (N, R) = u.shape[0], adapter.shape[:: 1 if turned else -1]
    order = slice(None, None, 1 if turned else -1)
    bias_n, row_blocks = 0 if bias is None else bias.stride(0), ceil_div(M, 64)
    strides = *v.stride()[order], *adapter.stride()[order], bias_n
    arguments = M, N, R, row_blocks, *strides, parts, terms, width, 64, triton.next_power_of_2(R)
    return (row_blocks + ceil_div(N, 64), 1, 1), arguments, {"num_warps": 4}


# --------------------------------------------------------------------------------------------------------- the product


@gluon.jit
def _place(tile, across_m, across_n, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's row and column: those of a few rows come together, and find their columns in L2."""
    first = tile // (GROUP * across_n) * GROUP
    size = min(across_m - first, GROUP)
    return first + tile % size, tile % (GROUP * across_n) // size


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _fill(a, b, ring, row, column, steps, stage, phase, TURNED: gl.constexpr):  # type: ignore[no-untyped-def]
    a_tiles, b_tiles, full, empty = ring
    BYTES: gl.constexpr = a.block_type.nbytes + b.block_type.nbytes
    WIDTH: gl.constexpr = a.block_type.shape[1]
    for step in range(steps):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), BYTES)
        _load(a, [row, step * WIDTH], full.index(stage), a_tiles.index(stage))
        if TURNED:
            _load(b, [column, step * WIDTH], full.index(stage), b_tiles.index(stage))
        else:
            _load(b, [step * WIDTH, column], full.index(stage), b_tiles.index(stage))
        stage, phase = _next(stage, phase, a_tiles.type.shape[0])
    return stage, phase


@gluon.jit
def _copies(  # type: ignore[no-untyped-def]
    a, b, u, v, ring, shape, ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    DROPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    across_m, across_n, narrow, wide = shape
    stage, phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), across_m * across_n, gl.num_programs(0)):
        m, n = _place(tile, across_m, across_n, GROUP)
        row, column = m * ROWS, n * COLUMNS
        if not DROPS:
            stage, phase = _fill(a, b, ring, row, column, wide, stage, phase, TURNED)
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        stage, phase = _fill(u, v, ring, row, column, narrow, stage, phase, TURNED)
        if DROPS:
            stage, phase = _fill(a, b, ring, row, column, wide, stage, phase, TURNED)


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    total, ring, steps, stage, phase, FIRST: gl.constexpr, TURNED: gl.constexpr
):  # fmt: skip
    a_tiles, b_tiles, full, empty = ring
    STAGES: gl.constexpr = a_tiles.type.shape[0]
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        a_tile, b_tile = a_tiles.index(stage).slice(FIRST, total.type.shape[0]), b_tiles.index(stage)
        if TURNED:
            b_tile = b_tile.permute((1, 0))
        running = warpgroup_mma(a_tile, b_tile, total, is_async=True)
        total = warpgroup_mma_wait(num_outstanding=1, deps=(running,))
        # The product before this one is done. (A variable for its stage would not be carried by the loop.)
        _barrier()
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=step > 0)
        stage, phase = _next(stage, phase, STAGES)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    _barrier()
    mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
    return total, stage, phase


@gluon.jit
def _drop(total, drop, row, column, columns):  # type: ignore[no-untyped-def]
    """`dropout.triton.keep_tile` of a tile's elements: a lane draws eight of a row, as bits, for the lanes that have
    them."""
    seed, low, high, stream, threshold = drop
    ROWS: gl.constexpr = total.type.shape[0]
    COUNTERS: gl.constexpr = total.type.shape[1] // 8
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LANES))[:, None]
    across = column // 8 + gl.arange(0, COUNTERS, gl.SliceLayout(0, LANES))[None, :]
    counter = rows.to(gl.int64) * (columns // 8) + across
    index_low, index_high = (counter & 0xFFFFFFFF).to(gl.uint32), (counter >> 32).to(gl.uint32)
    if seed is not None:
        key = gl.load(seed)
        low, high = key & 0xFFFFFFFF, key >> 32
    bits, least = index_low * 0, threshold.to(gl.uint32)
    words = _philox(index_low, index_high, stream, low.to(gl.uint32), high.to(gl.uint32))
    for i in gl.static_range(4):
        word = words[i]
        bits |= (word >= least).to(gl.uint32) << (2 * i)
        bits |= (((word << 16) | (word >> 16)) >= least).to(gl.uint32) << (2 * i + 1)
    eights = total.reshape((ROWS, COUNTERS, 8))
    OWN: gl.constexpr = eights.type.layout
    bits = gl.convert_layout(bits, gl.SliceLayout(2, OWN)).expand_dims(2)
    bit = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(0, OWN))).expand_dims(0).expand_dims(0)
    eights = gl.where(((bits >> bit.to(gl.uint32)) & 1) != 0, eights, 0.0)
    return gl.convert_layout(eights.reshape((ROWS, COUNTERS * 8)), total.type.layout, assert_trivial=True)


@gluon.jit
def _products(  # type: ignore[no-untyped-def]
    c, ring, c_tiles, shape, columns, drop, HALF: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr,
    DROPS: gl.constexpr,
):  # fmt: skip
    across_m, across_n, narrow, wide = shape
    ROWS: gl.constexpr = c.block_type.shape[0]
    COLUMNS: gl.constexpr = c.block_type.shape[1]
    FIRST: gl.constexpr = HALF * ROWS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    c_tile = c_tiles.index(HALF)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), across_m * across_n, gl.num_programs(0)):
        m, n = _place(tile, across_m, across_n, GROUP)
        row, column = m * ROWS * 2 + FIRST, n * COLUMNS
        total = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
        if DROPS:
            total, stage, phase = _multiply(total, ring, narrow, stage, phase, FIRST, TURNED)
            total = _drop(total, drop, row, column, columns)
            total, stage, phase = _multiply(total, ring, wide, stage, phase, FIRST, TURNED)
        else:
            total, stage, phase = _multiply(total, ring, narrow + wide, stage, phase, FIRST, TURNED)
        tma.store_wait(pendings=0)
        _barrier()
        c_tile.store(total.to(c_tile.dtype))
        fence_async_shared()
        _barrier()
        _store(c, [row, column], c_tile)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["low", "high", "stream", "threshold", "across_m", "across_n", "narrow", "wide"])
def _carrying_kernel(  # type: ignore[no-untyped-def]
    a, b, u, v, c, seed, low, high, stream, threshold, across_m, across_n, narrow, wide, columns,
    TURNED: gl.constexpr, DROPS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, a.block_type.shape[0], a.block_type.shape[1]], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, b.block_type.shape[0], b.block_type.shape[1]], b.layout)
    c_tiles = gl.allocate_shared_memory(c.dtype, [2, c.block_type.shape[0], c.block_type.shape[1]], c.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    ROWS: gl.constexpr = a.block_type.shape[0]
    COLUMNS: gl.constexpr = c.block_type.shape[1]
    ring, shape = (a_tiles, b_tiles, full, empty), (across_m, across_n, narrow, wide)
    drop = (seed, low, high, stream, threshold)
    gl.warp_specialize(
        [
            (_products, (c, ring, c_tiles, shape, columns, drop, 0, GROUP, TURNED, DROPS)),
            (_products, (c, ring, c_tiles, shape, columns, drop, 1, GROUP, TURNED, DROPS)),
            (_copies, (a, b, u, v, ring, shape, ROWS, COLUMNS, GROUP, TURNED, DROPS, EARLY)),
        ],
        [4, 1],
        [232, 40],
    )


def _tile(M: int, N: int, device: int) -> tuple[int, int, float]:
    """Columns, stages, and the time they take over the time of tiles that leave no multiprocessor idle; the narrower
    tiles are 4 % slower."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def time(columns: int, slower: float) -> float:
        waves = ceil_div(ceil_div(M, ROWS) * ceil_div(N, columns), multiprocessors)
        return slower * waves * columns * ROWS * multiprocessors / (M * N)

    wide, narrow = time(256, 1.0), time(128, 1.04)
    return (256, 3, wide) if wide <= narrow else (128, 4, narrow)


@functools.lru_cache(4096)
def fills(M: int, N: int, device: int) -> bool:
    """Whether there are tiles enough: cuBLAS has smaller ones, and is faster by more than the rank costs."""
    return _tile(M, N, device)[2] <= 1.2


def _blocks(M: int, N: int, device: int, turned: bool) -> tuple[list[list[int]], int]:
    """Of the descriptors of rows, weight, u, v and out; and stages."""
    columns, stages, _ = _tile(M, N, device)
    b = [columns, STEP] if turned else [STEP, columns]
    return [[ROWS, STEP], b, [ROWS, STEP], b, [ROWS // 2, columns]], stages


def _describe(rows, weight, u, v, out, seed, drops, turned):  # type: ignore[no-untyped-def]
    rows, out = flat(rows), flat(out)
    blocks, _ = _blocks(*out.shape, out.get_device(), turned)
    layouts = [gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16) for block in blocks]
    described = zip((rows, weight, u, v, out), blocks, layouts, strict=True)
    return *(TensorDescriptor.from_tensor(*of) for of in described), seed


def _prepare_carrying(rows, weight, u, v, out, seed, drops, turned):  # type: ignore[no-untyped-def]
    (M, N), device = flat(out).shape, out.get_device()
    (*_, (_, columns)), stages = _blocks(M, N, device, turned)
    across_m, across_n = ceil_div(M, ROWS), ceil_div(N, columns)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    steps = ceil_div(u.shape[1], STEP), ceil_div(rows.shape[-1], STEP)
    arguments = across_m, across_n, *steps, N, turned, drops, stages, 8
    return (min(across_m * across_n, multiprocessors), 1, 1), arguments, {"num_warps": 4}


def _encoder(descriptor: TensorDescriptor, metadata: Any) -> Callable[[int | None], list[Any]]:
    """Of an address the arguments that a descriptor like this one is to a launch, encoded once."""
    like = {"shape": list(descriptor.shape), "strides": list(descriptor.strides), "padding": descriptor.padding}

    @functools.lru_cache(1024)
    def encode(pointer: int | None) -> list[Any]:
        return make_tensordesc_arg(SimpleNamespace(base=SimpleNamespace(data_ptr=lambda: pointer), **like), metadata)

    return encode


def _bind(compiled: Any, grid: Grid, arguments: tuple[Any, ...], described: tuple[Any, ...]) -> Launch:
    """A launch past the part of Triton's launcher that encodes all descriptors anew on every call."""
    run, given = start_of(compiled)
    run = inspect.getclosurevars(run).nonlocals["launcher"]
    encoders = [_encoder(*pair) for pair in zip(described[:-1], compiled.metadata.tensordesc_meta, strict=True)]

    def launch(stream: int, pointers: list[int | None], numbers: tuple[int | float, ...]) -> None:
        encoded: list[Any] = []
        for encode, pointer in zip(encoders, pointers, strict=False):
            encoded += encode(pointer)
        run(*grid, stream, *given, *encoded, pointers[-1], *numbers, *arguments)

    return launch


_launch_augment = Launcher(_augment_kernel, _prepare_augment, dependent=True)
_launch_carrying = Launcher(_carrying_kernel, _prepare_carrying, _describe, _bind, dependent=True)
