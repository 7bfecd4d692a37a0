"""Two files of the bench, ratio by ratio."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def compare(first: Path, second: Path) -> int:
    """Print every ratio that both files have, and second / first; bold where the quartiles lie apart. 1 if there is
    none."""
    documents = [json.loads(path.read_text()) for path in (first, second)]
    console = Console(width=max(Console().width, 150))
    for key in {key: None for document in documents for key in document["environment"]}:
        values = [document["environment"].get(key, "-") for document in documents]
        console.print(f"{key}: {values[0]}" if values[0] == values[1] else f"[bold]{key}: {values[0]} | {values[1]}")
    table = Table(box=SIMPLE)
    for heading in ("case", "ratio", str(first), str(second), "second / first"):
        table.add_column(heading)
    before, after = (dict(_ratios(document)) for document in documents)
    for key, old in before.items():
        if (new := after.get(key)) is None:
            continue
        apart = new["low"] > old["high"] or new["high"] < old["low"]
        change = f"{new['median'] / old['median']:.2f}"
        table.add_row(*key, f"{old['median']:.3f}", f"{new['median']:.3f}", f"[bold]{change}" if apart else change)
    console.print(table)
    return 0 if table.rows else 1


def _ratios(document: dict[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    """The ratios of a file, each with its case and its name."""
    for result in (*document["results"], *document.get("rows", ()), *document.get("host_cost", ())):
        case = [str(value) for value in result.get("case", {}).values()]
        label = " ".join([*case, result.get("direction", ""), result.get("mode", "")]).strip()
        for name, ratio in _inside(result):
            yield (label, name), ratio


def _inside(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    if not isinstance(value, dict):
        return
    if value.keys() == {"median", "low", "high"}:
        yield name, value
    for key, part in value.items():
        yield from _inside(part, f"{name} {key}".strip())
