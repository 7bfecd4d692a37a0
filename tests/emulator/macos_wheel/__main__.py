"""Build the wheel for a Mac, check it, and leave it in a folder: python -m tests.emulator.macos_wheel [--out dist]"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from tests import ROOT
from tests.kernels.launch_plan import assemble

from .binary import PLACE, problems
from .build import build
from .compiler import linker
from .mac_torch import UnreachableError, imports, oldest_and_newest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel (default: %(default)s)")
    out = parser.parse_args().out
    if linker() is None:
        raise SystemExit("needs LLVM's ld64.lld: apt-get install lld-19")
    try:
        oldest, newest = oldest_and_newest()
    except UnreachableError as reason:
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheels = []
        for libraries in (newest, oldest):
            place = scratch / str(libraries.version)
            place.mkdir()
            wheels.append(build(place, newest, libraries, newest.stubs))
            print(f"linked against torch {libraries.version}: {sha256(wheels[-1])}")
        found = [] if wheels[0].read_bytes() == wheels[1].read_bytes() else ["the two wheels differ"]
        with zipfile.ZipFile(wheels[0]) as archive:
            binary = Path(archive.extract(PLACE, scratch))
        found += problems(binary, (oldest, newest), newest.stubs)
        for library, symbols in sorted(imports(binary).items()):
            print(f"\n{library}: {len(symbols)} symbols", *sorted(symbols), sep="\n  ")
        print("\nMetal sources")
        for source in sorted((ROOT / "metal").glob("*.metal")):
            print(f"  {source.stem}: {len(assemble(source)):,} characters")
        if not found:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheels[0], out)
            print(f"\n{out / wheels[0].name}, {wheels[0].stat().st_size:,} bytes")
    print(*found or ["OK"], sep="\n")
    return 1 if found else 0


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
