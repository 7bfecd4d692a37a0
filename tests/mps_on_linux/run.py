"""Run a script, or a module after -m, where device mps and the package's extension exist:

python tests/mps_on_linux/run.py SCRIPT [ARGUMENTS]
python tests/mps_on_linux/run.py -m MODULE [ARGUMENTS]
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def install() -> None:
    """The bench's device and the extension that setup.py builds: before torch_fused_lora is imported."""
    import mps_on_linux

    mps_on_linux.install()
    folders = "csrc/mps", "csrc/plan", "metal"
    sources = [ROOT / "pyproject.toml", *(file for folder in folders for file in sorted((ROOT / folder).glob("*.*")))]
    os.environ["TORCH_FUSED_LORA_MPS"] = str(mps_on_linux.extension(ROOT / "setup.py", sources))


def main() -> None:
    is_module = sys.argv[1:2] == ["-m"]
    del sys.argv[: 1 + is_module]
    if not sys.argv:
        raise SystemExit(__doc__)
    sys.path.insert(0, str(TESTS))
    install()
    # As Python does: the folder of what runs, in place of this file's.
    sys.path[:2] = [os.getcwd() if is_module else str(Path(sys.argv[0]).resolve().parent), str(TESTS)]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
