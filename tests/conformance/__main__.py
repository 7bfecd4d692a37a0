"""Run PEFT's own LoRA tests over patched layers, and what does not pass over PEFT's, too; see README.md."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.emulator.metal_on_cpu.toolchain import cache_folder

HERE = Path(__file__).resolve().parent

TESTS = "tests/test_custom_models.py"
MIN_PASSED = 2500  # of 2,858; fewer, and the selection or the installation is broken
MIN_FUSED_SHARE = 0.95  # of the plain calls
KERNELS = ("lora_decode", "lora_delta", "lora_grad")  # families, each of which PEFT's tests reach


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", dest="workers", default="auto", help="processes of pytest-xdist (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="mps, or the one that PEFT picks here (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for PEFT's sdist (default: %(default)s)")
    options = parser.parse_args()

    root = unpacked_sdist(options.cache.resolve())
    calls_file = root / "calls.json"
    both = ["-n", options.workers, "--device", options.device]
    if options.device == "mps":
        both = ["-p", "on_mps", *both]
    patch = "-p", "patched", "--calls", calls_file
    patched = run_tests(root, root / "patched.json", [TESTS], *both, *patch)
    left = {test: outcome for test, outcome in patched.items() if outcome != "passed"}
    stock = run_tests(root, root / "stock.json", list(left), *both) if left else {}
    counts = json.loads(calls_file.read_text())
    calls = [(kind, fused, test, count) for (kind, fused, test), count in counts["calls"]]
    on_emulator = options.device == "mps" and sys.platform == "linux"  # which counts dispatches
    kernels = {family: dispatched(family, counts["dispatches"]) for family in KERNELS} if on_emulator else {}

    problems = compare(stock, left) + check_passed(patched) + check_share(calls)
    problems += [f"VACUOUS: no {family} was dispatched" for family, count in kernels.items() if not count]
    print(f"\n{root.name} on {options.device}, {len(patched)} tests: {describe(patched)}")
    print(f"  of those left stock: {describe(stock)}\n{failures(patched)}{table(calls)}")
    if on_emulator:
        print("  dispatched:", ", ".join(f"{count} {family}" for family, count in kernels.items()))
    print(*problems or ["OK"], sep="\n")
    return 1 if problems else 0


def unpacked_sdist(cache: Path) -> Path:
    """The source tree of the installed PEFT, whose wheel has no tests: downloaded once, unpacked afresh each time."""
    version = importlib.metadata.version("peft")
    root, archive = cache / f"peft-{version}", cache / f"peft-{version}.tar.gz"
    if not archive.exists():
        # pip builds an sdist's metadata to check its name. Only peft has to be an sdist, not what builds it.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", "--dest", cache]
        subprocess.run([*pip, f"peft=={version}"], check=True)
    shutil.rmtree(root, ignore_errors=True)
    shutil.unpack_archive(archive, cache, filter="data")
    (root / "tests" / "__init__.py").touch()  # left out of the sdist, though the tests import from their package
    return root


def run_tests(root: Path, outcomes: Path, tests: list[str], *options: str | Path) -> dict[str, str]:
    """The outcome of each test of one pytest run: a failure is one, a crash or a run that breaks off is none."""
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--disable-warnings", "--tb=short"]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # the models are tiny
    command = [*pytest, *options, "-p", "outcomes", "--outcomes", outcomes, *tests]
    code = subprocess.run(command, cwd=root, env=env).returncode
    if code not in (0, 1):  # 1: some test failed
        raise SystemExit(f"pytest broke off with exit status {code}")
    return json.loads(outcomes.read_text())


def compare(stock: dict[str, str], patched: dict[str, str]) -> list[str]:
    """A line for each test that did not come to the same."""
    return [
        f"DIFFERENT: {test}: stock {stock.get(test, 'not run')}, patched {patched.get(test, 'not run')}"
        for test in sorted(stock.keys() | patched.keys())
        if stock.get(test) != patched.get(test)
    ]


def check_passed(patched: dict[str, str]) -> list[str]:
    passed = list(patched.values()).count("passed")
    return [f"VACUOUS: {passed} tests passed, expected {MIN_PASSED}"] if passed < MIN_PASSED else []


def check_share(calls: list[tuple[str, bool, str, int]]) -> list[str]:
    """Whether the operator was under test at all: it has to have run in nearly every plain call."""
    plain = sum(count for kind, _, _, count in calls if kind.startswith("plain"))
    left = Counter({test: count for kind, fused, test, count in calls if kind.startswith("plain") and not fused})
    share = 1 - left.total() / plain if plain else 0.0
    if share >= MIN_FUSED_SHARE:
        return []
    tests = ", ".join(f"{test} ({count})" for test, count in left.most_common())
    return [f"VACUOUS: {share:.1%} of the plain calls were fused, expected {MIN_FUSED_SHARE:.0%}; not those of {tests}"]


def dispatched(family: str, dispatches: dict[str, int]) -> int:
    return sum(count for kernel, count in dispatches.items() if kernel.startswith(family))


def describe(outcomes: dict[str, str]) -> str:
    counts = Counter(outcome.split(":")[0] for outcome in outcomes.values())
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))


def failures(outcomes: dict[str, str]) -> str:
    """A line for each reason for which tests failed."""
    counts = Counter(outcome for outcome in outcomes.values() if outcome.startswith("failed"))
    return "".join(f"  {count:>5} {outcome}\n" for outcome, count in counts.most_common())


def table(calls: list[tuple[str, bool, str, int]]) -> str:
    total: Counter[str] = Counter()
    fused: Counter[str] = Counter()
    for kind, ran, _, count in calls:
        total[kind] += count
        fused[kind] += count * ran
    width = max(map(len, total), default=0)
    header = f"  {'forward calls of LoRA Linears':<{width}}  {'calls':>6}  {'fused':>6}"
    return "\n".join([header, *(f"  {kind:<{width}}  {total[kind]:>6}  {fused[kind]:>6}" for kind in sorted(total))])


if __name__ == "__main__":
    sys.exit(main())
