"""PyTorch's own macOS wheels: what the extension is compiled and linked against, and what macOS is known to export.

Downloaded by pip, of which only what is needed is kept, in the same cache folder as PEFT's tests
(``TORCH_FUSED_LORA_CACHE``, or a folder of the user's cache).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import lief
from packaging.requirements import Requirement
from packaging.version import Version

from tests import ROOT

from ..metal_on_cpu.toolchain import cache_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DYLIBS = ("libc10.dylib", "libtorch.dylib", "libtorch_cpu.dylib")  # what BuildExtension links
MEMBERS = re.compile(r"torch/(include/.*|utils/.*\.py|lib/(" + "|".join(map(re.escape, DYLIBS)) + "))")
TARGET = ["--implementation", "cp", "--python-version", "3.12", "--platform", "macosx_14_0_arm64"]
SYSTEM = {"libc++": "/usr/lib/libc++.1.dylib", "libSystem": "/usr/lib/libSystem.B.dylib"}


class UnreachableError(RuntimeError):
    """Neither the registry nor the cache has the wheel."""


@dataclass(frozen=True)
class MacTorch:
    """An unpacked macOS wheel: ``folder`` holds torch/include, torch/utils, torch/lib, and stubs/ of the system."""

    version: Version
    folder: Path

    @property
    def package(self) -> Path:
        return self.folder / "torch"

    @property
    def libraries(self) -> Path:
        return self.package / "lib"

    @property
    def stubs(self) -> Path:
        """Stubs of the system's libraries, to link with ``-lc++ -lSystem``.

        They export what torch's own dylibs import from them without a fallback, and so what is there on every macOS
        that this torch loads on.
        """
        return self.folder / "stubs"


def requirement() -> Requirement:
    """The dependency on torch in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    return torch


def oldest_and_newest() -> tuple[MacTorch, MacTorch]:
    """The two ends of the supported range, as far as the registry has it. Raises UnreachableError."""
    supported = requirement()
    (floor,) = (bound.version for bound in supported.specifier if bound.operator == ">=")
    return _get(Requirement(f"torch=={floor}")), _get(supported)


def _get(wanted: Requirement) -> MacTorch:
    """The newest version in the registry that fits; without a registry, in the cache."""
    cached = {torch.version: torch for torch in map(_unpacked, cache_folder().glob("mac-torch-*"))}
    try:
        report = _pip(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--report",
            "-",
            "--target",
            tempfile.gettempdir(),
            str(wanted),
        )
        version = Version(json.loads(report)["install"][0]["metadata"]["version"])
    except UnreachableError:
        fitting = [version for version in cached if version in wanted.specifier]
        if not fitting:
            raise
        version = max(fitting)
    return cached[version] if version in cached else _download(version)


def _unpacked(folder: Path) -> MacTorch:
    return MacTorch(Version(folder.name.removeprefix("mac-torch-")), folder)


def _download(version: Version) -> MacTorch:
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        _pip("download", "--dest", scratch, f"torch=={version}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            fresh = Path(scratch) / "fresh"
            archive.extractall(fresh, [name for name in archive.namelist() if MEMBERS.fullmatch(name)])
        _write_stubs(fresh)
        folder = cache_folder() / f"mac-torch-{version}"
        try:
            fresh.rename(folder)  # appears whole, or another process was faster
        except OSError:
            shutil.rmtree(fresh)
    return MacTorch(version, folder)


def _pip(command: str, *arguments: str) -> str:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--retries", "1", "--timeout", "30", *TARGET]
    words = [sys.executable, "-m", "pip", command, *options, *arguments]
    newest = os.environ | {"PIP_CONSTRAINT": os.devnull}  # a cap of this machine's says nothing of what Macs get
    done = subprocess.run(words, capture_output=True, text=True, env=newest)
    if done.returncode and "connection broken" in done.stderr:
        raise UnreachableError(f"pip reached no registry that has {arguments[-1]} for macOS")
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr}")
    return done.stdout


def _write_stubs(unpacked: Path) -> None:
    symbols = defaultdict(set)
    for name in DYLIBS:
        for library, imported in imports(unpacked / "torch" / "lib" / name).items():
            symbols[library] |= imported
    (unpacked / "stubs").mkdir()
    for name, install_name in SYSTEM.items():
        (unpacked / "stubs" / f"{name}.tbd").write_text(
            "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
            f"install-name: '{install_name}'\nexports:\n"
            f"  - targets: [ arm64-macos ]\n    symbols: [ {', '.join(sorted(symbols[install_name]))} ]\n...\n"
        )


def parse(path: Path) -> lief.MachO.Binary:
    binaries = lief.MachO.parse(str(path))
    if binaries is None or binaries.size != 1:
        raise ValueError(f"{path.name}: expected a Mach-O file of one architecture")
    return binaries.at(0)


def imports(path: Path) -> dict[str, set[str]]:
    """The symbols that must be there when a Mach-O file loads, by the library each is bound to.

    Those that may be missing (weak imports) are left out. A symbol bound to no library in particular, as dynamic lookup
    does, stands under "".
    """
    binary = parse(path)
    loads = [x.name for x in binary.libraries if x.command != lief.MachO.LoadCommand.TYPE.ID_DYLIB]
    found = defaultdict(set)
    for symbol in binary.imported_symbols:
        ordinal, is_weak = symbol.description >> 8, symbol.description & 0x40
        if not is_weak:
            found[loads[ordinal - 1] if 1 <= ordinal <= len(loads) else ""].add(symbol.name)
    return dict(found)
