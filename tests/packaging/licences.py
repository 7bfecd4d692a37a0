"""The licences of what the tests and the examples install, of the packages' own metadata, into docs/licences.md:

pip install -e '.[bases,gemma,docs]' && python -m tests.packaging.licences
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = "torch-fused-lora"
PAGE = ROOT / "docs" / "licences.md"
EXTRAS = {  # each with what those before it have not
    "": "The package itself",
    "peft": "PEFT",
    "examples": "The examples",
    "gemma": "The 4-bit example's model",
    "test": "The tests",
    "conformance": "PEFT's own tests",
    "bases": "The tests of other libraries' bases",
    "docs": "The pages",
}
HEAD = """\
# Licences of what the tests and the examples install

This package is BSD-3-Clause and holds no code of these: packages that pip installs for it and its extras, on Linux with
Python {}. The licences are as each package's metadata says them; `python -m tests.packaging.licences` writes this page.
"""


def own(extra: str) -> list[str]:
    """This package's, as the work tree has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"][extra] if extra else project["dependencies"]


def requirements(name: str, extra: str = "") -> Iterator[Requirement]:
    """What a package wants here, with an extra."""
    wanted: Iterable[str] = own(extra) if name == PROJECT else distribution(name).requires or ()
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def closure(name: str, extra: str = "") -> set[str]:
    """The names of all that is installed for a package with an extra, itself left out."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [(name, extra)]
    while todo:
        package, with_extra = todo.pop()
        for requirement in requirements(package, with_extra):
            child = canonicalize_name(requirement.name)
            found.add(child)
            pairs = {(child, wanted) for wanted in ("", *requirement.extras)} - seen
            seen |= pairs
            todo += pairs
    return found - {name}


def licence(package: Distribution) -> str:
    """As its metadata says it: an expression, classifiers, or the first line of a free text."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [c for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    named = [c.rpartition(" :: ")[2] for c in classifiers if c != "License :: OSI Approved"]
    return ", ".join(named) or (metadata.get("License") or "").strip().partition("\n")[0] or "none in its metadata"


def page() -> str:
    """The text of docs/licences.md. Raises PackageNotFoundError if an extra is not installed."""
    lines, before = [HEAD.format(".".join(map(str, sys.version_info[:2])))], set()
    for extra, title in EXTRAS.items():
        names = closure(PROJECT, extra) - before
        before |= names
        lines += [f"\n## {title}\n", "| package | licence |", "| --- | --- |"]
        lines += [f"| {name} | {licence(distribution(name))} |" for name in sorted(names)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
