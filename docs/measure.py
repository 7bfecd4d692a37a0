"""Measures what the pages say of time, on this machine, into docs/benchmarks/: ``python -m docs.measure NAME ...``.

``cpu`` stands for cpu_layers, cpu_model and encoder, about five minutes on a quiet machine. A file that the same
command wrote elsewhere, on a GPU's machine from the same commit, is taken over by ``--from FILE``. Each file keeps its
machine, its versions, its commit and its command; then `make numbers` brings them into the pages.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests import ROOT

MEASURED = "torch_fused_lora", "csrc", "metal", "examples", "setup.py"  # what a measurement depends on
BENCH = "-m torch_fused_lora bench"
# By name: the command, without --out, and the file that it writes there.
COMMANDS = {
    "cpu_layers": (f"{BENCH} --device cpu --shapes small medium called rows --seconds 2", "bench.json"),
    "cpu_model": (f"{BENCH} --model --device cpu --threads 1 --seconds 3", "model.json"),
    "cpu_packed": (f"{BENCH} --device cpu --shapes packed --seconds 1", "bench.json"),  # needs bitsandbytes
    "encoder": ("examples/finetune_encoder.py", "results.json"),
    "gemma_4bit": ("examples/finetune_4bit.py --steps 24 --batch-size 1 --held-out 8", "results.json"),
    "cuda_layers": (f"{BENCH} --device cuda --shapes gpu rows --seconds 0.7", "bench.json"),
    "cuda_model": (f"{BENCH} --model --device cuda --seconds 2", "model.json"),
    "cuda_packed": (f"{BENCH} --device cuda --shapes packed --seconds 0.7", "bench.json"),
    "cuda_4bit_model": (f"{BENCH} --model --format 4bit --device cuda --dropout 0.05 --seconds 2", "model.json"),
    "cuda_nf4_model": (f"{BENCH} --model --format nf4 --device cuda --dropout 0.05 --seconds 2", "model.json"),
}
CPU = "cpu_layers", "cpu_model", "encoder"


def measure(name: str, written: Path | None) -> None:
    command, file = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        if written is None:
            subprocess.run([sys.executable, *shlex.split(command), "--out", folder], cwd=ROOT, check=True)
            written = Path(folder, file)
        document = json.loads(written.read_text())
    document.setdefault("environment", versions())
    if not document["environment"].get("device", "cpu").startswith("cuda"):
        document["environment"]["machine"] = processor()
    document = {"source": {"command": f"python {command}", "commit": commit()}, **document}
    target = ROOT / "docs" / "benchmarks" / f"{name}.json"
    target.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {target.relative_to(ROOT)}")


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "peft", "transformers")}
    return {**packages, "python": platform.python_version()}


def processor() -> str:
    """By the name that Linux has for it."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{named[1] if named else platform.machine()}, {platform.system()}"


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    if changed := git("status", "--porcelain", "--", *MEASURED):
        sys.exit(f"commit first, so that it can be said what was measured:\n{changed}")
    return git("rev-parse", "--short=7", "HEAD")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", choices=("cpu", *COMMANDS))
    parser.add_argument("--from", dest="written", type=Path, metavar="FILE", help="of one name: what was measured")
    options = parser.parse_args()
    names = [name for given in options.names for name in (CPU if given == "cpu" else (given,))]
    if options.written and len(names) != 1:
        parser.error("--from goes with one name")
    commit()
    for name in names:
        measure(name, options.written)


if __name__ == "__main__":
    main()
