"""Dropout that is remembered as a seed: `operator.py` says which elements it keeps, `triton.py` draws them on a GPU."""

from .operator import as_seed as as_seed
from .operator import draw_seed as draw_seed
from .operator import keep_mask as keep_mask
