from __future__ import annotations

import pytest
import torch

from torch_fused_lora.ops.lora_linear import ways


@pytest.fixture
def small_blocks(monkeypatch) -> tuple[int, int, int, int]:
    """Rows, K, N and r of a layer with many blocks of rows (of the portable kernels), or tiles (of Metal's, 32 rows or
    96 each), and a part of one more."""
    monkeypatch.setitem(ways.TABLE, "cpu", ways.Limits(block=4096))
    assert ways.block_rows(torch.empty(5, 130), torch.empty(70, 5)) == 31
    return 265, 130, 70, 5
