"""A linear layer over packed words, with an adapter or without: `operator.py` says what it is."""

from .operator import lora_linear_quantized as lora_linear_quantized
from .operator import quantized_linear as quantized_linear
