"""The plain lines that doctor holds the operators to, against torch's own and the tests' own reference."""

from __future__ import annotations

import torch

from tests.reference import Delta, Layer
from torch_fused_lora.ops.lora_linear.reference import lora_linear
from torch_fused_lora.ops.rms_norm.reference import rms_norm
from torch_fused_lora.ops.softmax.reference import softmax


def test_references():
    x, W, b, A, B = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 8), (5, 8), (5,), (2, 8), (5, 2)))
    mask = (torch.rand(6, 8) < 0.5).double() * 2
    torch.testing.assert_close(lora_linear(x, W, b, A, B, 0.3), Layer(x, W, b, A, B, 0.3).output().value)
    layer = Layer(x, W, None, A, B, 0.3, [(slice(None), mask)])
    torch.testing.assert_close(lora_linear(x, W, None, A, B, 0.3, mask.view(2, 3, 8)), layer.output().value)
    y, term = torch.randn(2, 3, 5, dtype=torch.float64), Layer(x, 0 * W, None, A, B, 0.3)
    torch.testing.assert_close(Delta(y, x, A, B, 0.3).output().value, y + term.output().value)
    for name, exact in Delta(y, x, A, B, 0.3).gradients(y).items():
        torch.testing.assert_close(exact.value, term.gradients(y)[name].value)
    torch.testing.assert_close(rms_norm(x, W[0], 1e-3), torch.nn.functional.rms_norm(x, (8,), W[0], 1e-3))
    torch.testing.assert_close(rms_norm(x, None, 1e-3), torch.nn.functional.rms_norm(x, (8,), None, 1e-3))
    torch.testing.assert_close(softmax(100 * x), torch.softmax(100 * x, -1))
