"""clang++ for an arm64 Mac, on Linux: python compiler.py STUBS [ARGUMENTS OF CLANG++]

Compiles with clang of the ziglang wheel, which has macOS's C headers and libc++'s, and links with LLVM's ld64.lld.
Every argument is passed on as it is, but one: what is undefined is an error here, since everything that the file may
use is given to the linker, the system's libraries as the folder ``STUBS``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# As on a Mac: libc++ is the system's, so that what its version lacks is not used. zig links its own.
LIBCXX = [
    *["-U_LIBCPP_DISABLE_VISIBILITY_ANNOTATIONS", "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS"],
    "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
]
FOR_COMPILING = ("-D", "-O", "-W", "-f", "-g")  # what clang++ keeps from the linker


def linker() -> str | None:
    """LLVM's linker for Mach-O: Debian's package lld-19."""
    return shutil.which("ld64.lld-19") or shutil.which("ld64.lld")


def command_for(arguments: list[str], stubs: Path) -> list[str]:
    """What is run for a call of clang++."""
    target = os.environ["MACOSX_DEPLOYMENT_TARGET"]
    if "-c" in arguments:
        clang = [sys.executable, "-m", "ziglang", "c++", "-target", f"aarch64-macos.{target}"]
        return [*clang, *LIBCXX, *arguments, "-g0", *prefix_maps(arguments)]
    words = []
    for argument in arguments:
        if argument.startswith("-Wl,"):
            words += argument.split(",")[1:]
        elif not argument.startswith(FOR_COMPILING):
            words.append(argument)
    undefined = words.index("-undefined")
    assert words[undefined + 1] == "dynamic_lookup", words
    del words[undefined : undefined + 2]
    platform = ["-arch", "arm64", "-platform_version", "macos", target, target]
    return [linker() or "ld64.lld", *platform, *words, "-S", "-x", f"-L{stubs}", "-lc++", "-lSystem"]


def prefix_maps(arguments: list[str]) -> list[str]:
    """Options that keep this machine's folders out of the object file: __FILE__ starts after the include folder."""
    folders = [argument[2:] for argument in arguments if argument.startswith("-I")]
    folders += [os.path.dirname(argument) for argument in arguments if argument.endswith((".mm", ".cpp"))]
    return [f"-ffile-prefix-map={folder}/=" for folder in folders]


if __name__ == "__main__":
    sys.exit(subprocess.call(command_for(sys.argv[2:], Path(sys.argv[1]))))
