"""Every kernel for NVIDIA once or twice, at small ragged shapes: what compute-sanitizer is to watch, on a card.

    compute-sanitizer --tool racecheck python -m tests.operators.sanitized

Gluon's kernel is left out unless ``--gluon`` is given: racecheck knows nothing of its barriers in memory, nor of those
of cuBLAS's kernels for Hopper, and reports both; Triton's own hand-over of warps is all that it names of ours.
"""

from __future__ import annotations

import argparse
import itertools

import torch

import torch_fused_lora as tfl
from torch_fused_lora.affine import quantize
from torch_fused_lora.ops.dropout import keep_mask
from torch_fused_lora.ops.lora_linear import gluon, triton
from torch_fused_lora.ops.lora_linear_quantized.operator import lora_linear_quantized_stacked

CUDA = torch.device("cuda")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def layer(M: int, N: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float) -> None:
    """Forward without gradients, forward and backward."""
    K = 264
    x = torch.randn(M, K, device=CUDA, dtype=dtype, requires_grad=True)
    W, bias = torch.randn(N, K, device=CUDA, dtype=dtype), torch.randn(N, device=CUDA, dtype=dtype)
    A, B = (torch.randn(s, device=CUDA, dtype=adapter_dtype, requires_grad=True) for s in ((r, K), (N, r)))
    with torch.no_grad():
        found = [tfl.lora_linear(x, W, bias, A, B, 0.5, p, True)]
    y = tfl.lora_linear(x, W, bias, A, B, 0.5, p, True)
    found += torch.autograd.grad(y, [x, A, B], torch.randn_like(y))
    assert all(t.isfinite().all() for t in found), (M, N, r, dtype, adapter_dtype, p)


def packed(M: int, bits: int) -> None:
    weight = quantize(torch.randn(72, 264, device=CUDA).repeat(1, 8), bits, 64)
    x = torch.randn(M, 8 * 264, device=CUDA, dtype=BFLOAT16, requires_grad=True)
    A, B = (torch.randn(s, device=CUDA, requires_grad=True) for s in ((5, x.shape[1]), (72, 5)))
    y = lora_linear_quantized_stacked(x, weight, None, A, B, 0.5)
    assert torch.autograd.grad(y, [x, A, B], torch.randn_like(y))[0].isfinite().all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gluon", action="store_true")
    if parser.parse_args().gluon:
        gluon.fills = lambda *_: True
        for adapter_dtype, p in itertools.product((FLOAT32, BFLOAT16), (0.0, 0.3)):
            layer(520, 264, 16, BFLOAT16, adapter_dtype, p)
        return
    triton.carrying_rank = lambda *_: None
    dtypes = (BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)
    for M, of, r, p in itertools.product((5, 40, 300), dtypes, (16, 72), (0.0, 0.3)):
        layer(M, 2056 if M == 40 else 200, r, *of, p)
    for M, bits in itertools.product((5, 40), (4, 8)):
        packed(M, bits)
    for dtype in (torch.bool, FLOAT32):
        keep_mask(5, 0, 3, 70, 129, 0.3, CUDA, dtype)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
