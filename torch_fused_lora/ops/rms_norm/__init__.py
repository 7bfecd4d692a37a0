"""The RMS norm: `operator.py` says what it is, `portable.py` and `differentiable.py` compute it."""

from .operator import rms_norm as rms_norm
