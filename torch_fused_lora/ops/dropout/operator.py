"""Dropout that is remembered as a seed.

Element ``i`` (row-major, of an M x K matrix) of adapter ``stream`` is kept where its word of 32 random bits is at least
``p * 2**32``. Two neighbours share a word, one reads its two halves swapped: each is dropped with probability p to 32
bits, and whether both are is as good as independent, since the high half decides alone but for a tie, one time in
2**16. The mask is a pure function of (seed, stream, i): forward and backward draw any block of it again, in any order,
and nothing but the seed is saved. (On a CPU the latest small ones are kept beside it, 16 MiB of them at most.)

The words are of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). On a GPU, and for one:
Philox4x32-7, key = seed, counter = (i // 8, stream, 0), word ``i % 8 // 2``, whose high half an even element reads as
its own. Its rounds are most of what dropout costs there: seven are the fewest with which the paper found it to pass all
of BigCrush. On a CPU: NumPy's Philox4x64-10, key = (seed, stream), counter = i // 16, whose half ``i % 16`` is element
i's.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dispatch import NAMESPACE, define, implement

_of_thread = threading.local()
_MULTIPLIER = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_CPU = torch.device("cpu")  # read faster than its name
_SEEDS = 2**63 - 1
_BLOCK = 1 << 14  # counters at a time: 0.75 MiB of state, within a core's L2


def draw_seed(x: Tensor, as_number: bool = False) -> int | Tensor:
    """A fresh seed for x, 0-dim int64, of torch's default CPU generator: the host reads it without waiting. Where a
    CUDA graph is captured, or may be, it is on x's device and of its generator, so that each replay draws another one.
    `torch.manual_seed` reaches both generators, and checkpointing saves and restores both.

    ``as_number``: the same seed as a number, which is drawn in half the time, unless a graph is captured."""
    captured = x.is_cuda and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    if captured or not as_number:
        return torch.randint(_SEEDS, (), device=x.device if captured else _CPU)
    if (drawn := getattr(_of_thread, "seed", None)) is None:
        with torch.inference_mode(False):
            drawn = _of_thread.seed = torch.empty((), dtype=torch.int64, device=_CPU)
    return int(drawn.random_(_SEEDS).item())


def as_seed(seed: int | Tensor | None) -> Tensor | None:
    """As operators take it that are called by the dispatcher."""
    return torch.tensor(seed, device=_CPU) if isinstance(seed, int) else seed


def keep_mask(
    seed: int | Tensor,
    stream: int,
    start: int,
    rows: int,
    columns: int,
    p: float,
    device: torch.device,
    dtype: torch.dtype = torch.bool,
) -> torch.Tensor:
    """Rows ``[start, start + rows)`` of the keep-mask, a (rows, columns) tensor on ``device`` of ones and zeros."""
    first, count = start * columns, rows * columns
    threshold = min(round(p * 2**32), 2**32 - 1)
    if device.type == "cpu":
        keep = _cpu_mask(int(seed), stream, first, count, threshold)
        if dtype is torch.float32:  # NumPy's conversion costs half a call of torch's
            return torch.from_numpy(keep.astype(np.float32)).view(rows, columns)
        if dtype is torch.bool:  # a copy: what was drawn may serve again
            return torch.from_numpy(keep.copy()).view(rows, columns)
        # six times as fast as from bool
        return torch.from_numpy(keep.view(np.uint8)).to(dtype, copy=True).view(rows, columns)
    if device.type in ("cuda", "xpu") and (triton_mask := _triton_mask()):
        return triton_mask(seed, stream, first, p, rows, columns, device, dtype)
    if device.type != "mps":  # there only torch.func and a double backward want a mask as a tensor
        _warn_host_mask(device.type)
    return gpu_mask(int(seed), stream, first, count, threshold).view(rows, columns).to(device, dtype)


_CHUNK = 1 << 20  # elements that one thread draws at a time, 5 ms of work


def _cpu_mask(seed: int, stream: int, first: int, count: int, threshold: int) -> Any:
    """Elements ``[first, first + count)``, drawn by as many threads as torch has."""
    begin, end = first // 16, -(-(first + count) // 16)  # counters, of four 64-bit words each
    size = 16 * (end - begin)
    if size <= _CHUNK:
        keep = (_drawn_of_late if size <= _SMALL else _drawn)(seed, stream, begin, size, threshold)
    else:
        keep = np.empty(size, np.bool_)

        def draw(chunk: int) -> None:
            out = keep[chunk : chunk + _CHUNK]
            out[:] = _drawn(seed, stream, begin + chunk // 16, len(out), threshold)

        each = _threads().map if torch.get_num_threads() > 1 else map
        list(each(draw, range(0, size, _CHUNK)))
    return keep[first % 16 : first % 16 + count]


def _drawn(seed: int, stream: int, counter: int, count: int, threshold: int) -> Any:
    """``count`` elements from a counter on."""
    halves = _philox64(seed, stream, counter).random_raw(count // 4).view(np.uint16)
    high, low = threshold >> 16, threshold & 0xFFFF
    keep = halves > high
    ties = (halves == high).nonzero()[0]
    if len(ties):
        keep[ties] = halves[ties ^ 1] >= low
    return keep


_SMALL = 1 << 16  # elements, and bytes, of a mask that is kept for a while: backward asks for what forward drew
_drawn_of_late = functools.lru_cache(256)(_drawn)


def _philox64(seed: int, stream: int, counter: int) -> np.random.Philox:
    """NumPy's generator before the words of a counter. To give the thread's own a state, of lists, takes a tenth of the
    time that a new one does."""
    if (own := getattr(_of_thread, "own", None)) is None:
        at: dict[str, Any] = {"counter": [0, 0, 0, 0], "key": [0, 0]}
        state = {"bit_generator": "Philox", "state": at, "buffer": [0, 0, 0, 0], "buffer_pos": 4}
        own = _of_thread.own = np.random.Philox(0), state | {"has_uint32": 0, "uinteger": 0}, at
    bits, whole, at = own
    at["counter"][0], at["key"] = counter, (seed, stream)
    bits.state = whole
    return bits


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "dropout")


if hasattr(os, "register_at_fork"):  # not on Windows; threads do not survive a fork
    os.register_at_fork(after_in_child=_threads.cache_clear)


def gpu_mask(seed: int, stream: int, first: int, count: int, threshold: int) -> torch.Tensor:
    """Elements ``[first, first + count)`` of a GPU's mask, drawn on the CPU."""
    words = philox(seed, stream, first // 8, (first + count + 7) // 8)
    keep = np.empty((len(words), 2), np.bool_)
    np.greater_equal(words, np.uint32(threshold), out=keep[:, 0])
    np.greater_equal(words << np.uint32(16) | words >> np.uint32(16), np.uint32(threshold), out=keep[:, 1])
    return torch.from_numpy(keep.reshape(-1)[first % 8 : first % 8 + count])


def philox(seed: int, stream: int, first: int, last: int) -> np.ndarray:
    """The uint32 words of counters ``[first, last)``: 4 a counter, in order."""
    words = np.empty((last - first, 4), np.uint32)
    for block in range(0, last - first, _BLOCK):
        out = words[block : block + _BLOCK]
        index = np.arange(first + block, first + block + len(out), dtype=np.uint64)
        # 32-bit words c0 to c3 in 64-bit integers. A round multiplies (c0, c2) and xors what is in (c3, c1).
        multiplied, xored = np.empty((2, len(out)), np.uint64), np.empty((2, len(out)), np.uint64)
        multiplied[0], multiplied[1] = index & _LOW, stream
        xored[0], xored[1] = 0, index >> _HALF
        product = np.empty_like(multiplied)
        key = np.array([[seed & 0xFFFFFFFF], [seed >> 32 & 0xFFFFFFFF]], dtype=np.uint64)
        for _ in range(7):
            np.multiply(multiplied, _MULTIPLIER, out=product)
            np.right_shift(product, _HALF, out=multiplied)
            multiplied ^= xored
            multiplied = multiplied[::-1]
            multiplied ^= key
            np.bitwise_and(product, _LOW, out=xored)
            key = (key + _WEYL) & _LOW
        out[:, 0], out[:, 2] = multiplied
        out[:, 3], out[:, 1] = xored
    return words.reshape(-1)


@functools.cache
def _triton_mask() -> Callable[..., Tensor] | None:
    """The same mask by one Triton kernel (CUDA, ROCm, XPU), or None where Triton is not installed."""
    try:
        from .triton import mask
    except ImportError:
        return None
    return mask


@functools.cache
def _warn_host_mask(device_type: str) -> None:
    warnings.warn(
        f"torch_fused_lora: dropout masks for device '{device_type}' are generated on the CPU and copied, which is "
        "slow; install triton, or train with dropout_p=0",
        stacklevel=2,
    )


define(
    "dropout_mask",
    "(Tensor seed, int stream, SymInt rows, SymInt columns, float p, Device device) -> Tensor",
)


def _dropout_mask(seed: Tensor, stream: int, rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    return keep_mask(seed, stream, 0, rows, columns, p, device)


def _dropout_mask_fake(seed: Tensor, stream: int, rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bool, device=device)


def _dropout_mask_vmap(
    info: Any, in_dims: Any, seed: Tensor, stream: int, rows: int, columns: int, p: float, device: torch.device
) -> tuple[Tensor, int]:
    seeds = seed.movedim(in_dims[0], 0).unbind()
    mask = getattr(torch.ops, NAMESPACE).dropout_mask
    return torch.stack([mask(s, stream, rows, columns, p, device) for s in seeds]), 0


implement("dropout_mask", _dropout_mask, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::dropout_mask", _dropout_mask_fake)
torch.library.register_vmap(f"{NAMESPACE}::dropout_mask", _dropout_mask_vmap)
