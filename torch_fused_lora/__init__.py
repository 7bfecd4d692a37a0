"""A LoRA layer as one PyTorch operator, and one line that puts it under any PEFT model."""

from .ops import lora_linear

__all__ = ["lora_linear"]
