"""Tiny random checkpoints, what mlx-lm makes of them, and what float64 does."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.rounding import InDouble, Rounding, rotary_

mx.set_default_device(mx.cpu)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,  # its root, by which Gemma scales, has few bits
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
_ROPE = {"rope_theta": 10_000.0}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
FAMILIES = {
    "llama": _ROPE,
    "mistral": _ROPE | {"sliding_window": None},
    "qwen2": _ROPE | {"tie_word_embeddings": True},
    "qwen3": _ROPE | {"head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"num_hidden_layers": 6, "sliding_window": 4},  # every sixth layer sees all
    "phi": _ROPE | {"partial_rotary_factor": 0.5},
    "phi3": {},
}
IDS = torch.arange(2, 11)[None]


def save(folder: Path, family: str, **options) -> None:
    """Of Transformers', with matrices that 4 bits in groups of 32 or more hold exactly, and a tokenizer."""
    options = SIZES | FAMILIES[family] | options
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for weight in model.parameters():
            codes = torch.randint(-8, 8, weight.shape)
            if weight.dim() == 2:
                codes[:, ::32], codes[:, 1::32] = -8, 7  # a group has both ends
                weight.copy_(codes * 2.0 ** torch.randint(-7, -4, (len(weight), 1)))
            else:
                weight.copy_(weight + codes / 32)
    model.save_pretrained(folder)
    config = folder / "config.json"  # published ones have the rotary options where mlx-lm looks for them
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).save_pretrained(folder)


def convert(folder: Path, family: str = "llama", sizes: dict | None = None, **options) -> Path:
    """The folder of an mlx-lm checkpoint, made by `mlx_lm.convert` from the one in ``folder / "hf"``."""
    save(folder / "hf", family, **sizes or {})
    mlx_lm.convert(str(folder / "hf"), str(folder / "mlx"), **options)
    return folder / "mlx"


def tensor(array: mx.array) -> Tensor:
    return torch.from_numpy(np.array(array))


def their_logits(model) -> Tensor:
    """mlx-lm's, of the last token."""
    return tensor(model(mx.array(IDS.numpy())))[:, -1]


@torch.no_grad()
def our_logits(model: nn.Module) -> Tensor:
    return model(IDS).logits[:, -1]


def in_double(folder: Path) -> nn.Module:
    """Transformers' model of a folder, every operation of it in float64."""
    with InDouble():
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    return model


class Within:
    """A float64 model's logits of the last token; what equals it is within what rounding in float32 can do."""

    def __init__(self, model: nn.Module) -> None:
        with Rounding() as mode:
            rotary_(mode, model)
            logits = model(IDS).logits[:, -1]
        self.logits, self.bound = logits.detach(), mode.bound(logits)

    def __eq__(self, found: object) -> bool:
        return bool(((found - self.logits).abs() <= self.bound).all())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.logits} within {self.bound}"
