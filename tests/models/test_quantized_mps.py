"""A quantised model under a patched PEFT on device mps: it trains as on the CPU, and generates, through our kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import torch_fused_lora as tfl
from tests.emulator import mps_on_linux
from tests.models.test_mps_peft import CONFIG, LAYERS, TOKENS, counted, train
from torch_fused_lora.mps import extension


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def quantised(bits: int) -> nn.Module:
    model = llama()
    report = tfl.quantize_(model, bits=bits, group_size=32)
    assert len(report.errors) == LAYERS
    return get_peft_model(model, CONFIG)


def patched(model: nn.Module, device: torch.device) -> nn.Module:
    model = copy.deepcopy(model).to(device)
    report = tfl.patch_peft(model)
    assert (len(report.patched), report.declined) == (LAYERS, {})
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_losses_of_twenty_steps(mps, bits):
    """Those of stock PEFT over the dequantised model, in float64, to rounding, as in test_mps_peft.py."""
    model = quantised(bits)
    whole = copy.deepcopy(model)
    tfl.dequantize_(whole)
    exact = train(whole.double(), 20)
    on_cpu, ours = train(copy.deepcopy(model), 20), train(patched(model, mps), 20)
    rounding = max(float((on_cpu - exact).abs().max()), float(exact.max()) * torch.finfo(torch.float32).eps)
    assert exact[0] - exact[-1] > 100 * rounding
    torch.testing.assert_close(ours, exact, rtol=0, atol=3 * rounding)
    torch.testing.assert_close(ours, on_cpu, rtol=0, atol=4 * rounding)


@counted
def test_a_step_takes_nothing_of_the_weight_s_size(mps):
    """No projection is a product of torch's: two forward passes, and a backward that the first q, k and v end."""
    model = patched(quantised(4), mps)
    train(model, 1)
    mps_on_linux.reset_counters()
    train(model, 1)
    seen = mps_on_linux.counters()
    assert sum(count for name, count in seen.dispatches.items() if name.startswith("lora_gemm")) == 3 * LAYERS - 3
    # Attention's products and the head's, which is not quantised: two forward passes and a backward.
    assert seen.fallbacks.get("aten::linear", 0) == 2


@counted
def test_generating(mps):
    """A token is as many dispatches as there are projections, by kernels that the first one compiled."""
    model = patched(quantised(4), mps).eval()
    tokens = TOKENS[:1, :2].to(mps)
    generate = lambda count: model.generate(  # noqa: E731
        input_ids=tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    generate(2)
    compiled = extension.library.tfl_compiled_kernels()
    mps_on_linux.reset_counters()
    found = generate(20)
    assert found.shape == (1, 22)
    decoded = {name: n for name, n in mps_on_linux.counters().dispatches.items() if name.startswith("lora_")}
    assert sum(decoded.values()) == 20 * LAYERS
    assert all(name.startswith("lora_decode") for name in decoded)
    assert extension.library.tfl_compiled_kernels() == compiled
