"""Runs a setup.py as Python does on an arm64 Mac: its arguments are HEADERS LIBRARIES COMPILER setup.py ...

``HEADERS`` and ``LIBRARIES`` are the torch packages of macOS wheels (mostly the same one), whose own BuildExtension is
used. ``COMPILER`` stands in for clang++.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import sys
import sysconfig

import torch  # Linux's, while this is still Linux


def become_a_mac(headers: str, libraries: str, compiler: str) -> None:
    python = sysconfig.get_config_vars()  # read from a file that is named by the platform
    sys.platform = "darwin"
    platform.machine = lambda: "arm64"
    os.environ["_PYTHON_HOST_PLATFORM"] = "macosx-14.0-arm64"
    os.environ |= {"CC": compiler, "CXX": compiler}
    link = f"{compiler} -bundle -undefined dynamic_lookup"
    # As CPython 3.12 answers on a Mac.
    python.update(
        CC=compiler,
        CXX=compiler,
        CFLAGS="-fno-strict-overflow -Wsign-compare -Wunreachable-code -fno-common -dynamic -DNDEBUG -g -O3 -Wall",
        CCSHARED="",
        LDSHARED=link,
        LDCXXSHARED=link,
        EXT_SUFFIX=".cpython-312-darwin.so",
        Py_ENABLE_SHARED=0,
    )
    torch._C._has_mps = True
    name = "torch.utils.cpp_extension"
    spec = importlib.util.spec_from_file_location(name, f"{headers}/utils/cpp_extension.py")
    assert spec is not None
    assert spec.loader is not None
    extensions = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extensions)
    extensions._TORCH_PATH, extensions.TORCH_LIB_PATH = headers, f"{libraries}/lib"  # else found by `import torch`


if __name__ == "__main__":
    become_a_mac(*sys.argv[1:4])
    del sys.argv[:4]
    runpy.run_path(sys.argv[0], run_name="__main__")
