"""The LoRA layer: `operator.py` says what it is; `portable.py`, `triton.py` and `differentiable.py` compute it."""

from .operator import lora_linear as lora_linear
