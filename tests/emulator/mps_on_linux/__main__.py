"""Run a script, or a module after -m, where device mps and the package's extension exist:

python -m tests.emulator.mps_on_linux SCRIPT [ARGUMENTS]
python -m tests.emulator.mps_on_linux -m MODULE [ARGUMENTS]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import install_with_extension


def main() -> None:
    is_module = sys.argv[1:2] == ["-m"]
    del sys.argv[: 1 + is_module]
    if not sys.argv:
        raise SystemExit(__doc__)
    install_with_extension()
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # where Python itself has a script look
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
