"""The compiler of the ziglang wheel, and a cache of what it built.

Outputs are named by a hash of everything they depend on, and appear by rename: concurrent processes never see half a
file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
TARGET = ["-target", "x86_64-linux-gnu"]
CPU = ["-march=x86-64-v3"]  # half precision conversions and fused multiply-add in hardware

# OpenCL C++ has Metal's checked address spaces, half and vectors. No double, and 1.5 is a float, as in Metal. Each half
# and bfloat operation rounds; a*b+c is not fused unless written so. A variable that was not initialised is NaN.
METAL_LANGUAGE = [
    *["-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc", "-cl-single-precision-constant"],
    *["-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64"],
]
METAL_CODE = [
    *["-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno"],
    *["-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"],
    *["-ftrivial-auto-var-init=pattern", "-gline-tables-only", "-gdwarf-4", "-fno-caret-diagnostics"],
    "-ferror-limit=0",
    *["-Wno-everything", "-Werror=return-type", "-Werror=uninitialized"],
]
FAST = ["-O2"]
# Every access calls the runtime: address sanitizer's checks, outlined, with none of its own runtime.
TRACE = [
    *["-O1", "-fno-vectorize", "-fno-slp-vectorize", "-fsanitize=kernel-address,array-bounds"],
    *["-mllvm", "-asan-instrumentation-with-call-threshold=0", "-mllvm", "-asan-kernel-mem-intrinsic-prefix=1"],
    *["-mllvm", "-asan-opt-same-temp=0", "-mllvm", "-asan-stack=0"],
]


class ToolError(RuntimeError):
    """A compiler or linker refused; the text is its own."""


def cache_folder() -> Path:
    """Where what is compiled or downloaded is kept: ``TORCH_FUSED_LORA_CACHE``, or a folder in the user's cache."""
    if ours := os.environ.get("TORCH_FUSED_LORA_CACHE"):
        return Path(ours)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch-fused-lora"


@cache
def zig() -> Path:
    """The wheel's program, which is called itself: ``python -m ziglang`` starts a Python to do no more."""
    wheel = importlib.util.find_spec("ziglang")
    if wheel is None or wheel.origin is None:
        raise ToolError("the ziglang wheel is missing: pip install ziglang")
    return Path(wheel.origin).with_name("zig")


def run(tool: str, arguments: Sequence[str | Path], stdin: str = "") -> str:
    """Run a tool of the ziglang wheel (clang, c++, ld.lld) and return what it prints."""
    done = subprocess.run([zig(), tool, *map(str, arguments)], input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise ToolError(done.stderr or f"{tool} exited with status {done.returncode}")
    return done.stdout


@cache
def compiler_version() -> str:
    """The compiler's version; raises ToolError on a machine for which the executor has no code."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ToolError(f"metal_on_cpu runs on x86-64 Linux only; this is {sys.platform} {platform.machine()}")
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if missing := {"avx2", "fma", "f16c", "bmi2"} - flags:
        raise ToolError(f"metal_on_cpu needs an x86-64-v3 processor; this one lacks {', '.join(sorted(missing))}")
    return run("clang", ["--version"])


def cached(name: str, parts: Sequence[str], suffix: str, build: Callable[[Path], None]) -> Path:
    """The file that ``build(path)`` writes, from the cache if the same ``parts`` built it before."""
    key = hashlib.sha256("\0".join([compiler_version(), suffix, *parts]).encode()).hexdigest()[:24]
    folder = cache_folder()
    path = folder / f"{name}-{key}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / path.name
            build(fresh)
            os.replace(fresh, path)
    return path


def build_shared(sources: Sequence[Path], name: str, flags: Sequence[str] = ()) -> Path:
    """Compile and link C++20 sources to a shared library and return its path.

    ``flags`` may name include folders; every header beside a source, or in such a folder, counts for the cache.
    """
    folders = {source.parent for source in sources} | {Path(flag[2:]) for flag in flags if flag.startswith("-I")}
    headers = sorted(header for folder in folders for pattern in ("*.h", "*.hpp") for header in folder.glob(pattern))
    parts = [*flags, *(f"{file.name}\n{file.read_text()}" for file in [*sources, *headers])]
    options = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-fvisibility-inlines-hidden", *TARGET, *flags]
    return cached(name, parts, ".so", lambda path: run("c++", [*options, "-shared", *sources, "-o", path]) and None)


@cache
def runtime() -> Path:
    """The executor's runtime as a shared library. Free of the C++ library, which would take a minute to build."""
    folder = HERE / "runtime"
    sources = sorted(folder.glob("*.cpp"))
    options = ["-std=c++20", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-Wall", "-Wextra"]

    def build(path: Path) -> None:
        objects = [path.with_name(f"{source.stem}.o") for source in sources]
        for source, output in zip(sources, objects, strict=True):
            run("c++", [*options, *TARGET, "-c", source, "-o", output])
        run("ld.lld", ["-shared", *objects, "-o", path])

    return cached("executor", [file.read_text() for file in [*sources, *sorted(folder.glob("*.h"))]], ".so", build)


@cache
def shim_text() -> str:
    files = [*sorted((HERE / "shim").glob("*.h")), HERE / "runtime" / "thread.h"]
    return "\0".join(file.read_text() for file in files)


def preprocess(source: str, name: str) -> str:
    """Metal source with macros expanded; line markers count its lines as those of ``name``."""
    options = [*TARGET, *METAL_LANGUAGE, "-E", "-include", HERE / "shim" / "macros.h", "-"]
    return run("clang", options, stdin=f'#line 1 "{name}"\n{source}')


def build_kernels(text: str, name: str, *, strict: bool, trace: bool) -> Path:
    """Compile rewritten Metal to a shared library that needs the runtime."""
    spaces = ["-Ddevice=__global", "-Dthreadgroup=__local", f"-Dthread={'__private' if strict else ''}"]
    options = [*TARGET, *CPU, *METAL_LANGUAGE, *METAL_CODE, *(TRACE if trace else FAST)]

    def build(path: Path) -> None:
        module = path.with_suffix(".o")
        run("clang", [*options, *spaces, "-include", HERE / "shim" / "metal.h", "-c", "-o", module, "-"], stdin=text)
        run("ld.lld", ["-shared", "-Bsymbolic", module, runtime(), "-o", path])

    return cached(name, [text, shim_text(), *options, *spaces, str(runtime())], ".so", build)
