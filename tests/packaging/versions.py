"""Tests of the operators and of PEFT in fresh environments, over a table: python -m tests.packaging.versions

    --cell NAME  run this cell, may be repeated; without it every cell of this machine's, one at a time, each in an
                 environment that is deleted: about 2 minutes a cell, and up to 6 GB where torch brings CUDA's libraries
    --here       in this environment, with what is installed in it: for a machine that reaches no index
    --list       run nothing

What came out is kept in docs/benchmarks/versions.json; then the table is printed, in which a cell that no outcome is
kept of stands as not run. Pythons are sought on PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
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
CUDA = "tests/operators/test_cuda.py"
PACKAGES = "torch", "peft", "transformers"
ASKED = f"import sys; from importlib.metadata import version as v; print(sys.version.split()[0], *map(v, {PACKAGES}))"


class Cell(NamedTuple):
    """A Python, and what pip is asked for; of `PACKAGES` that are not named, the newest that fit."""

    python: str
    requirements: tuple[str, ...]
    where: str = ""  # the machine, if this one cannot show it
    tests: tuple[str, ...] = TESTS

    def not_run(self) -> dict[str, Any]:
        """What is kept of a cell that was not run."""
        named = dict(requirement.split("==") for requirement in self.requirements if "==" in requirement)
        versions = {"python": self.python} | {package: named.get(package, "newest") for package in PACKAGES}
        return versions | {"outcome": f"not run {self.where}".strip()}


CELLS = {
    "python-3.11": Cell("3.11", ("torch==2.13.*",)),
    "python-3.11-torch-2.14": Cell("3.11", ("torch==2.14.*",)),
    "python-3.10": Cell("3.10", ("torch==2.13.*",)),
    "python-3.12": Cell("3.12", ("torch==2.14.*",)),
    "python-3.13": Cell("3.13", ("torch==2.14.*",)),
    "torch-newest": Cell("3.13", ("torch",)),
    "torch-oldest": Cell("3.11", ("torch==2.11.*",)),
    "torch-oldest-cuda": Cell("3.12", ("torch==2.11.*",), "on the GPU machine", (*TESTS, CUDA)),
    "peft-0.17": Cell("3.11", ("torch==2.13.*", "peft==0.17.0", "transformers==4.55.0")),  # August 2025
    "peft-0.19": Cell("3.11", ("torch==2.13.*", "peft==0.19.0", "transformers==5.5.0")),  # April 2026
}


def fresh(cell: Cell) -> dict[str, Any]:
    """Install a cell and test it: the versions that pip chose, and what came out.

    Raises UnavailableError where there is no such Python, and CalledProcessError where pip finds no way.
    """
    with tempfile.TemporaryDirectory() as scratch:
        variables = environment(cell.python, Path(scratch) / "venv")
        variables |= {"PIP_CONSTRAINT": os.devnull}  # a cap of the machine's is not one of the table's
        tree = copy_of_the_tree(Path(scratch) / "tree")
        wanted = (".[peft]", "transformers", *cell.requirements, "pytest", "hypothesis")
        subprocess.run(["python", "-m", "pip", "install", "-qq", *wanted], cwd=tree, env=variables, check=True)
        return tested(cell, "python", tree, variables)


def tested(cell: Cell, python: str, tree: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Test a tree in an installed environment."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        one_thread = variables | {"OMP_NUM_THREADS": "1"}
        return subprocess.run((python, *words), cwd=tree, env=one_thread, stdout=subprocess.PIPE, text=True)

    versions = call("-c", ASKED).stdout.split()
    start = time.monotonic()
    done = call("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not mps", *cell.tests)
    print(done.stdout)
    counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?)", done.stdout.rstrip().rpartition("\n")[2])
    return {
        **dict(zip(("python", *PACKAGES), versions, strict=True)),
        "outcome": ", ".join(counts) or f"pytest ended with status {done.returncode}",
        "status": done.returncode,
        "seconds": round(time.monotonic() - start),
        "machine": f"{platform.system()} {platform.machine()}{cell.where and ', '}{cell.where}",
    }


def record() -> dict[str, dict[str, Any]]:
    """What is kept of each cell."""
    kept = json.loads(RECORD.read_text())["cells"] if RECORD.exists() else {}
    return {name: kept[name] if "status" in kept.get(name, {}) else cell.not_run() for name, cell in CELLS.items()}


def keep(name: str, outcome: dict[str, Any]) -> None:
    """Write what came out of a cell, with the others as they are kept."""
    RECORD.parent.mkdir(exist_ok=True)
    document = {
        "environment": {"torch": "of each cell"},
        "source": {"command": COMMAND, "commit": outcome["commit"]},
        "cells": record() | {name: outcome},
    }
    RECORD.write_text(json.dumps(document, indent=1) + "\n")


def table(cells: dict[str, dict[str, Any]]) -> str:
    """A line a cell: its name, its versions, what came out."""
    rows = [("cell", "Python", *PACKAGES, "outcome")]
    rows += [(name, *(cell[word] for word in ("python", *PACKAGES, "outcome"))) for name, cell in cells.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", choices=CELLS, metavar="NAME")
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip()
    chosen = options.cell or [name for name, cell in CELLS.items() if not cell.where]
    failed = False
    for name in [] if options.list else chosen:
        cell = CELLS[name]
        print(f"== {name}", flush=True)
        try:
            outcome = tested(cell, sys.executable, ROOT, dict(os.environ)) if options.here else fresh(cell)
        except (UnavailableError, subprocess.CalledProcessError) as reason:
            print(f"not run: {reason}")
            failed = True
        else:
            keep(name, outcome | {"commit": commit})
            failed |= outcome["status"] != 0
    print(table(record()))
    return failed


if __name__ == "__main__":
    sys.exit(main())
