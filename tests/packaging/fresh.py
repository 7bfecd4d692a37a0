"""A fresh clone and a fresh environment, as a stranger has them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import ROOT


class UnavailableError(RuntimeError):
    """There is no such Python on this machine."""


def copy_of_the_tree(folder: Path) -> Path:
    """What git has of the work tree, changes included, in the new folder ``folder``; nothing that it ignores."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    for name in map(os.fsdecode, filter(None, listed.stdout.split(b"\0"))):
        if (ROOT / name).is_file():  # not one that was deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def environment(python: str, folder: Path) -> dict[str, str]:
    """A new virtual environment in ``folder``: the variables of a process that runs in it.

    Args:
        python: a version, such as "3.12"; its interpreter is sought on PATH.

    Raises:
        UnavailableError: PATH has none.
    """
    names = [shutil.which(f"python{python}"), sys.executable]
    for interpreter in filter(None, names):
        asked = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == python:
            subprocess.run([interpreter, "-m", "venv", folder], check=True)
            # Nothing of this environment, of the user's packages or of a checkout gets in.
            kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
            return kept | {
                "VIRTUAL_ENV": str(folder),
                "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "PYTHONNOUSERSITE": "1",
                "HF_HUB_OFFLINE": "1",
            }
    raise UnavailableError(f"no python{python} on PATH")
