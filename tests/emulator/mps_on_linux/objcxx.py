"""A C++ and Objective-C++ compiler for this machine: ``CXX="python objcxx.py"``.

Compiles with clang of the ziglang wheel against the system's libstdc++, and links with g++.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import ziglang


def include_folders() -> list[str]:
    """Those of g++, but for its own compiler headers, which give way to clang's."""
    command = ["g++", "-x", "c++", "-E", "-v", "/dev/null"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    listed = re.search(r"^#include <\.\.\.>.*\n([^#]*)^End of search list", text, re.MULTILINE)
    assert listed, text
    clang = str(Path(ziglang.__file__).parent / "lib" / "include")
    return [clang if "/lib/gcc/" in line else line for line in listed[1].split()]


def command_for(arguments: list[str]) -> list[str]:
    if "-c" not in arguments:
        return ["g++", *arguments]
    is_objective = any(argument.endswith(".mm") for argument in arguments)
    language = ["-x", "objective-c++", "-fobjc-runtime=macosx-14.0"] if is_objective else ["-x", "c++"]
    headers = ["-nostdinc", "-nostdinc++", *(option for folder in include_folders() for option in ("-isystem", folder))]
    clang = [sys.executable, "-m", "ziglang", "clang", "-target", "x86_64-linux-gnu"]
    return [*clang, *language, *arguments, *headers]


if __name__ == "__main__":
    sys.exit(subprocess.call(command_for(sys.argv[1:])))
