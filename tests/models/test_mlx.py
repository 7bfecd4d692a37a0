"""mlx-lm's checkpoints and adapters: what it writes is read here, what is written here it reads, to the same logits."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import pytest
import torch
import transformers
from mlx_lm.utils import load_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import torch_fused_lora as tfl
from tests.rounding import InDouble, Rounding, rotary_

mx.set_default_device(mx.cpu)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,  # its root, by which Gemma scales, is a bfloat16
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
FAMILIES = {
    "llama": {"rope_theta": 10_000.0},
    "mistral": {"sliding_window": None, "rope_theta": 10_000.0},
    "qwen2": {"rope_theta": 10_000.0, "tie_word_embeddings": True},
    "qwen3": {"rope_theta": 10_000.0, "head_dim": 16},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"num_hidden_layers": 6, "sliding_window": 4},  # every sixth layer sees all
    "phi": {"partial_rotary_factor": 0.5, "rope_theta": 10_000.0},
    "phi3": {},
}
IDS = torch.arange(2, 11)[None]


def save(folder, family: str, **options) -> None:
    """A tiny random checkpoint of Transformers', whose matrices 4 bits hold exactly, and a tokenizer."""
    options = SIZES | FAMILIES[family] | options
    config = transformers.AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            codes = torch.randint(-8, 8, weight.shape)
            if weight.dim() > 1:
                codes[:, ::32], codes[:, 1::32] = -8, 7  # both ends of each group
                weight.copy_(codes * 2.0 ** torch.randint(-7, -4, (len(weight), 1)))
            else:
                weight.copy_(weight + codes / 32)
    model.save_pretrained(folder)
    # As published checkpoints have them, where mlx-lm looks for them.
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).save_pretrained(folder)


def converted(folder, family: str, **options) -> None:
    save(folder / "hf", family)
    mlx_lm.convert(str(folder / "hf"), str(folder / "mlx"), **options)


def their_logits(model) -> Tensor:
    return torch.from_numpy(__import__("numpy").array(model(mx.array(IDS.numpy()))))


def reference(model) -> tuple[Tensor, Tensor]:
    """A float64 model's logits of the last token, and how far rounding in float32 can move them."""
    with Rounding() as mode:
        rotary_(mode, model)
        logits = model(IDS).logits[:, -1]
    return logits.detach(), mode.bound(logits)


def in_double(folder):
    with InDouble():
        config = transformers.AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    return model


@pytest.mark.parametrize("quantize", [False, True], ids=["float32", "4 bits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_mlx_lm_s(family, quantize, tmp_path):
    converted(tmp_path, family, quantize=quantize)
    theirs = their_logits(load_model(tmp_path / "mlx")[0])[:, -1]
    with torch.no_grad():
        ours = tfl.load_mlx(tmp_path / "mlx")(IDS).logits[:, -1]
    exact, bound = reference(in_double(tmp_path / "hf"))
    print(((ours - exact).abs() / bound).max(), ((theirs - exact).abs() / bound).max(), (bound/exact.abs().max()).max())
    assert ((ours - exact).abs() <= bound).all()
    assert ((theirs - exact).abs() <= bound).all()
