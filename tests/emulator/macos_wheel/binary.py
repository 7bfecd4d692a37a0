"""Whether a Mach-O file will load beside macOS's torch, as far as its bytes tell."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lief

from tests import ROOT

from .mac_torch import SYSTEM, MacTorch, imports, parse
from .signature import signature_problems

PLACE = "torch_fused_lora/_mps.so"  # in the wheel, and so in site-packages, beside torch/
TORCH = ("@rpath/libc10.dylib", "@rpath/libtorch.dylib", "@rpath/libtorch_cpu.dylib")
OLDEST_MACOS = (14, 0)


def problems(path: Path, torches: tuple[MacTorch, ...], stubs: Path) -> Iterator[str]:
    """A line for everything that would keep the oldest macOS from loading the file beside any of ``torches``."""
    binary, kinds = parse(path), lief.MachO.Header
    kind = binary.header.cpu_type, binary.header.file_type
    if kind != (kinds.CPU_TYPE.ARM64, kinds.FILE_TYPE.BUNDLE):
        yield f"expected an arm64 bundle, got {kind}"
    if minimum_macos(binary) != OLDEST_MACOS:
        yield f"expected macOS {OLDEST_MACOS} as the oldest, got {minimum_macos(binary)}"
    if different := {library.name for library in binary.libraries} ^ {*TORCH, *SYSTEM.values()}:
        yield f"loads too much or too little: {sorted(different)}"
    exported = {symbol.name for symbol in binary.exported_symbols}
    called = set(re.findall(r"library\.(tfl_\w+)", (ROOT / "torch_fused_lora" / "mps.py").read_text()))
    if different := exported ^ {f"_{name}" for name in called}:
        yield f"exports too much or too little for mps.py: {sorted(different)}"
    beside = posixpath.dirname(PLACE)
    rpaths = [posixpath.normpath(rpath.path.replace("@loader_path", beside)) for rpath in binary.rpaths]
    if rpaths != ["torch/lib"]:
        yield f"expected to look for torch in torch/lib, got {rpaths}"
    for torch in torches:
        for library, symbol in missing(imports(path), exports(torch, stubs)):
            yield f"{symbol} of {library or 'no library in particular'} is not there with torch {torch.version}"
    signature = binary.code_signature
    yield from signature_problems(path.read_bytes(), signature.data_offset, signature.data_size)


def minimum_macos(binary: lief.MachO.Binary) -> tuple[int, int]:
    major, minor, _ = binary.build_version.minos
    return major, minor


def missing(needed: dict[str, set[str]], there: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """(library, symbol) of what is needed and not there."""
    for library, symbols in sorted(needed.items()):
        for symbol in sorted(symbols - there.get(library, set())):
            yield library, symbol


@cache
def exports(torch: MacTorch, stubs: Path) -> dict[str, set[str]]:
    """The symbols that torch's dylibs export, and the system's as far as the stubs tell, by install name."""
    there = {}
    for name in TORCH:
        library = parse(torch.libraries / posixpath.basename(name))
        if library.libraries[0].name != name:
            raise ValueError(f"torch {torch.version}: {name} calls itself {library.libraries[0].name}")
        there[name] = {symbol.name for symbol in library.exported_symbols}
    for stub, name in SYSTEM.items():
        (symbols,) = re.findall(r"symbols: \[ (.*) \]", (stubs / f"{stub}.tbd").read_text())
        there[name] = set(symbols.split(", "))
    return there
