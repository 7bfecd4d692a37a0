"""`keep_mask` as one Triton kernel: bit for bit the mask that the NumPy code draws."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["seed", "stream", "first", "threshold"])
def _mask_kernel(out, seed, stream, first, threshold, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # One Philox counter a lane, eight mask bytes a counter: `count` bytes written, nothing read.
    counter = first // 8 + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros([BLOCK], tl.uint32)
    words = tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero)
    for lane in tl.static_range(8):
        word = words[lane // 2]
        if lane % 2 == 1:
            word = (word << 16) | (word >> 16)
        index = counter * 8 + lane - first
        tl.store(out + index, word.to(tl.int64) >= threshold, mask=(index >= 0) & (index < count))


def mask(
    seed: int, stream: int, first: int, threshold: int, rows: int, columns: int, device: torch.device
) -> torch.Tensor:
    """Mask elements ``[first, first + rows * columns)`` as a (rows, columns) bool tensor on ``device``."""
    out = torch.empty(rows, columns, dtype=torch.bool, device=device)
    block = 1024
    counters = (first + out.numel() + 7) // 8 - first // 8
    if counters:
        with torch.get_device_module(device).device(device):
            _mask_kernel[(triton.cdiv(counters, block),)](out, seed, stream, first, threshold, out.numel(), BLOCK=block)
    return out
