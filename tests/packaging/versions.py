"""Tests of the operators and of PEFT in fresh environments, over a table: python -m tests.packaging.versions

    --cell NAME  run this cell, may be repeated; without it every cell of this machine's, one at a time, each in an
                 environment that is deleted: about 2 minutes a cell, and up to 6 GB where torch brings CUDA's libraries
    --list       run nothing

What came out is kept in docs/benchmarks/versions.json; then the table is printed, in which a cell that no outcome is
kept of stands as not run. Pythons are sought on PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests import ROOT

from .fresh import UnavailableError, copy_of_the_tree, environment

RECORD = ROOT / "docs" / "benchmarks" / "versions.json"
COMMAND = "python -m tests.packaging.versions"
OPERATORS = "lora_linear", "autograd", "autocast", "dropout", "errors", "compile"
MODELS = "peft", "calls", "nn", "norms"
TESTS = (
    "tests/test_tiny.py",
    *(f"tests/operators/test_{name}.py" for name in OPERATORS),
    *(f"tests/models/test_{name}.py" for name in MODELS),
)
PACKAGES = "torch", "peft", "transformers"


class Cell(NamedTuple):
    """A Python, and what pip is asked for; of `PACKAGES` that are not named, the newest that fit."""

    python: str
    requirements: tuple[str, ...]
    where: str = ""  # the machine, if this one cannot show it


CELLS = {
    "python-3.11": Cell("3.11", ("torch==2.13.*",)),
    "python-3.11-torch-2.14": Cell("3.11", ("torch==2.14.*",)),
    "python-3.10": Cell("3.10", ("torch==2.13.*",)),
    "python-3.12": Cell("3.12", ("torch==2.14.*",)),
    "python-3.13": Cell("3.13", ("torch==2.14.*",)),
    "torch-newest": Cell("3.13", ("torch",)),
    "torch-oldest": Cell("3.11", ("torch==2.11.*",)),
    "torch-oldest-cuda": Cell("3.11", ("torch==2.11.*",), "on the GPU machine"),
    "peft-0.17": Cell("3.11", ("torch==2.13.*", "peft==0.17.0", "transformers==4.55.0")),  # August 2025
    "peft-0.19": Cell("3.11", ("torch==2.13.*", "peft==0.19.0", "transformers==5.5.0")),  # April 2026
}


def run(cell: Cell) -> dict[str, Any]:
    """Install and test: the versions that pip chose, and pytest's last line.

    Raises UnavailableError where there is no such Python, and CalledProcessError where pip finds no way.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        variables = environment(cell.python, Path(scratch) / "venv") | {"PIP_QUIET": "2", "OMP_NUM_THREADS": "1"}
        variables |= {"PIP_CONSTRAINT": os.devnull}  # a cap of the machine's is not one of the table's
        tree = copy_of_the_tree(Path(scratch) / "tree")

        def python(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(("python", *words), cwd=tree, env=variables, stdout=subprocess.PIPE, text=True)

        wanted = (".[peft]", "transformers", *cell.requirements, "pytest", "hypothesis")
        python("-m", "pip", "install", *wanted).check_returncode()
        asked = f"from importlib.metadata import version as v; print(*map(v, {PACKAGES}))"
        versions = dict(zip(PACKAGES, python("-c", asked).stdout.split(), strict=True))
        tested = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not mps", *TESTS)
        print(tested.stdout)
    last = tested.stdout.rstrip().rpartition("\n")[2].strip("= ").partition(" in ")[0]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return {
        "python": cell.python,
        **versions,
        "outcome": last or f"pytest ended with status {tested.returncode}",
        "seconds": round(time.monotonic() - start),
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": commit,
        "status": tested.returncode,
    }


def table(record: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row a cell: its name, its versions, what came out."""
    rows = [("cell", "Python", *PACKAGES, "outcome")]
    for name, cell in CELLS.items():
        kept = record.get(name, {})
        asked = dict(r.split("==") for r in cell.requirements if "==" in r)
        versions = [kept.get(package) or asked.get(package, "newest") for package in PACKAGES]
        place = f" {cell.where}" if cell.where else ""
        rows.append((name, cell.python, *versions, (kept.get("outcome") or "not run") + place))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", choices=CELLS, metavar="NAME")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = options.cell or [name for name, cell in CELLS.items() if not cell.where]
    record = json.loads(RECORD.read_text())["cells"] if RECORD.exists() else {}
    failed = False
    for name in [] if options.list else chosen:
        print(f"== {name}", flush=True)
        try:
            record[name] = run(CELLS[name])
            failed |= record[name].pop("status") != 0
        except (UnavailableError, subprocess.CalledProcessError) as reason:
            print(f"not run: {reason}")
            failed = True
            continue
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps({"command": COMMAND, "cells": record}, indent=1) + "\n")
    rows = table(record)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)).rstrip())
    return failed


if __name__ == "__main__":
    sys.exit(main())
