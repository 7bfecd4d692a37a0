"""PEFT's LoRA adapters as mlx-lm's files, and back.

A folder has ``adapters.safetensors``, with A stored K x r and B r x N under the layer's name, and
``adapter_config.json``, with one rank and one scale for all layers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_TENSORS, _CONFIG = "adapters.safetensors", "adapter_config.json"


def save_mlx_adapters(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write an adapter of a `PeftModel` as mlx-lm's ``mlx_lm.generate --adapter-path`` and the like read it.

    Layers of smaller ranks are filled up with zeros, and scales that differ between layers go into B, as far as mlx-lm
    has only one of each. The layers' names are the model's own, which in mlx-lm are the same for most families.

    Args:
        model: one with LoRA on linear layers. ``adapter_name``: which; by default the active one.
        folder: made if it is not there.

    Raises:
        ValueError: what the files cannot express, by name: DoRA and other variants, biases, modules saved whole,
            several active adapters, and LoRA on embeddings, convolutions or experts.
    """
    name = adapter_name or model.active_adapter
    if not isinstance(name, str) or name not in model.peft_config:
        raise ValueError(f"adapter_name: expected one of {list(model.peft_config)}, got {name!r}")
    config: Any = model.peft_config[name]
    for option in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias"):
        if getattr(config, option, None):
            raise ValueError(f"{option}: mlx-lm's adapters have no place for it")
    if config.bias != "none":
        raise ValueError(f"bias={config.bias!r}: mlx-lm's adapters have no biases")
    layers = _layers(model, name)
    rank = max(layer.lora_A[name].weight.shape[0] for layer in layers.values())
    scales = [float(layer.scaling[name]) for layer in layers.values()]
    scale = scales[0] if len(set(scales)) == 1 else 1.0
    tensors = {}
    for (layer_name, layer), its_scale in zip(layers.items(), scales, strict=True):
        A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        B, more = B if its_scale == scale else B * (its_scale / scale), rank - A.shape[0]
        tensors[f"{layer_name}.lora_a"] = nn.functional.pad(A, (0, 0, 0, more)).t().contiguous()
        tensors[f"{layer_name}.lora_b"] = nn.functional.pad(B, (0, more)).t().contiguous()
    parameters = {"rank": rank, "scale": scale, "dropout": config.lora_dropout, "keys": list(layers)}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / _TENSORS, metadata={"format": "mlx"})
    text = json.dumps({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}, indent=4)
    (path / _CONFIG).write_text(text)


def load_mlx_adapters(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> PeftModel:
    """A `PeftModel` of ``model``, or ``model`` itself if it is one, with the adapter that mlx-lm wrote to a folder.

    Args:
        model: one whose layers have the names that they have in mlx-lm.
        folder: with adapters.safetensors and adapter_config.json. ``adapter_name``: what the adapter is called.

    Raises:
        ValueError: what PEFT's LoRA on linear layers cannot hold, by name: DoRA, whole weights, other tensors than
            lora_a and lora_b, layers that the model has not, shapes that do not fit.
    """
    path = Path(folder)
    config = json.loads((path / _CONFIG).read_text())
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ValueError(f"fine_tune_type: expected 'lora', got {kind!r}")
    parameters, tensors = config["lora_parameters"], load_file(path / _TENSORS)
    rank, scale = parameters["rank"], parameters["scale"]
    if unknown := [name for name in tensors if name.rpartition(".")[2] not in ("lora_a", "lora_b")]:
        raise ValueError(f"{unknown[0]}: expected tensors called lora_a and lora_b only")
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    inside = dict((model.get_base_model() if isinstance(model, PeftModel) else model).named_modules())
    for name in names:
        _check(name, inside.get(name), tensors, rank)
    ours = LoraConfig(
        r=rank, lora_alpha=scale * rank, lora_dropout=parameters.get("dropout", 0.0), target_modules=list(names)
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, ours)
    else:
        model = get_peft_model(model, ours, adapter_name)
    with torch.no_grad():
        for name, layer in _layers(model, adapter_name).items():
            layer.lora_A[adapter_name].weight.copy_(tensors[f"{name}.lora_a"].t())
            layer.lora_B[adapter_name].weight.copy_(tensors[f"{name}.lora_b"].t())
    return model


def _check(name: str, module: Any, tensors: dict[str, Tensor], rank: int) -> None:
    """Raise ValueError unless an adapter's tensors are those of this module, a linear layer."""
    base = getattr(module, "base_layer", module)
    if not isinstance(base, nn.Linear):
        got = "no such module" if base is None else f"a {type(base).__name__}"
        raise ValueError(f"{name}: expected an nn.Linear of the model, got {got}")
    for part, shape in (("lora_a", (base.in_features, rank)), ("lora_b", (rank, base.out_features))):
        found = tensors.get(f"{name}.{part}")
        if found is None or found.shape != shape:
            got = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise ValueError(f"{name}.{part}: expected shape {shape}, got {got}")


def _layers(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """The layers that an adapter is on, by their names without PEFT."""
    layers: dict[str, Any] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter_name in (*module.lora_A, *module.lora_embedding_A):
            A = dict(module.lora_A).get(adapter_name)
            if adapter_name in module.lora_variant or not isinstance(A, nn.Linear):
                what = module.lora_variant.get(adapter_name, module.get_base_layer())
                raise ValueError(f"{name}: mlx-lm's adapters cannot express LoRA by or on a {type(what).__name__}")
            layers[name] = module
    return layers
