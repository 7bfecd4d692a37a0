"""Runs what README.md and docs/getting_started.md tell a reader to type: python -m tests.packaging.commands

Every bash block, in order, in one fresh environment in a fresh copy of the work tree; a block that stood before is not
run again. A comment directly above a block keeps it from being run: <!-- mac --> wants a Mac, <!-- published --> the
package on an index. Needs nothing but Python.

    --here  in this environment and this tree, for CI, whose clone and environment are fresh
    --list  run nothing
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

from .fresh import copy_of_the_tree, environment

DOCUMENTS = "README.md", "docs/getting_started.md"
MARKS = "mac", "published"
BLOCK = re.compile(r"(?:^<!-- (\w+) -->\n)?^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    document: str
    line: int  # of its first command
    mark: str  # one of `MARKS`, or "" where it is to be run
    text: str


def blocks(document: str) -> list[Block]:
    """The bash blocks of a document, a path below the root.

    Raises ValueError for a mark that is none of `MARKS`.
    """
    text, found = (ROOT / document).read_text(), []
    for match in BLOCK.finditer(text):
        block = Block(document, text.count("\n", 0, match.start(2)) + 1, match[1] or "", match[2])
        if block.mark and block.mark not in MARKS:
            raise ValueError(f"{document}:{block.line}: expected a mark of {', '.join(MARKS)}, got {block.mark!r}")
        found.append(block)
    return found


def all_blocks() -> list[Block]:
    """Those of every document."""
    return [block for document in DOCUMENTS for block in blocks(document)]


def run(chosen: list[Block], folder: Path, variables: dict[str, str]) -> int:
    """Run blocks in ``folder``, one process each, until one fails: its exit status, or 0."""
    for block in chosen:
        print(f"== {block.document}:{block.line}\n{block.text}", flush=True)
        start = time.monotonic()
        status = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=variables).returncode
        print(f"== {block.document}:{block.line}: exit status {status}, {time.monotonic() - start:.0f} s", flush=True)
        if status:
            return status
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    found = all_blocks()
    first: dict[str, Block] = {}
    for block in found:
        if not block.mark:
            first.setdefault(block.text, block)
    chosen = list(first.values())
    status = 0
    if options.list:
        print(*(f"{block.document}:{block.line} {block.mark}\n{block.text}" for block in found), sep="\n")
    elif options.here:
        status = run(chosen, ROOT, dict(os.environ))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            variables = environment(python, Path(scratch) / "venv")
            status = run(chosen, copy_of_the_tree(Path(scratch) / "clone"), variables)
    skipped = ", ".join(f"{sum(block.mark == mark for block in found)} {mark}" for mark in MARKS)
    again = sum(not block.mark for block in found) - len(chosen)
    print(f"{len(chosen)} blocks to run, {again} that stood before, skipped: {skipped}")
    return status


if __name__ == "__main__":
    sys.exit(main())
