"""Private names of torch: all in one module, each with something right in its place."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch_fused_lora
from tests import ROOT
from torch_fused_lora import torch_private

PACKAGE = Path(torch_fused_lora.__file__).parent
# torch's own, and attributes of its objects; what a module keeps in its dicts is in every pickle, as good as public.
PRIVATE = re.compile(
    r"\btorch(?!\.ops\.torch_fused_lora)(\.\w+)*\._(?!_)\w+|\b_C\b|\b_functorch\b|\baten\._\w+|\b(ctx|tensor|node|forward_ad)\._\w+"
)


def test_private_names_stand_in_one_module():
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    here = sources.pop(Path(torch_private.__file__))
    assert "_AutoDispatchBelowAutograd" in here
    found = {str(path): [m[0] for m in PRIVATE.finditer(text)] for path, text in sources.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_without_each_private_name():
    """Operators and a patched layer compute the same whichever of the names is missing."""
    command = [sys.executable, "-m", "tests.packaging.private_names"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # CUDA does not survive a fork
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) > 20
    assert {name: failure for name, failure in found.items() if failure} == {}
