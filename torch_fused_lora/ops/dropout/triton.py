"""`gpu_mask` in Triton, bit for bit: as a tile of a kernel's operand, and as a whole tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launcher import Launcher, kind, prepared


def key_words(seed: torch.Tensor | int) -> tuple[torch.Tensor | None, int, int]:
    """What a kernel's arguments say of a seed: it as a tensor on the device, or the two halves of a number, integers of
    32 bits with a sign."""
    if isinstance(seed, torch.Tensor):
        if not seed.is_cpu:
            return seed, 0, 0
        seed = int(seed)
    return None, _signed(seed & 0xFFFFFFFF), _signed(seed >> 32 & 0xFFFFFFFF)


def stream_words(stream: int, p: float) -> tuple[int, int]:
    """And of an adapter's stream and probability: stream and threshold."""
    return stream, _signed(min(round(p * 2**32), 2**32 - 1))


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def _key(seed, low, high):  # type: ignore[no-untyped-def]
    if seed is not None:
        key = tl.load(seed)
        low, high = key & 0xFFFFFFFF, key >> 32
    return low.to(tl.uint32), high.to(tl.uint32)


@triton.jit
def philox(index_low, index_high, stream, key_low, key_high):  # type: ignore[no-untyped-def]
    """The four words of counters (index, stream, 0). `tl.philox` multiplies twice where this does once, for 64 bits."""
    a, b, c, d = index_low, index_high, index_low * 0 + stream.to(tl.uint32), index_low * 0
    for _ in tl.static_range(7):
        of_a, of_c = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (of_c >> 32).to(tl.uint32) ^ b ^ key_low, (of_a >> 32).to(tl.uint32) ^ d ^ key_high
        b, d = of_c.to(tl.uint32), of_a.to(tl.uint32)
        key_low, key_high = key_low + 0x9E3779B9, key_high + 0xBB67AE85
    return a, b, c, d


@triton.jit
def keep_tile(  # type: ignore[no-untyped-def]
    seed, low, high, stream, threshold, rows, first, columns, WIDTH: tl.constexpr
):  # fmt: skip
    """(rows, WIDTH) of the mask: the given rows, columns ``first`` onwards. ``columns`` in all, and
    ``first``, are multiples of 8, so that no counter serves two rows."""
    counter = rows[:, None].to(tl.int64) * (columns // 8) + (first // 8 + tl.arange(0, WIDTH // 8)[None, :])
    index_low, index_high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    key_low, key_high = _key(seed, low, high)
    a, b, c, d = philox(index_low, index_high, stream, key_low, key_high)
    # In the order of elements: the last of `join`'s dimensions runs fastest.
    even = tl.join(tl.join(_keep(a, threshold), _keep(c, threshold)), tl.join(_keep(b, threshold), _keep(d, threshold)))
    odd = tl.join(
        tl.join(_keep_odd(a, threshold), _keep_odd(c, threshold)),
        tl.join(_keep_odd(b, threshold), _keep_odd(d, threshold)),
    )
    return tl.reshape(tl.join(even, odd), (rows.shape[0], WIDTH)) != 0


@triton.jit
def _keep(word, threshold):  # type: ignore[no-untyped-def]
    return (word >= threshold.to(tl.uint32)).to(tl.int8)


@triton.jit
def _keep_odd(word, threshold):  # type: ignore[no-untyped-def]
    return _keep((word << 16) | (word >> 16), threshold)


@triton.jit(do_not_specialize=["low", "high", "stream", "threshold", "first"])
def _mask_kernel(  # type: ignore[no-untyped-def]
    out, seed, low, high, stream, threshold, first, count, BLOCK: tl.constexpr
):  # fmt: skip
    # One Philox counter a lane, eight elements a counter: `count` elements written, nothing read.
    counter = first // 8 + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index_low, index_high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    key_low, key_high = _key(seed, low, high)
    found = philox(index_low, index_high, stream, key_low, key_high)
    for lane in tl.static_range(8):
        word = found[lane // 2]
        keep = _keep(word, threshold) if lane % 2 == 0 else _keep_odd(word, threshold)
        index = counter * 8 + lane - first
        tl.store(out + index, keep.to(out.dtype.element_ty), mask=(index >= 0) & (index < count))


def _prepare_mask(out, seed, offset, _):  # type: ignore[no-untyped-def]
    block = 1024
    return (triton.cdiv((offset + out.numel() + 7) // 8, block), 1, 1), (out.numel(), block), {}


_launch_mask = Launcher(_mask_kernel, _prepare_mask)


def mask(
    seed: torch.Tensor | int,
    stream: int,
    first: int,
    p: float,
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype = torch.bool,
) -> torch.Tensor:
    """Mask elements ``[first, first + rows * columns)`` as a (rows, columns) tensor of ones and zeros on ``device``."""
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    if out.numel():
        bits = out.view(torch.int8) if dtype is torch.bool else out
        key_tensor, low, high = key_words(seed)
        options = first % 8, first >= 2**31  # a number of 64 bits is another kernel's
        key = mask, kind(bits), kind(key_tensor), options
        launches = prepared.get(key)
        if launches is None:
            launches = prepared.keep(key, {})
        _launch_mask((bits, key_tensor), (low, high, *stream_words(stream, p), first), options, launches)
    return out
