"""`gpu_mask` in Triton, bit for bit: as a tile of a kernel's operand, and as a whole tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, stream, threshold, rows, first, columns, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, WIDTH) of the mask, 1 or 0 in int8: the given rows, columns ``first`` onwards. ``columns`` in all, and
    ``first``, are multiples of 8, so that no counter serves two rows."""
    counter = (rows[:, None].to(tl.int64) * columns + first) // 8 + tl.arange(0, WIDTH // 8)[None, :]
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero)
    # In the order of elements: the last of `join`'s dimensions runs fastest.
    even = tl.join(tl.join(_keep(a, threshold), _keep(c, threshold)), tl.join(_keep(b, threshold), _keep(d, threshold)))
    odd = tl.join(
        tl.join(_keep_odd(a, threshold), _keep_odd(c, threshold)),
        tl.join(_keep_odd(b, threshold), _keep_odd(d, threshold)),
    )
    return tl.reshape(tl.join(even, odd), (rows.shape[0], WIDTH))


@triton.jit
def _keep(word, threshold):  # type: ignore[no-untyped-def]
    return (word >= threshold.to(tl.uint32)).to(tl.int8)


@triton.jit
def _keep_odd(word, threshold):  # type: ignore[no-untyped-def]
    return _keep((word << 16) | (word >> 16), threshold)


@triton.jit(do_not_specialize=["stream", "first", "threshold"])
def _mask_kernel(out, seed, stream, first, threshold, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # One Philox counter a lane, eight mask bytes a counter: `count` bytes written, nothing read.
    counter = first // 8 + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros([BLOCK], tl.uint32)
    words = tl.philox(tl.load(seed), low, high, zero + stream.to(tl.uint32), zero)
    for lane in tl.static_range(8):
        word = words[lane // 2]
        keep = _keep(word, threshold) if lane % 2 == 0 else _keep_odd(word, threshold)
        index = counter * 8 + lane - first
        tl.store(out + index, keep, mask=(index >= 0) & (index < count))


def mask(
    seed: torch.Tensor, stream: int, first: int, threshold: int, rows: int, columns: int, device: torch.device
) -> torch.Tensor:
    """Mask elements ``[first, first + rows * columns)`` as a (rows, columns) bool tensor on ``device``, where the seed
    is."""
    out = torch.empty(rows, columns, dtype=torch.bool, device=device)
    block = 1024
    counters = (first + out.numel() + 7) // 8 - first // 8
    if counters:
        with torch.get_device_module(device).device(device):
            _mask_kernel[(triton.cdiv(counters, block),)](
                out.view(torch.int8), seed, stream, first, threshold, out.numel(), BLOCK=block
            )
    return out
