"""The sweep over Transformers' architectures: a few of them, and that it sees what is wrong."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.models.sweep import __main__ as sweep
from tests.models.sweep import architectures
from torch_fused_lora import peft as tfl_peft


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A decoder, Conv1D, a subclass of nn.Linear, an encoder and decoder, and an encoder.
@pytest.mark.parametrize(
    "name",
    ["LlamaForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM"],
)
def test_an_architecture(name):
    row = sweep.compare(sweep.Row(name, ""))
    assert not row.why_not
    assert not row.problems
    assert row.fused == row.calls > 0
    assert row.float64.seen < 1e-6


@pytest.mark.parametrize(
    ("name", "kernel", "operands"),
    [("LlamaForCausalLM", "lora_linear_stacked", 5), ("FalconForCausalLM", "lora_delta_stacked", 4)],
)
def test_a_wrong_operator_is_seen(name, kernel, operands, monkeypatch):
    real = getattr(tfl_peft, kernel)

    def off(*args):
        return real(*args[:operands], args[operands] * (1 + 1e-4), *args[operands + 1 :])  # scaling

    monkeypatch.setattr(tfl_peft, kernel, off)
    row = sweep.compare(sweep.Row(name, ""))
    assert "a gradient differs" in row.problems


def test_a_call_that_is_not_fused_is_a_problem():
    same = sweep.Differences(0, 0, 0)
    assert sweep.Row("", "", calls=3, fused=2, float32=same).problems == ["1 calls not fused"]
    assert sweep.Row("", "", float32=same).problems == ["no LoRA layer was called"]


def test_what_cannot_be_built_has_a_reason():
    row = sweep.compare(sweep.Row("ReformerModelWithLMHead", ""))
    assert "is_decoder=True" in row.why_not
    assert not row.problems


def test_configurations_are_shrunk():
    config = architectures.shrunk(transformers.LlamaConfig, 16, 4)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (256, 688, 4)
    assert (config.num_attention_heads, config.head_dim, config.vocab_size) == (32, 8, 256)
    parts = architectures.shrunk(transformers.Gemma3Config, 16, 2)
    assert parts.text_config.num_hidden_layers == parts.vision_config.num_hidden_layers == 2
    assert parts.image_token_index < 256
