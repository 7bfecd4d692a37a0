"""The tests of the kernels, tests/kernels/, run twice: on the CPU, noting what each dispatch was given and gave, then
on the GPU, where they judge the same launches against float64, and each dispatch is compared with its note."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import pytest
import torch
from hypothesis import settings

from tests import ROOT
from tests.emulator import metal_on_cpu
from tests.emulator.metal_on_cpu import library as on_cpu
from tests.emulator.metal_on_gpu import library as on_gpu

# Not the lint, which is not of the GPU. Tests in trace mode run as all others.
SELECTION = ["test_metal_kernels.py", "test_quantized_kernels.py", "test_row_kernels.py", "-k", "not lint"]
Note = tuple[str, str, str]  # a dispatch: kernel, digests of its arguments and of what it left in them


def digest(arguments: Sequence[torch.Tensor | bytes | None]) -> str:
    """Of all bits, NaNs of any kind as one."""
    found = hashlib.sha256()
    for value in arguments:
        if isinstance(value, torch.Tensor):
            whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
            same_nans = whole.masked_fill(whole.isnan(), torch.nan) if whole.is_floating_point() else whole
            value = same_nans.view(torch.uint8).numpy().tobytes()
        found.update(b"none" if value is None else value)
    return found.hexdigest()[:16]


class Observer:
    """A plugin of pytest that hands each dispatch's note to ``note``."""

    def __init__(self, kernel_class: type, note: Callable[[str, Note], None]) -> None:
        self.kernel_class, self.note, self.test = kernel_class, note, ""
        self.outcomes: Counter[str] = Counter()

    def run(self, *options: str) -> int:
        """Run the tests; how many failed."""
        dispatch = self.kernel_class.dispatch

        def observed(kernel, *, arguments, trace=False, **others):
            before = digest(arguments)
            report = dispatch(kernel, arguments=arguments, **others)
            self.note(self.test, (kernel.name, before, digest(arguments)))
            return report

        files = [str(ROOT / "tests" / "kernels" / name) if name.endswith(".py") else name for name in SELECTION]
        quiet = ["-q", "--tb=short", "--disable-warnings", "-o", "addopts=", "-p", "no:cacheprovider", "--noconftest"]
        settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
        settings.load_profile("repeatable")  # before the tests are imported
        with mock.patch.object(self.kernel_class, "dispatch", observed):
            pytest.main([*quiet, *files, *options], plugins=[self])
        return self.outcomes["failed"]

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.failed:
            self.outcomes[report.outcome] += 1

    def pytest_runtest_setup(self, item) -> None:
        self.test = item.nodeid.partition("::")[2]
        torch.manual_seed(0)  # as conftest.py does


def record(*options: str) -> tuple[dict[str, list[Note]], set[str]]:
    """Run on the CPU: the notes of each test, and all sources."""
    notes: dict[str, list[Note]] = {}
    sources: set[str] = set()
    compile = metal_on_cpu.compile

    def noted(source: str, *arguments, **options):
        sources.add(source)
        return compile(source, *arguments, **options)

    with mock.patch.object(metal_on_cpu, "compile", noted):
        failed = Observer(on_cpu.Kernel, lambda test, note: notes.setdefault(test, []).append(note)).run(*options)
    assert not failed, "the tests fail on the CPU"
    return notes, sources


def compare(modules: on_gpu.Modules, notes: Mapping[str, Sequence[Note]], *options: str) -> dict[str, Counter[str]]:
    """Run on the GPU: how many tests passed and failed, then of each family how many dispatches left the CPU's bits."""
    done: Counter[str] = Counter()
    found: dict[str, Counter[str]] = {}

    def compared(test: str, note: Note) -> None:
        expected = notes.get(test, ())[done[test] : done[test] + 1]
        done[test] += 1
        same_arguments = [tuple(other[:2]) for other in expected] == [note[:2]]
        result = "same bits" if same_arguments and expected[0][2] == note[2] else "other bits"
        family = on_gpu.family(note[0])
        found.setdefault(family, Counter())[result if same_arguments else "not compared"] += 1

    with mock.patch.object(metal_on_cpu, "compile", modules.compile):
        observer = Observer(on_gpu.Kernel, compared)
        observer.run(*options)
    return {"tests": observer.outcomes, **dict(sorted(found.items()))}
