"""How Metal kernels are launched: what the extension's plans choose for a shape, as ``doctor --plan`` prints it and the
bench records it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from .mps import DTYPES, core_count, extension


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """One launch of a kernel: its ``threadgroups`` of so many ``threads``; scratch: the partial sums that it writes."""

    direction: str
    kernel: str
    configuration: dict[str, int]
    threadgroups: list[int]
    threads: int
    scratch_bytes: int

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value}" for name, value in self.configuration.items()) or "nothing to choose"
        grid = " x ".join(map(str, self.threadgroups))
        scratch = f"{self.scratch_bytes} bytes of scratch" if self.scratch_bytes else "no scratch"
        return f"  {self.kernel}\n    {chosen}\n    {grid} threadgroups of {self.threads} threads, {scratch}"


def plan(
    operator: str, shape: Sequence[int], dtype: str, adapter_dtype: str | None = None, gpu_cores: int = 0
) -> list[Dispatch]:
    """The dispatches of a forward and a backward on contiguous operands, in order.

    Args:
        operator: "lora_linear" with the shape M, K, N and rank, "rms_norm" or "softmax" with M and H.
        adapter_dtype: of lora_A and lora_B; None for ``dtype``.
        gpu_cores: 0 for this GPU's.

    Raises RuntimeError where there is no extension, ValueError where a shape cannot be launched.
    """
    scalars = DTYPES.index(dtype), DTYPES.index(adapter_dtype or dtype)
    found = json.loads(extension.describe(operator, shape, *scalars, gpu_cores))
    if isinstance(found, dict):
        raise ValueError(found["error"])
    return [Dispatch(**dispatch) for dispatch in found]


def print_plan(shape: Sequence[int], rank: int, dtype: str, adapter_dtype: str | None, gpu_cores: int) -> int:
    """Print what a LoRA layer M x K x N launches; 0, or 1 with the reason where that cannot be told."""
    try:
        dispatches = plan("lora_linear", (*shape, rank), dtype, adapter_dtype, gpu_cores)
    except (RuntimeError, ValueError) as error:
        print(error)
        return 1
    cores = f"{gpu_cores or core_count() or 'unknown'} GPU cores"
    print("{} x {} x {}".format(*shape) + f", rank {rank}, {dtype} + {adapter_dtype or dtype} adapters, {cores}")
    if extension.overrides:
        print(f"as TORCH_FUSED_LORA_PLAN={extension.overrides} says")
    for direction, product in (("forward", "x W^T + b"), ("backward", "dy W")):
        found = [dispatch for dispatch in dispatches if dispatch.direction == direction]
        if not found:
            print(f"{direction}: by torch's own products")
            continue
        alone = any(dispatch.kernel.startswith(("lora_decode", "lora_gemm")) for dispatch in found)
        print(f"{direction}:" if alone else f"{direction}, after torch's own {product}:")
        print(*found, sep="\n")
    return 0
