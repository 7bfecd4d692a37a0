"""An mlx-lm checkpoint as a Transformers model: safetensors and JSON only, no pickle and no code of the checkpoint's.

The model is built without memory for its weights, its layers take the format that the shards' headers tell, and only
when every name, shape and dtype agrees is each tensor read, once, to where it stays.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..affine import SCALE_DTYPES, Packed, why_not
from ..quantized import QuantEmbedding, become_packed
from .stored import Stored, header, read_object

# Whose tensors have the same names and mean the same in mlx-lm and Transformers.
FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
_FACTORIES = (torch.empty, torch.ones, torch.zeros)


class _WithoutWeights(TorchFunctionMode):
    """Puts on the meta device what these make, which is how modules get their weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func in _FACTORIES else {}))


def load_mlx(folder: str | Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A Transformers causal language model from a folder that mlx-lm wrote (``mlx_lm.convert``), quantised or not.

    Quantised layers become `QuantLinear`, quantised embeddings `QuantEmbedding`, a head that is tied shares its
    embedding's words; everything keeps the dtype that it has in the file. At most one tensor more than the model
    has is held at a time. `save_pretrained` of the model writes a folder that mlx-lm and this read again.

    Args:
        folder: holds config.json and safetensors, in shards or not.
        device: where to load to.

    Raises:
        FileNotFoundError: config.json or the safetensors are not there.
        ValueError: another family than `FAMILIES`, a quantisation that is not affine in 4 or 8 bits, a shard that is
            not in the folder, and tensors that are missing, left over or do not fit: they are named, and nothing of the
            shards but their headers was read.
    """
    folder = Path(folder)
    raw = read_object(folder / "config.json")
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(f"{folder}: model_type: expected one of {', '.join(FAMILIES)}, got {raw.get('model_type')!r}")
    quantization = raw.get("quantization") or {}
    if not isinstance(quantization, dict):
        raise ValueError(f"{folder}: quantization: expected an object, got {quantization!r}")
    for name, entry in {"quantization": quantization, **quantization}.items():
        if isinstance(entry, dict) and entry.get("mode", "affine") != "affine":
            raise ValueError(f"{folder}: {name}: mode: expected 'affine', got {entry['mode']!r}")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    vars(config).pop("quantization_config", None)  # the same once more, where Transformers looks for methods of its own
    config._attn_implementation = None  # a checkpoint may name one of the hub's kernels, which is code
    with _WithoutWeights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    shards = [header(path) for path in _shards(folder)]
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    for name, module in model.named_modules():
        if f"{name}.scales" in stored:
            _take_format(name, module, stored)
    _tie(model)
    _check(model, stored, Counter(name for shard in shards for name in shard))
    places = _places(model)
    for name, own in model.state_dict(keep_vars=True).items():
        if name in stored:
            value = stored[name].read().to(device)
            if isinstance(own, nn.Parameter):
                value = nn.Parameter(value, requires_grad=value.is_floating_point())
            for held, leaf in places[id(own)]:
                held[leaf] = value
    for module in model.modules():  # what no checkpoint has, such as rotary frequencies, was made on the CPU
        module._buffers.update({leaf: b.to(device) for leaf, b in module._buffers.items() if b is not None})
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index}: weight_map: expected an object, got {places!r}")
        names = set(map(str, places.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: expected names of safetensors files in its folder, got {name!r}")
    else:
        names = {path.name for path in folder.glob("model*.safetensors")}
    if not names:
        raise FileNotFoundError(f"{folder}: no model*.safetensors")
    return [folder / name for name in sorted(names)]


def _take_format(name: str, module: Any, stored: dict[str, Stored]) -> None:
    """Make a layer a packed one, without memory, in the format that the shapes of its words and scales tell."""
    words, scales = (stored[part].shape if part in stored else () for part in (f"{name}.weight", f"{name}.scales"))
    dtype, takes = stored[f"{name}.scales"].dtype, type(module) is nn.Linear or QuantEmbedding.takes(module)
    if not takes or dtype not in SCALE_DTYPES or len(words) != 2 or len(scales) != 2:
        return  # the scales are left over
    N, K = module.weight.shape
    bits, group_size = words[1] * 32 // K, K // max(scales[1], 1)
    if (unsupported := why_not(bits, group_size)) is not None:
        what, value, expected = unsupported
        raise ValueError(f"{name}: {what}: expected {expected}, got {value}, of words {words} and scales {scales}")
    with torch.device("meta"):
        held = torch.empty(N, K * bits // 32, dtype=torch.uint32)
        scale, bias = (torch.empty(N, K // group_size, dtype=dtype) for _ in range(2))
    become_packed(module, Packed(held, scale, bias, bits, group_size), dtype)


def _tie(model: Any) -> None:
    """Let a tied head share the embedding's weight, in whatever format this is."""
    embedding = model.get_input_embeddings()
    if model.config.tie_word_embeddings and isinstance(embedding, QuantEmbedding):
        become_packed(model.get_output_embeddings(), embedding.packed, embedding._dtype)
    else:
        model.tie_weights()


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Where each tensor is held, by its id: shared ones in several places."""
    places = defaultdict(list)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                places[id(tensor)].append((held, leaf))
    return places


def _check(model: nn.Module, stored: dict[str, Stored], counts: Counter[str]) -> None:
    """Raise an error that names every tensor that is not as the model has it."""
    state = model.state_dict(keep_vars=True)
    own = {id(tensor): name for name, tensor in reversed(state.items())}  # of what is shared, the first
    expected = {name: state[name] for name in own.values()}
    problems = [f"{name}: missing" for name in expected.keys() - stored.keys()]
    problems += [f"{name}: left over" for name in stored.keys() - expected.keys()]
    problems += [f"{name}: in two shards" for name, count in counts.items() if count > 1]
    for name in expected.keys() & stored.keys():
        tensor, (dtype, shape, *_) = expected[name], stored[name]
        dtypes = (torch.uint32,) if tensor.dtype is torch.uint32 else SCALE_DTYPES
        if name.endswith(".biases") and (beside := stored.get(f"{name.removesuffix('.biases')}.scales")):
            dtypes = (beside.dtype,) if beside.dtype in SCALE_DTYPES else dtypes
        if tuple(tensor.shape) != shape or dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            problems.append(f"{name}: expected {tuple(tensor.shape)} of {wanted}, got {shape} of {dtype}")
    if problems:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(sorted(problems))}")
