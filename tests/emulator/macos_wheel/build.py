"""Builds the wheel by the project's own setup.py, which believes that it is on a Mac."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import ROOT

from .mac_torch import MacTorch

HERE = Path(__file__).parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "metal", "torch_fused_lora")


class BuildError(RuntimeError):
    """setup.py, the compiler or the linker refused; the text is theirs."""


def build(scratch: Path, headers: MacTorch, libraries: MacTorch, stubs: Path) -> Path:
    """The wheel, compiled and linked against macOS's torch, in the empty folder ``scratch``.

    ``stubs`` are the system's: those of a torch whose oldest macOS is the wheel's. Raises BuildError.
    """
    compiler = script(scratch / "clang++", sys.executable, HERE / "compiler.py", stubs)
    copy_sources(scratch / "tree")
    run_setup(scratch / "tree", compiler, headers, libraries, "bdist_wheel", "--dist-dir", scratch)
    (wheel,) = scratch.glob("*.whl")
    return wheel


def script(path: Path, *words: str | Path) -> Path:
    """A command of one word, as ninja wants its compiler."""
    path.write_text("#!/bin/sh\nexec " + " ".join(f'"{word}"' for word in words) + ' "$@"\n')
    path.chmod(0o755)
    return path


def copy_sources(tree: Path) -> None:
    """What the wheel is made from, and nothing of an earlier build; modes and caches do not get into it."""
    for name in SOURCES:
        files = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
                copy = tree / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
                copy.chmod(0o644)


def run_setup(tree: Path, compiler: Path, headers: MacTorch, libraries: MacTorch, *command: str | Path) -> None:
    """Run the setup.py of ``tree`` as on a Mac. Raises BuildError."""
    # Of the environment only what no build can do without: flags and targets are setup.py's to give.
    kept = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
    environment = kept | {"SOURCE_DATE_EPOCH": "315532800"}  # 1980-01-01, the first day that a zip file knows
    environment["PYTHONPATH"] = str(ROOT)  # for `tests`; the folder that it runs in comes first
    python: Sequence[str | Path] = (sys.executable, "-m", f"{__package__}.mac_host")
    process = [str(word) for word in (*python, headers.package, libraries.package, compiler, "setup.py", *command)]
    done = subprocess.run(process, cwd=tree, env=environment, umask=0o022, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(done.stdout + done.stderr)
