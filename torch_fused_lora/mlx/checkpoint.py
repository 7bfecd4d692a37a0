"""An mlx-lm checkpoint as a Transformers model: safetensors and JSON only, no pickle and no code of the checkpoint's.

The model is built without memory for its weights, its layers take the format that the shards' headers tell, and only
when every name, shape and dtype agrees is each tensor read, once, to where it stays.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..affine import SCALE_DTYPES, Packed, why_not
from ..quantized import QuantEmbedding, become_packed, guard

# Whose tensors have the same names and mean the same in mlx-lm and Transformers.
FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
_Header = tuple[Any, tuple[int, ...]]  # a tensor's dtype, torch's if it is one of these, and its shape
_DTYPES = {"U32": torch.uint32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class _WithoutWeights(TorchFunctionMode):
    """Puts on the meta device what `torch.empty` makes, which is how modules get their weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def load_mlx(folder: str | Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A Transformers causal language model from a folder that mlx-lm wrote (``mlx_lm.convert``), quantised or not.

    Quantised layers become `QuantLinear`, quantised embeddings `QuantEmbedding`, a head that is tied shares its
    embedding's words; everything keeps the dtype that it has in the file. Each tensor is read to its place: on the CPU
    at most one more is held at a time. `save_pretrained` of the model writes a folder that mlx-lm and this read again.

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
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(f"{folder}: model_type: expected one of {', '.join(FAMILIES)}, got {raw.get('model_type')!r}")
    quantization = raw.get("quantization") or {}
    for name, entry in {"quantization": quantization, **quantization}.items():
        if isinstance(entry, dict) and entry.get("mode", "affine") != "affine":
            raise ValueError(f"{folder}: {name}: mode: expected 'affine', got {entry['mode']!r}")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    vars(config).pop("quantization_config", None)  # the same once more, where Transformers looks for methods of its own
    with _WithoutWeights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    with ExitStack() as stack:
        shards = [stack.enter_context(safe_open(path, "pt")) for path in _shards(folder)]
        places = [(name, shard) for shard in shards for name in shard.keys()]  # noqa: SIM118
        headers = {name: _header(shard.get_slice(name)) for name, shard in places}
        for name, module in model.named_modules():
            if f"{name}.scales" in headers:
                _take_format(name, module, headers)
        _tie(model)
        _check(model, headers, [name for name, _ in places])
        for name, shard in places:
            path, _, leaf = name.rpartition(".")
            owner, tensor = model.get_submodule(path), shard.get_tensor(name).to(device, copy=True)
            if leaf in owner._parameters:
                tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            setattr(owner, leaf, tensor)
    _tie(model)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    guard()
    return model.to(device).eval()


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: expected names of safetensors files in its folder, got {name!r}")
    else:
        names = {path.name for path in folder.glob("model*.safetensors")}
    if not names:
        raise FileNotFoundError(f"{folder}: no model*.safetensors")
    return [folder / name for name in sorted(names)]


def _header(part: Any) -> _Header:
    return _DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())


def _take_format(name: str, module: Any, headers: dict[str, _Header]) -> None:
    """Make a layer a packed one, without memory, in the format that the shapes of its words and scales tell."""
    (_, words), (dtype, scales) = headers.get(f"{name}.weight", (None, ())), headers[f"{name}.scales"]
    takes = type(module) is nn.Linear or QuantEmbedding.takes(module)
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


def _check(model: nn.Module, headers: dict[str, _Header], names: list[str]) -> None:
    """Raise an error that names every tensor that is not as the model has it."""
    state = model.state_dict(keep_vars=True)
    own = {id(tensor): name for name, tensor in reversed(state.items())}  # of what is shared, the first
    expected = {name: state[name] for name in own.values()}
    problems = [f"{name}: missing" for name in expected.keys() - headers.keys()]
    problems += [f"{name}: left over" for name in headers.keys() - expected.keys()]
    problems += [f"{name}: in two shards" for name, count in Counter(names).items() if count > 1]
    for name in expected.keys() & headers.keys():
        tensor, (dtype, shape) = expected[name], headers[name]
        dtypes = (tensor.dtype,) if tensor.dtype is torch.uint32 else SCALE_DTYPES
        if tuple(tensor.shape) != shape or dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            problems.append(f"{name}: expected {tuple(tensor.shape)} of {wanted}, got {shape} of {dtype}")
    if problems:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(sorted(problems))}")
