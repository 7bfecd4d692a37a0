"""Builds the mps device, and Objective-C++ extensions by their own unmodified setup.py.

Both use the system's libstdc++, as PyTorch does: an exception could not cross to another C++ library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from ..metal_on_cpu.toolchain import HERE as METAL_ON_CPU
from ..metal_on_cpu.toolchain import ToolError, cached

HERE = Path(__file__).parent
EXECUTOR = METAL_ON_CPU / "runtime"
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"

# A setup.py as it runs on a Mac, where PyTorch is built with MPS and its BuildExtension takes Objective-C++.
RUN_SETUP = """
import runpy, sys, torch
torch._C._has_mps = True
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(command: Sequence[str | Path], **options: object) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise ToolError(f"{' '.join(words)}\n{done.stdout}")


def device_library() -> Path:
    """The mps device as a shared library; from the cache if it was built before."""
    folder = HERE / "csrc"
    headers = [file.read_text() for file in [*sorted(folder.glob("*.h")), *sorted(EXECUTOR.glob("*.h"))]]
    options = [
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        f"-I{folder}",
        f"-I{EXECUTOR}",
    ]
    options += [f"-isystem{path}" for path in include_paths()]

    def compile_one(source: Path) -> Path:
        parts = [torch.__version__, *options, *headers, source.read_text()]
        return cached(f"mps-{source.stem}", parts, ".o", lambda path: run(["g++", *options, "-c", source, "-o", path]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(folder.glob("*.cpp"))))
    libraries = [f"-L{TORCH_LIBRARIES}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH_LIBRARIES}"]
    link = ["g++", "-shared", "-Wl,-z,defs", *objects, *libraries]
    return cached("mps-device", list(map(str, link)), ".so", lambda path: run([*link, "-o", path]))


def extension(setup: Path, inputs: Sequence[Path]) -> Path:
    """The one extension that ``setup``, a setup.py with Objective-C++ sources, builds; cached by it and its ``inputs``.

    Load it by ``torch.ops.load_library`` after ``mps_on_linux.install()``.
    """

    def build(path: Path) -> None:
        folder = path.parent
        compiler = folder / "objcxx"  # ninja takes one word
        compiler.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "objcxx.py"}" "$@"\n')
        compiler.chmod(0o755)
        environment = os.environ | {"CC": str(compiler), "CXX": str(compiler), "LDSHARED": f"{compiler} -shared"}
        environment["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"
        command = ["build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
        run([sys.executable, "-c", RUN_SETUP, setup.name, *command], cwd=setup.parent, env=environment)
        (built,) = (folder / "lib").rglob("*.so")
        shutil.move(built, path)

    texts = [file.read_text() for file in [setup, *inputs, HERE / "objcxx.py"]]
    return cached(f"extension-{setup.parent.name}", [torch.__version__, *texts], ".so", build)
