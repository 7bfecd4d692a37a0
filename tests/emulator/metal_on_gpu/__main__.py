"""Metal kernels on an NVIDIA GPU: `build` on a machine with clang, `run` on one with the GPU. See README.md."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import ROOT
from tests.emulator.metal_on_gpu import faults, kernel_tests, library, ptx, times
from tests.kernels import launch_plan

FOLDER = ROOT / "out" / "metal_on_gpu"
CORES = 132, 40  # for which launches are planned: an H100 or H200, a large Apple GPU


def build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    notes, tested = kernel_tests.record()
    timed = times.sources(CORES)
    wanted = [(source, "exact") for source in sorted(tested | faults.sources())]
    wanted += [(source, variant) for source in sorted(timed) for variant in ("fast", "fma")]
    with ThreadPoolExecutor() as pool:
        modules = list(pool.map(lambda item: (*item, ptx.build(item[0], variant=item[1])), wanted))
    library.write(folder / "modules.zip", modules)
    (folder / "notes.json").write_text(json.dumps(notes))
    shutil.copy(launch_plan.build(), folder / "launch_plan.so")
    print(f"{len(modules)} modules, {sum(map(len, notes.values()))} dispatches on the CPU, in {folder}")


def run(folder: Path, results: Path, parts: list[str]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    launch_plan.library = functools.partial(launch_plan.library, folder / "launch_plan.so")
    modules = library.Modules(folder / "modules.zip")
    found: dict[str, object] = {}
    if "sanitized" in parts:  # by compute-sanitizer, which reports elsewhere
        faults.run_all(modules, guard=0)
    if "tests" in parts:
        found["tests"] = kernel_tests.compare(modules, json.loads((folder / "notes.json").read_text()))
    if "faults" in parts:
        found["faults"] = faults.run_all(modules)
        command = ["-m", "tests.emulator.metal_on_gpu", "run", "--folder", str(folder), "--parts", "sanitized"]
        found["compute-sanitizer"] = faults.sanitize(command, results)
    for name, value in found.items():
        print(f"== {name}", *(f"{key}: {value[key]}" for key in value), sep="\n")
    if "times" in parts:
        found["times"] = times.measure(modules)
        found["registers and local bytes of a thread"] = modules.registers()
        print(times.table(found["times"]))
    if found:
        (results / "metal_on_gpu.json").write_text(json.dumps(found) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator.metal_on_gpu", description=__doc__)
    parser.add_argument("command", choices=["build", "run"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what build writes and run reads")
    parser.add_argument("--results", type=Path, default=FOLDER, help="where run leaves metal_on_gpu.json")
    parser.add_argument("--parts", nargs="+", default=["tests", "faults", "times"])
    options = parser.parse_args()
    if options.command == "build":
        build(options.folder)
    else:
        run(options.folder, options.results, options.parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
