"""What a call of tfl.lora_linear on mps costs the host: ``python tests/host_cost.py``.

On the bench with execution off, interleaved with F.linear on CPU tensors of the same tiny shape, whose time says how
fast the machine is at the moment. Modelled: a Mac's own driver calls are not in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import quantiles

import torch
import torch.nn.functional as F

import conftest  # noqa: F401  installs the bench and builds the extension
import mps_on_linux
import torch_fused_lora as tfl

ROUNDS, CALLS = 41, 200
WIDTH, RANK = 16, 4


def operands(device: str, needs_gradient: bool) -> list[torch.Tensor]:
    shapes = (1, WIDTH), (WIDTH, WIDTH), (WIDTH,), (RANK, WIDTH), (WIDTH, RANK)
    return [torch.randn(s, device=device).requires_grad_(needs_gradient and len(s) == 2) for s in shapes]


def microseconds(call: Callable[[], object]) -> float:
    """Of this thread's CPU time: other processes are not in it, nor the thread that stands in for the GPU."""
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) / CALLS * 1e6


def measure(needs_gradient: bool) -> tuple[list[float], list[float]]:
    """Microseconds a call of F.linear on the CPU and of lora_linear on mps, a round each."""
    x, weight, bias, lora_A, lora_B = operands("mps", needs_gradient)
    plain = [t.detach() for t in operands("cpu", False)[:3]]
    plain[0].requires_grad_(needs_gradient)
    ours, linear = [], []
    with torch.set_grad_enabled(needs_gradient):
        for _ in range(ROUNDS + 1):
            linear.append(microseconds(lambda: F.linear(*plain)))
            with mps_on_linux.execution(enabled=False):
                ours.append(microseconds(lambda: tfl.lora_linear(x, weight, bias, lora_A, lora_B, 0.5)))
    return linear[1:], ours[1:]  # the first one compiles


def main() -> int:
    torch.set_num_threads(1)
    missed = 0
    for name, needs_gradient, most in (("no_grad", False, 5), ("grad-recording", True, 12)):
        linear, ours = measure(needs_gradient)
        ratios = [a / b for a, b in zip(ours, linear, strict=True)]
        low, middle, high = quantiles(ratios)
        missed += middle > most
        print(
            f"{name}: F.linear {min(linear):.2f} us, lora_linear {min(ours):.2f} us at best; "
            f"ratio {middle:.1f} (quartiles {low:.1f} to {high:.1f}), at most {most}"
        )
    return missed


if __name__ == "__main__":
    sys.exit(main())
