"""Builds the Objective-C++ extension where PyTorch is built with MPS; everywhere else the package is plain Python.

The metadata stands in pyproject.toml.
"""

import os
import platform
import re
import runpy
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
embed = runpy.run_path(str(CSRC / "embed_metal.py"))["embed"]

TORCH_TARGET = "0x020b000000000000"  # 2.11: the stable ABI that one binary serves every later torch with
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
COMPILE = ["-std=c++20", "-O2", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
COMPILE += [f"-DTFL_VERSION={VERSION}"]  # a bare word: quotes would not survive every build backend
COMPILE += ["-fno-sized-deallocation"]  # as torch's own macOS binaries: they import no sized delete
LINK = ["-Wl,-rpath,@loader_path/../torch/lib"] if sys.platform == "darwin" else []


class PythonFreeWheel(bdist_wheel):
    """The extension makes no call of Python: one wheel serves every CPython 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def extension_build():
    """The extension and its build command; nothing where there is no MPS to build for."""
    if sys.platform == "darwin" and platform.machine() != "arm64":  # an Intel Mac's torch knows MPS, too
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:  # pyproject.toml asks for torch at build time on a Mac only
        return {}
    if not torch.backends.mps.is_built():
        return {}
    os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", "14.0")
    sources = ROOT / "build" / "metal_sources.cpp"
    embed(ROOT / "metal", sources)
    extension = CppExtension(
        "torch_fused_lora._mps",
        [str(path.relative_to(ROOT)) for path in (*sorted(CSRC.glob("*.mm")), *sorted(CSRC.glob("*.cpp")), sources)],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {
            "build_ext": BuildExtension.with_options(no_python_abi_suffix=True),
            "bdist_wheel": PythonFreeWheel,
        },
    }


setup(**extension_build())
