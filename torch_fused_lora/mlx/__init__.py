"""What mlx-lm writes and reads: its adapters (`adapters.py`) and its checkpoints (`checkpoint.py`)."""

from .adapters import load_mlx_adapters as load_mlx_adapters
from .adapters import save_mlx_adapters as save_mlx_adapters
from .checkpoint import load_mlx as load_mlx
