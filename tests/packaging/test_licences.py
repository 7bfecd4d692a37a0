"""docs/licences.md names everything that an extra asks for, with the licence that the package says it has."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging import licences

ROWS = dict(re.findall(r"^\| (\S+) \| (.+) \|$", licences.PAGE.read_text(), re.MULTILINE))


@pytest.mark.parametrize("extra", licences.EXTRAS)
def test_what_is_asked_for_is_named(extra):
    asked = {canonicalize_name(Requirement(line).name) for line in licences.own(extra)}
    assert asked - {licences.PROJECT} <= ROWS.keys()


def test_what_is_pinned_has_the_licence_of_its_metadata():
    """Of the others another release may say it in other words."""
    lines = {line for extra in ("examples", "test") for line in licences.own(extra) if "==" in line.partition(";")[0]}
    names = {Requirement(line).name for line in lines}
    assert len(names) >= 4
    for name in names:
        assert ROWS[name] == licences.licence(importlib.metadata.distribution(name))


class Package(importlib.metadata.Distribution):
    def __init__(self, text: str) -> None:
        self.text = text

    def read_text(self, filename):
        return self.text if filename == "METADATA" else None

    def locate_file(self, path):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("License-Expression: MIT\nLicense: other", "MIT"),
        ("Classifier: License :: OSI Approved\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("Classifier: Typing :: Typed\nLicense: BSD\n text", "BSD"),
        ("Name: a", "none in its metadata"),
    ],
)
def test_where_metadata_says_it(metadata, expected):
    assert licences.licence(Package(metadata)) == expected


def test_packages_are_found_through_extras(monkeypatch):
    wants = {
        ("a", ""): ["b"],
        ("a", "x"): ["b", "c[y]", "a[z]"],
        ("a", "z"): ["e"],
        ("c", "y"): ["d"],
        ("d", ""): ["b"],
    }
    monkeypatch.setattr(licences, "requirements", lambda n, e="": map(Requirement, wants.get((n, e), ())))
    assert licences.closure("a") == {"b"}
    assert licences.closure("a", "x") == {"b", "c", "d", "e"}
