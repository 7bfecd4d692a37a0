"""The operators, a file each: schema, shape function, autograd and the portable implementation."""

from .lora_linear import lora_linear

__all__ = ["lora_linear"]
