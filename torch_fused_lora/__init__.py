"""A LoRA layer as one PyTorch operator, and one line that puts it under any PEFT model. RMS norm and softmax, too."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .mps import extension
from .nn import LoRALinear
from .norms import patch_norms, unpatch_norms
from .ops.dispatch import keep_operators
from .ops.lora_delta import lora_delta
from .ops.lora_linear import lora_linear
from .ops.lora_linear_quantized import lora_linear_quantized, quantized_linear
from .ops.rms_norm import rms_norm
from .ops.softmax import softmax
from .quantized import QuantEmbedding, QuantLinear, dequantize_, quantize_
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .check import check_peft
    from .mlx import load_mlx, load_mlx_adapters, save_mlx_adapters
    from .peft import patch_peft, unpatch_peft

extension.load()

__all__ = [
    "LoRALinear",
    "QuantEmbedding",
    "QuantLinear",
    "check_peft",
    "dequantize_",
    "keep_operators",
    "load_mlx",
    "load_mlx_adapters",
    "lora_delta",
    "lora_linear",
    "lora_linear_quantized",
    "patch_norms",
    "patch_peft",
    "quantize_",
    "quantized_linear",
    "rms_norm",
    "save_mlx_adapters",
    "softmax",
    "unpatch_norms",
    "unpatch_peft",
]


# PEFT is optional and slow to import: it is imported by whoever patches a model.
_WITH_PEFT = {
    "check_peft": "check",
    "load_mlx": "mlx",
    "load_mlx_adapters": "mlx",
    "patch_peft": "peft",
    "save_mlx_adapters": "mlx",
    "unpatch_peft": "peft",
}


def __getattr__(name: str) -> object:
    if name in _WITH_PEFT:
        importlib.import_module(".peft", __name__)  # first: it says what to install
        return getattr(importlib.import_module(f".{_WITH_PEFT[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
