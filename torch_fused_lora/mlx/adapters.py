"""PEFT's adapters as mlx-lm's and back: ``adapters.safetensors``, with ``adapter_config.json`` beside it.

A layer's adapter is ``lora_a`` (K, r) and ``lora_b`` (r, N) there, the transposes of PEFT's, and all layers share one
rank, one scale and one dropout. Smaller ranks are padded with zeros, which stay zero in training, and are cut again
when they are read; where scalings differ, they are multiplied into lora_b, and the scale is 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from ..affine import SCALE_DTYPES
from ..report import pattern
from .stored import Stored, header, read_object

_PREFIX = "base_model.model."  # a PeftModel's, before the names in its base


def save_mlx_adapters(model: PeftModel, folder: str | Path, adapter_name: str | None = None) -> None:
    """Write a LoRA adapter for mlx-lm: for its ``load_adapters``, ``mlx_lm.generate --adapter-path``, ``mlx_lm.fuse``.

    Args:
        model: over a base whose modules are named as mlx-lm names them: Transformers' causal language models are.
        folder: made if it is missing. Not one of `save_pretrained`: both write an ``adapter_config.json``.
        adapter_name: the active one by default.

    Raises:
        TypeError: ``model`` is not a PeftModel.
        ValueError: no such LoRA adapter, a folder of PEFT's, or an adapter that mlx-lm cannot express: variants such as
            DoRA, biases, adapted embeddings, convolutions or parameters, heads that share the embedding's weight, and
            whatever else was trained. All of it is named, and nothing is written.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model: expected a peft.PeftModel, got {type(model).__name__}")
    name = adapter_name or " and ".join(model.active_adapters)
    if not isinstance(model.peft_config.get(name), LoraConfig):
        raise ValueError(f"adapter_name: expected a LoRA adapter among {list(model.peft_config)}, got {name!r}")
    folder = Path(folder)
    config_file = folder / "adapter_config.json"
    if config_file.exists() and "peft_type" in read_object(config_file):
        raise ValueError(f"folder: {folder} holds an adapter of PEFT's, whose adapter_config.json this would replace")

    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    base = model.get_base_model()
    modules = dict(base.named_modules())
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    layers = {path: m for path, m in modules.items() if isinstance(m, LoraLayer) and name in m.lora_A}
    refused = {path: reason for path, layer in layers.items() if (reason := _why_not(layer, name, embedding))}
    factors = {path: [state.pop(f"{_PREFIX}{path}.lora_{side}.weight").float() for side in "AB"] for path in layers}
    refused |= {key.removeprefix(_PREFIX): "a tensor that its adapters do not have" for key in state}
    if model.peft_config[name].layer_replication:
        refused["layer_replication"] = "layers that its model does not have"
    _refuse("mlx-lm cannot express the adapter", refused)

    scalings = {path: float(layers[path].scaling[name]) for path in factors}
    common = set(scalings.values()).pop() if len(set(scalings.values())) == 1 else None
    rank = max(A.shape[0] for A, _ in factors.values())
    tensors = {}
    for path, (A, B) in factors.items():
        missing = rank - A.shape[0]
        tensors[f"{path}.lora_a"] = pad(A.t(), (0, missing)).contiguous()
        lora_b = B.t() if common is not None else B.t() * scalings[path]
        tensors[f"{path}.lora_b"] = pad(lora_b, (0, 0, 0, missing)).contiguous()
    num_layers, keys = _keys(list(factors), modules)
    dropout = model.peft_config[name].lora_dropout
    parameters = {"rank": rank, "scale": 1.0 if common is None else common, "dropout": dropout, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    config_file.write_text(json.dumps(config, indent=4), encoding="utf-8")


def _why_not(layer: Any, name: str, embedding: nn.Module | None) -> str | None:
    """Why mlx-lm has no adapter like that of a layer, or None."""
    if name in layer.lora_variant:
        return type(layer.lora_variant[name]).__name__
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper) or not hasattr(base, "in_features"):
        return f"LoRA over a {type(base).__name__}"
    if embedding is not None and base.weight is getattr(embedding, "weight", None):
        return "LoRA over a head that shares the embedding's weight"
    return None


def _refuse(what: str, reasons: dict[str, str]) -> None:
    if reasons:
        lines = dict.fromkeys(f"{pattern(path)}: {reason}" for path, reason in reasons.items())
        raise ValueError(f"{what}: {'; '.join(lines)}")


def _keys(paths: list[str], modules: Iterable[str]) -> tuple[int, list[str]]:
    """How mlx-lm is told which modules have adapters: how many of the last layers do and the names within a layer, as
    is usual there, if all of these layers have the same; else the names in the model, which go for all layers."""
    layers = {int(match[1]) for path in modules if (match := re.match(r"model\.layers\.(\d+)", path))}
    inside = [match for path in paths if (match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path))]
    numbers, within = {int(match[1]) for match in inside}, {match[2] for match in inside}
    if numbers == set(sorted(layers)[-len(numbers) :]) and len(numbers) * len(within) == len(inside) == len(paths):
        return len(numbers), sorted(within)
    return len(layers), sorted(paths)


def load_mlx_adapters(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Read a LoRA adapter that mlx-lm trained, or `save_mlx_adapters` wrote, as an adapter of PEFT's.

    Args:
        model: a Transformers causal language model, which gets its adapter in place as by `peft.get_peft_model`; or a
            PeftModel over one, which gets a further adapter.
        folder: holds ``adapters.safetensors`` and ``adapter_config.json``, as mlx-lm's ``--adapter-path`` does.

    Returns:
        The PeftModel. What mlx-lm computes as ``scale`` is ``lora_alpha / r`` there.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: another configuration than mlx-lm's, full fine-tuning or DoRA, a scale or a dropout that is none,
            and tensors that are no adapter of a linear layer of the model or do not fit it: each is named, and the
            model is left as it was.
    """
    folder = Path(folder)
    scale, dropout = _scale_and_dropout(folder / "adapter_config.json")
    if not isinstance(model, PeftModel) and not hasattr(model, "prepare_inputs_for_generation"):
        raise TypeError(
            f"model: expected a Transformers causal language model, or a PeftModel over one, got {type(model).__name__}"
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    stored = header(folder / "adapters.safetensors")
    modules = dict(base.named_modules())
    paths = [name.removesuffix(".lora_a") for name in stored if name.endswith(".lora_a")]
    fitting = {name for path in paths for name in _fitting(path, modules.get(path), stored)}
    odd = {name: f"{tensor.dtype} of shape {tensor.shape}" for name, tensor in stored.items() if name not in fitting}
    _refuse(f"{folder}: no adapter of a linear layer of the model", odd if paths else {"*": "no lora_a"})
    factors = {path: _factors(*(stored[f"{path}.lora_{side}"].read() for side in "ab")) for path in paths}

    ranks = {path: A.shape[0] for path, (A, _) in factors.items()}
    r = max(ranks.values())
    smaller = {path: rank for path, rank in ranks.items() if rank < r}
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=paths,
        r=r,
        lora_alpha=scale * r,
        lora_dropout=dropout,
        rank_pattern=smaller,
        alpha_pattern={path: scale * rank for path, rank in smaller.items()},
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, peft_config)
    else:
        model = get_peft_model(model, peft_config, adapter_name)
    state: dict[str, Tensor] = {}
    for path, (A, B) in factors.items():
        state |= {f"{_PREFIX}{path}.lora_A.weight": A, f"{_PREFIX}{path}.lora_B.weight": B}
    set_peft_model_state_dict(model, state, adapter_name)
    return model


def _scale_and_dropout(path: Path) -> tuple[float, float]:
    """What a configuration of mlx-lm's says of its adapter."""
    config = read_object(path)
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise ValueError(f"{path}: fine_tune_type: expected 'lora', got {kind!r}")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: lora_parameters: expected an object, as mlx-lm writes it, got {parameters!r}")
    scale: Any = parameters.get("scale")
    dropout = parameters.get("dropout", 0.0)
    if type(scale) not in (int, float) or not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{path}: scale: expected a finite number, got {scale!r}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: dropout: expected a probability in [0, 1), got {dropout!r}")
    return scale, dropout


def _fitting(path: str, layer: Any, stored: dict[str, Stored]) -> list[str]:
    """The names of a layer's two factors, if they are an adapter of it."""
    names = [f"{path}.lora_a", f"{path}.lora_b"]
    found = [stored[name] for name in names if name in stored]
    rank = found[0].shape[-1] if found[0].shape else 0
    shapes = [(getattr(layer, "in_features", None), rank), (rank, getattr(layer, "out_features", None))]
    fit = rank and [tensor.shape for tensor in found] == shapes and all(t.dtype in SCALE_DTYPES for t in found)
    return names if fit else []


def _factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B, without the last ranks that are zero in both, whose gradients are zero forever."""
    used = (a != 0).any(0) | (b != 0).any(1)
    rank = max([1, *(used.nonzero().flatten() + 1).tolist()])
    return a.t()[:rank].contiguous(), b.t()[:, :rank].contiguous()
