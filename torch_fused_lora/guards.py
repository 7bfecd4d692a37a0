"""What PEFT and Transformers would do to packed words as to a float weight is refused before anything is done, with a
name and what to do instead: their methods are wrapped when a process makes its first packed layer."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from .quantized import PackedWeight

# What of a LoraConfig reads the base's weight, if it is set; and the starts that do not, not even its dtype.
_READ_WEIGHT = ("use_dora", "use_qalora", "use_bdlora", "velora_config", "kasa_config", "target_parameters")
_INDEPENDENT_STARTS = (True, False, "gaussian", "eva")
_REMEDY = "call torch_fused_lora.dequantize_(model) first"


def guard() -> None:
    """From now on PEFT refuses to merge into a packed base, and to adapt a model that has one in a way that reads or
    changes base weights; and Transformers to resize packed embeddings and heads."""
    _guard_peft()
    if transformers := sys.modules.get("transformers.modeling_utils"):  # or there is no model of theirs yet
        _wrap(transformers.PreTrainedModel, "resize_token_embeddings", _check_resize)


@functools.cache
def _guard_peft() -> None:
    if importlib.util.find_spec("peft"):
        from peft.tuners import lora
        from peft.tuners.tuners_utils import BaseTuner

        _wrap(BaseTuner, "_check_merge_allowed", _check_merge)
        _wrap(BaseTuner, "_check_new_adapter_config", _check_config)
        for layer in (lora.Linear, lora.Embedding):
            _wrap(layer, "merge", _check_layer)


def _wrap(cls: type, name: str, check: Callable[..., None]) -> None:
    stock = getattr(cls, name)
    if hasattr(stock, "_checks_packed"):
        return

    @functools.wraps(stock)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self, *args, **kwargs)
        return stock(self, *args, **kwargs)

    checked._checks_packed = True  # type: ignore[attr-defined]
    setattr(cls, name, checked)


def _check_merge(tuner: Any) -> None:
    for name, module in tuner.model.named_modules():
        if hasattr(module, "get_base_layer"):
            _check_base(name, module)


def _check_layer(layer: Any, *_: Any, **__: Any) -> None:
    _check_base(f"{type(layer).__name__} over {layer.get_base_layer()}", layer)


def _check_base(name: str, layer: Any) -> None:
    if isinstance(layer.get_base_layer(), PackedWeight):
        raise ValueError(f"{name}: its base holds packed words, which no adapter can be merged into: {_REMEDY}")


def _check_config(tuner: Any, config: Any) -> None:
    if not any(isinstance(module, PackedWeight) for module in tuner.model.modules()):
        return
    start = getattr(config, "init_lora_weights", True)
    reads = [name for name in _READ_WEIGHT if getattr(config, name, None)]
    reads += [] if start in _INDEPENDENT_STARTS else [f"init_lora_weights={start!r}"]
    if reads:
        raise ValueError(
            f"{' and '.join(reads)}: cannot read a base's weight that is packed words, as a QuantLinear's is: {_REMEDY}"
        )


def _check_resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> None:
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = [getattr(table, "base_layer", table) for table in tables]  # PEFT's is beneath its layer
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and any(module is table for table in tables):
            rows = module.weight.shape[0]
            if new_num_tokens not in (None, rows) or rows % (pad_to_multiple_of or 1):
                raise ValueError(f"{name}: holds packed words, which cannot be resized: {_REMEDY}")
