"""Have Apple's compiler take Metal sources, each through torch.mps: ``python -m tests.kernels.compile_shaders FOLDER``.

Compiles every ``.metal`` file of the folder and launches none, so a Mac's virtual GPU will do. Needs torch alone.
``python -m tests.kernels.kernel_code --sources FOLDER`` writes what the launch plans ask for.
Exits 1 if one is refused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch


def refusal(source: str) -> str | None:
    """The compiler's text if it refuses; torch raises RuntimeError or SyntaxError, as its version has it."""
    try:
        torch.mps.compile_shader(source)
    except (RuntimeError, SyntaxError) as error:
        return str(error)
    return None


def compile_all(files: Iterable[Path]) -> int:
    """Compile each file and print what is refused; the exit status."""
    texts = {file.stem: file.read_text(encoding="ascii") for file in files}
    if not texts:
        raise SystemExit("no .metal file there")
    if not torch.backends.mps.is_available():  # torch would ask a device that is none, and report no error
        raise SystemExit(f"torch {torch.__version__} has no device mps to compile for")
    if refusal("kernel void planted(device float* y [[buffer(0)]]) { *y = undeclared; }") is None:
        raise SystemExit("the compiler took a kernel with an undeclared name: nothing is compiled here")
    started = time.perf_counter()
    refused = {name: reason for name, text in texts.items() if (reason := refusal(text)) is not None}
    seconds = time.perf_counter() - started
    for name, reason in refused.items():
        print(f"{name}: refused\n{reason}\n")
    gpu = torch.backends.mps.get_name()
    print(f"{len(texts)} sources, {len(refused)} refused, {seconds:.1f} s; torch {torch.__version__}, {gpu}")
    return 1 if refused else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.exit(compile_all(sorted(Path(sys.argv[1]).glob("*.metal"))))
