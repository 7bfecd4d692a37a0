"""What patching did to a model, and what became of the calls since, as readable tables."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from typing import Any

from torch import nn

from . import linear4bit
from .torch_private import has_compiled


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What became of each module that a patch looked at; ``print(report)`` shows it as a table.

    ``kind`` and ``owner`` are the table's words: the modules, and whose code computes what was declined.
    """

    patched: list[str]
    declined: dict[str, str]
    kind: str
    owner: str

    def __str__(self) -> str:
        if not self.patched and not self.declined:
            return f"no {self.kind} found"
        lines = [f"{len(self.patched)} {self.kind} use torch_fused_lora, {len(self.declined)} stay with {self.owner}"]
        bases = self._bases()
        rows = [(name, bases.get(name, "fused")) for name in self.patched]
        rows += [(name, f"{self.owner}: {reason}") for name, reason in self.declined.items()]
        return "\n".join([*lines, *_table(rows)])

    def _bases(self) -> dict[str, str]:
        """What the table says of patched modules whose base is called."""
        return {}


@dataclasses.dataclass(slots=True)
class Calls:
    """Of one layer: how many calls the operators computed and how many were left to PEFT, and why the last of those.
    ``base``: why a base of bitsandbytes' was called last, if it was, where the operators could have read its bytes.
    Calls of compiled code are not counted."""

    fused: int = 0
    declined: int = 0
    reason: str | None = None
    base: str | None = None

    def __str__(self) -> str:
        if not self.fused and not self.declined:
            return "compiled, or not called" if has_compiled() else "not called"
        base = f" over a called base: {self.base}" if self.base else ""
        return f"{self.fused} calls fused{base}" + (f", {self.declined} not: {self.reason}" if self.declined else "")


class CallReport(dict[str, Calls]):
    """`Calls` by the layer's name; ``print`` shows them as a table."""

    def __str__(self) -> str:
        fused, declined = sum(calls.fused for calls in self.values()), sum(calls.declined for calls in self.values())
        rows = [(name, str(calls)) for name, calls in self.items()]
        return "\n".join([f"{fused} calls fused, {declined} left to PEFT", *_table(rows)])


@dataclasses.dataclass(frozen=True)
class LoRAReport(PatchReport):
    """A `PatchReport` of LoRA layers. It follows the layers that are patched later, as `patch_peft` says."""

    models: list[weakref.ref[nn.Module]] = dataclasses.field(default_factory=list)

    def calls(self) -> CallReport:
        """What became of the calls of each patched layer so far. Further models of `patch_peft` without one are told
        apart by their number."""
        return CallReport({name: dataclasses.replace(layer._calls) for name, layer in self._layers().items()})

    def _layers(self) -> dict[str, Any]:
        models = [model for model in (reference() for reference in self.models) if model is not None]
        return {
            name if number == 1 else f"{name} (model {number})": layer
            for number, model in enumerate(models, 1)
            for name, layer in model.named_modules()
            if isinstance(getattr(layer, "_calls", None), Calls)
        }

    def __str__(self) -> str:
        calls = self.calls()
        counted = any(layer.fused or layer.declined for layer in calls.values())
        return f"{super().__str__()}\n{calls}" if counted else super().__str__()

    def _bases(self) -> dict[str, str]:
        bases = {name: layer.base_layer for name, layer in self._layers().items()}
        return {
            name: f"fused over {_of_base(base)}"
            for name, base in bases.items()
            if type(base) is not nn.Linear and type(base).__name__ != "Conv1D"
        }


def _of_base(base: Any) -> str:
    kind = type(base)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name == "torch_fused_lora.quantized.QuantLinear":
        return f"{base.bits} bits"
    read = linear4bit.is_one(kind) and not isinstance(linear4bit.read(base), str)
    return f"{name}, which is {'read' if read else 'called'}"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    """Lines of a table of modules and what became of them: one a kind of layer."""
    counts = Counter((pattern(name), what) for name, what in rows)
    width = max((len(name) for name, _ in counts), default=0)
    return [f"  {count:>4} x {name:<{width}}  {what}" for (name, what), count in counts.items()]


def pattern(name: str) -> str:
    """A module's name with its layer numbers as ``*``, so that a table has a row a kind of layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
