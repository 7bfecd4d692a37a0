"""Any language model of Transformers, small, with random weights and LoRA on its linear layers."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

# Configurations. A rule is a pattern of a field's name and what becomes of its numbers; the first that fits counts.

VOCABULARY = 256
PARAMETERS = 150_000_000  # at most


def rules(factor: int, layers: int) -> list[tuple[str, Any]]:
    return [
        ("vocab", lambda n: min(n, VOCABULARY)),
        ("(_id|_index|_token)$", lambda n: n if n < VOCABULARY else VOCABULARY - 1 - n % 50),
        ("shared_layers$", lambda n: 0),
        ("layers?$|depth|^layer_|dense_replace$", lambda n: min(n, layers)),
        ("group", lambda n: 1 if n > 1 else n),
        ("per_tok|top_?k|moe_k$", lambda n: min(n, 2)),
        ("expert(?!.*(size|dim|capacity))", lambda n: min(n, 4)),
        ("window|(chunk|block)_size$", lambda n: min(n, 32)),
        ("head(s|s_per_layer)?$|position|max_|n_ctx|patch|image_size|kernel|chunk|block|rate$|seq|length", int),
        ("pattern|tokens|types", int),
        ("", lambda n: n if n <= 32 else max(8, n // factor if n % factor == 0 else n // factor // 8 * 8)),
    ]


FILL = {  # for defaults of which no model can be built
    "decoder_start_token_id": 0,
    "default_language": "en_XX",
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "vocab_size": VOCABULARY,
}


def shrink(name: str, value: Any, factor: int, layers: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(shrink(name, item, factor, layers) for item in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return next(rule for pattern, rule in rules(factor, layers) if re.search(pattern, name))(value)


def shrunk(kind: Any, factor: int, layers: int) -> Any:
    """A configuration whose widths are divided by a factor, with few layers, experts and words. What is computed from
    other fields is computed anew."""
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.init and f.default is not dataclasses.MISSING}
    fields = {name: shrink(name, value, factor, layers) for name, value in fields.items()}
    if names := getattr(kind, "sub_configs", None):
        default = kind()
        parts = {name: getattr(default, name, None) for name in names}
        fields |= {name: shrunk(type(part), factor, layers) for name, part in parts.items() if part is not None}
    config = kind(**fields)
    known = config.__dict__  # not getattr: some fields differ from layer to layer
    fill = dict(FILL)
    if (heads := known.get("num_attention_heads")) and (width := known.get("hidden_size")):
        fill |= {"num_key_value_heads": heads, "head_dim": width // heads}
    for name, value in fill.items():
        if known.get(name) is None and (name in fields or name == "decoder_start_token_id"):
            setattr(config, name, value)
    return config


MAMBA = ["out_proj", "conv1d"]  # on which PEFT wants no LoRA there


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], int]:
    """A model of a class with LoRA on its linear layers, a batch it takes, and how many parameters it had; of the
    smallest configuration that works."""
    kind = getattr(transformers, name)
    reasons = ["nothing was tried"]
    ways = [(4, None, None), (8, None, None), (99, None, None), (4, "eager", None), (4, None, MAMBA)]
    for (layers, attention, without), factor in itertools.product(ways, (16, 8, 4, 2)):
        try:
            config = shrunk(kind.config_class, factor, layers)
            config._attn_implementation, config.use_cache = attention, False
            with torch.device("meta"):
                parameters = sum(p.numel() for p in kind(config).parameters())
            if parameters > PARAMETERS:
                continue
            torch.manual_seed(0)
            model = kind(config).eval()
            batch = batch_for(model)
            options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
            model = get_peft_model(model, LoraConfig(**options, exclude_modules=without))
            if not math.isfinite(step(model, batch)["loss"]):
                raise ValueError("the loss is not finite")
            return model, batch, parameters
        except Exception as error:  # whatever a configuration, a model or a batch that fits none does
            reasons.append(f"{type(error).__name__}: {error}")
    raise ValueError(reasons[-1])


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    """Tokens, with labels if the model takes them for these tokens."""
    takes = inspect.signature(model.forward).parameters
    words = getattr(model.get_input_embeddings(), "num_embeddings", VOCABULARY)
    ids = torch.randint(words // 4, words // 2, (4, 16))  # the special ones are at either end
    tokens = {"input_ids" if "input_ids" in takes else "inputs": ids}
    batch = tokens | ({"attention_mask": torch.ones_like(ids)} if "attention_mask" in takes else {})
    if "labels" in takes:
        try:
            model(**batch, labels=ids)
            return batch | {"labels": ids}
        except (IndexError, RuntimeError, ValueError):  # other tokens than labels
            pass
    return batch


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradient of every trainable parameter, by name."""
    torch.manual_seed(0)
    model.zero_grad()
    out = model(**batch)[0]
    loss = out if out.ndim == 0 else out.sin().mean()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def in_float64(model: nn.Module) -> nn.Module:
    """The model itself, converted; torch's product for all experts at once has no float64."""
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
            config._experts_implementation = "eager"
    return model.double()
