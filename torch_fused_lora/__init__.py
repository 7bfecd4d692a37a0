"""A LoRA layer as one PyTorch operator, and one line that puts it under any PEFT model. RMS norm and softmax, too."""

from __future__ import annotations

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
from .quantized import QuantLinear, dequantize_, quantize_
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .check import check_peft
    from .peft import patch_peft, unpatch_peft

extension.load()

__all__ = [
    "LoRALinear",
    "QuantLinear",
    "check_peft",
    "dequantize_",
    "keep_operators",
    "lora_delta",
    "lora_linear",
    "lora_linear_quantized",
    "patch_norms",
    "patch_peft",
    "quantize_",
    "quantized_linear",
    "rms_norm",
    "softmax",
    "unpatch_norms",
    "unpatch_peft",
]


def __getattr__(name: str) -> object:
    # PEFT is optional and slow to import: it is imported by whoever patches a model.
    if name in ("patch_peft", "unpatch_peft", "check_peft"):
        from . import peft  # first: it says what to install

        if name == "check_peft":
            from . import check as peft  # type: ignore[no-redef]
        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
