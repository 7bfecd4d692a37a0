"""Metal kernels on an NVIDIA GPU: `build` on a machine with clang, `run` on one with the GPU. See README.md."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def wrong(found: Mapping[str, Any]) -> list[str]:
    """What should not be in the results."""
    texts = []
    for name, counted in found.get("tests", {}).items():
        # exp is another one than the CPU's: softmax is held to float64 alone.
        allowed = {"passed", "same bits", "not compared"} | ({"other bits"} if name.startswith("softmax") else set())
        texts += [f"{name}: {count} {what}" for what, count in counted.items() if what not in allowed]
    if attempts := found.get("faults"):
        reports = [report for report in found["compute-sanitizer"].values() if "faults" in report]
        seen = {fault for report in reports for fault in report["faults"]}
        texts += [f"not found: {name}" for name in attempts.keys() - seen if not (attempts[name] or "clean" in name)]
        texts += [f"{name}: {text}" for name, text in attempts.items() if "clean" in name and text]
        texts += [f"compute-sanitizer: {name}" for report in reports for name in report["clean kernels"]]
    for case in (case for part in ("times", "packed") for case in found.get(part, {}).get("cases", ())):
        if not case["relative_error"] < 1e-3:  # half rounds to 2.1e-4
            texts.append(f"{case['kernel']}, {case['shape']}: off by {case['relative_error']}")
    return texts


def run(folder: Path, results: Path, parts: list[str]) -> int:
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
    if "packed" in parts:
        found["packed"] = times.measure(modules, times.PACKED_CASES)
        print(times.table(found["packed"]))
    if found:
        (results / "metal_on_gpu.json").write_text(json.dumps(found) + "\n")
    print(*(texts := wrong(found)), sep="\n")
    return 1 if texts else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator.metal_on_gpu", description=__doc__)
    parser.add_argument("command", choices=["build", "run"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what build writes and run reads")
    parser.add_argument("--results", type=Path, default=FOLDER, help="where run leaves metal_on_gpu.json")
    parser.add_argument("--parts", nargs="+", default=["tests", "faults", "times", "packed"])
    options = parser.parse_args()
    if options.command == "run":
        return run(options.folder, options.results, options.parts)
    build(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
