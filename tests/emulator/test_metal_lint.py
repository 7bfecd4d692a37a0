"""Each rule of the Metal lint finds its mistakes, on their lines, and nothing in the repaired text.

The cases stand in metal_lint_cases.txt. All mistakes are linted as one source, each in a namespace, and so are
all repairs: one run of clang for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT
from tests.emulator.metal_on_cpu.lint import METAL_NAMES, RULES, lint, metal_names, outside_namespaces
from tests.kernels.launch_plan import assemble

HEADER = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"


class Case(NamedTuple):
    """``wrong`` breaks ``rule`` on its lines that end in ``// !`` and no other rule; ``right`` breaks none."""

    rule: str
    what: str
    wrong: str
    right: str


CASES = [
    Case(*match)
    for match in re.findall(
        r"^### (\S+): ([^\n]+)\n(.*?)\n--- repaired\n(.*?)\n(?=\n###|\Z)",
        Path(__file__).with_name("metal_lint_cases.txt").read_text(),
        re.MULTILINE | re.DOTALL,
    )
]


def lint_all(texts: list[str]) -> dict[int, set[tuple[int, str]]]:
    """(line in the text, rule) of every diagnostic, by the index of the text it fell on."""
    source, owner = HEADER, {}
    for index, text in enumerate(texts):
        body = f"namespace case_{index} {{\n{text}\n}}\n"
        start = source.count("\n")
        owner |= {start + offset: (index, offset - 1) for offset in range(1, body.count("\n") + 1)}
        source += body
    found = defaultdict(set)
    for diagnostic in lint(source):
        index, line = owner[diagnostic.line]
        found[index].add((line, diagnostic.rule))
    return found


@pytest.fixture(scope="module")
def mistakes() -> dict[int, set[tuple[int, str]]]:
    return lint_all([case.wrong for case in CASES])


@pytest.fixture(scope="module")
def repairs() -> dict[int, set[tuple[int, str]]]:
    return lint_all([case.right for case in CASES])


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{case.rule}: {case.what}" for case in CASES])
def test_rule(index: int, mistakes: dict, repairs: dict) -> None:
    case = CASES[index]
    marked = {(line, case.rule) for line, text in enumerate(case.wrong.split("\n"), 1) if text.endswith("// !")}
    assert marked
    assert mistakes[index] == marked
    assert repairs[index] == set()


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(RULES)


def test_names_are_sorted_and_cover_every_kind() -> None:
    lines = [line for line in METAL_NAMES.read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines)
    assert metal_names()["matrix"] == {"metal"}
    assert metal_names()["INFINITY"] == {"macro"}
    assert metal_names()["threadgroup"] == {"keyword"}
    assert "metal" not in metal_names()["nearest"]


IN_A_NAMESPACE = """
namespace tfl {
using namespace metal;
constant int n = 1;
template <int m> [[kernel]] void k(device float* y) { *y = m + n; }
}
template [[host_name("k")]] [[kernel]] decltype(tfl::k<2>) tfl::k<2>;
"""


def test_outside_namespaces() -> None:
    outside = "struct S {};\n[[kernel]] void other(device float* y) { *y = 1; }\nusing T = S;\n"
    assert outside_namespaces(HEADER + IN_A_NAMESPACE) == []
    assert [name for _, name in outside_namespaces(HEADER + IN_A_NAMESPACE + outside)] == ["S", "other", "T"]


@pytest.mark.parametrize("family", sorted((ROOT / "metal").glob("*.metal")), ids=lambda path: path.stem)
def test_our_kernels_stand_in_a_namespace(family: Path) -> None:
    """What a later Metal declares cannot collide with them."""
    assert outside_namespaces(assemble(family)) == []
