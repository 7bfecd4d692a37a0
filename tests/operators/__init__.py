"""The operators: numbers, derivatives, transformations, devices and errors."""

from __future__ import annotations

FAMILY_WORDS = ("lora", "decode", "delta", "gemm", "grad", "sum", "splits")


def families(dispatches: dict[str, int]) -> dict[str, int]:
    """Dispatches by kernel family: lora_decode_float_float_4 is a lora_decode."""
    found: dict[str, int] = {}
    for name, count in dispatches.items():
        family = "_".join(word for word in name.split("_") if word in FAMILY_WORDS)
        found[family] = found.get(family, 0) + count
    return found
