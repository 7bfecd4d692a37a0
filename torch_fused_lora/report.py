"""What patching did to a model, as a readable table."""

from __future__ import annotations

import dataclasses
from collections import Counter


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
        rows = [(_pattern(name), "fused") for name in self.patched]
        rows += [(_pattern(name), f"{self.owner}: {reason}") for name, reason in self.declined.items()]
        counts = Counter(rows)
        width = max((len(name) for name, _ in counts), default=0)
        lines += [f"  {count:>4} x {name:<{width}}  {what}" for (name, what), count in counts.items()]
        return "\n".join(lines)


def _pattern(name: str) -> str:
    """A module's name with its layer numbers as ``*``, so that a table has a row a kind of layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
