"""Turn `metal/` into a C++ source: one string a kernel family, its includes resolved, since Metal's run-time compiler
has no include path."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(\w+\.h)"\n', re.MULTILINE)


def assemble(path: Path, seen: set[Path] | None = None) -> str:
    """The text of a Metal source with each of its own headers inlined once, where it is first included.

    Raises ValueError for a character outside ASCII: PyTorch hands Metal its sources as ASCII.
    """
    seen = set() if seen is None else seen
    text = path.read_text(encoding="utf-8")
    if not text.isascii():
        line = next(i for i, line in enumerate(text.splitlines(), 1) if not line.isascii())
        raise ValueError(f"{path.name}:{line}: expected ASCII only")

    def inline(match: re.Match[str]) -> str:
        header = path.parent / match[1]
        if header in seen:
            return ""
        seen.add(header)
        return assemble(header, seen)

    return _INCLUDE.sub(inline, text.replace("#pragma once\n", ""))


def embed(metal: Path, source: Path) -> None:
    """Write `source` with a constant a family: ``lora_delta_source`` for lora_delta.metal."""
    lines = ["// Written by metal/embed.py from metal/; declared where they are used.", ""]
    for path in sorted(metal.glob("*.metal")):
        name = f"const char {path.stem}_source[]"
        lines += [f"extern {name};", f'{name} = R"metal({assemble(path)})metal";', ""]
    source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=source.parent, delete=False) as file:
        file.write("\n".join(lines))
    os.replace(file.name, source)  # builds may run beside each other: none sees half a file


if __name__ == "__main__":
    embed(Path(sys.argv[1]), Path(sys.argv[2]))
