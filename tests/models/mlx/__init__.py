"""mlx-lm's checkpoints and adapters, against mlx-lm itself."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm wants Python 3.11")
