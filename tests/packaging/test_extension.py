"""Importing the package never fails because of the extension, and nothing of a foreign one runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_fused_lora
from tests import ROOT
from torch_fused_lora.mps import INTERFACE

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the device comes from mps_on_linux")

# A static initialiser tells that the file was loaded, as one would register operators.
LOADED = '#include <cstdio>\nstruct Loaded { Loaded() { puts("initialisers ran"); } } loaded;\n'
TELL = 'extern "C" const char* tfl_interface() { return "%s"; }\n'
NO_CONFIGURE = TELL % INTERFACE
OURS = NO_CONFIGURE + (
    'extern "C" const char* tfl_configure(unsigned cores, const char*, const char* overrides) {\n'
    '  printf("cores %u\\n", cores);\n  fflush(stdout);\n  return *overrides ? "no such kernel" : nullptr;\n}\n'
    'extern "C" double tfl_compile_seconds() { return 0; }\n'
    'extern "C" unsigned long tfl_compiled_kernels() { return 0; }\n'
    'extern "C" unsigned long tfl_contiguous_copies() { return 0; }\n'
    'extern "C" const char* tfl_candidates() { return "{}"; }\n'
    'extern "C" const char* tfl_tune() { return nullptr; }\n'
)
NOT_OURS = "is no extension of this package, or one too old to say, wanted torch_fused_lora interface 5"


def compiled(path: Path, text: str) -> Path:
    source = path.with_suffix(".cpp")
    source.write_text(LOADED + text)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


def imported(extension: Path, core_count: str = "8") -> str:
    """What a process prints that imports the package beside ``extension``."""
    script = f"""
import torch
from tests.emulator import mps_on_linux
mps_on_linux.install()
torch.backends.mps.get_core_count = lambda: {core_count}
import torch_fused_lora
print(torch_fused_lora.mps.extension.reason)
"""
    environment = os.environ | {"TORCH_FUSED_LORA_MPS": str(extension)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@on_linux
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_file_that_is_no_library(content, tmp_path):
    (tmp_path / "_mps.so").write_bytes(content)
    assert NOT_OURS in imported(tmp_path / "_mps.so")


@on_linux
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no extension of this package"),
        (TELL % INTERFACE.replace("interface 5", "interface 1"), "torch_fused_lora interface 1 version"),
        (TELL % (INTERFACE + ".post1"), INTERFACE + ".post1, wanted"),
    ],
    ids=["foreign", "interface", "version"],
)
def test_another_extension_is_not_even_loaded(text, found, tmp_path):
    printed = imported(compiled(tmp_path / "_mps.so", text))
    assert f"_mps.so is {found}" in printed
    assert "initialisers ran" not in printed


@on_linux
def test_a_missing_symbol_and_a_damaged_library(tmp_path):
    assert "could not load it: " in imported(compiled(tmp_path / "_mps.so", NO_CONFIGURE))
    (tmp_path / "damaged.so").write_bytes(INTERFACE.encode() + b"\0")
    assert "could not load it: " in imported(tmp_path / "damaged.so")


@on_linux
@pytest.mark.parametrize("core_count", ["1 // 0", "0", "-1"])
def test_a_gpu_without_a_core_count(core_count, tmp_path):
    printed = imported(compiled(tmp_path / "_mps.so", OURS), core_count)
    assert "cores 0\n" in printed
    assert "loaded; the GPU tells no core count, launches are planned for 8" in printed


def test_the_version_has_one_value():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert torch_fused_lora.__version__ == version
