"""The low-rank term of a LoRA layer, added to an output that somebody else computed."""

from .operator import lora_delta as lora_delta
