"""What is published: the sdist builds from itself, and each file has the licence and all that it needs, and no more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import torch_fused_lora as tfl
from tests import ROOT
from tests.packaging.fresh import copy_of_the_tree

LICENSE = (ROOT / "LICENSE").read_bytes()


def build(tree: Path, kind: str, out: Path) -> Path:
    """By the build back end, in this environment: nothing is downloaded. The one file that it leaves in ``out``."""
    script = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script, out], cwd=tree, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return build(copy_of_the_tree(folder / "tree"), "sdist", folder / "dist")


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from what the sdist holds."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return build(folder / sdist.name.removesuffix(".tar.gz"), "wheel", folder / "dist")


def contents_of(file: Path) -> dict[str, bytes]:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(file) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}


def modules() -> set[str]:
    package = [path for path in (ROOT / "torch_fused_lora").rglob("*.py") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in package} | {"torch_fused_lora/py.typed"}


def test_the_sdist_holds_what_a_mac_builds_from(sdist):
    assert sdist.name == f"torch_fused_lora-{tfl.__version__}.tar.gz"
    contents = contents_of(sdist)
    sources = {path.relative_to(ROOT).as_posix() for f in ("csrc", "metal") for path in (ROOT / f).rglob("*.*")}
    sources = {name for name in sources if "__pycache__" not in name}
    own = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
    made = {name for name in contents if name.partition("/")[0].endswith(".egg-info")} | {"PKG-INFO", "setup.cfg"}
    assert contents.keys() - made == own | sources | modules()
    assert contents["LICENSE"] == LICENSE


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac builds the wheel of tests/emulator/macos_wheel")
def test_the_wheel_is_the_package(wheel):
    assert wheel.name == f"torch_fused_lora-{tfl.__version__}-py3-none-any.whl"
    contents = contents_of(wheel)
    information = {name for name in contents if ".dist-info/" in name}
    assert contents.keys() - information == modules()
    assert [contents[name] for name in information if name.endswith("/LICENSE")] == [LICENSE]


def test_the_metadata_that_an_index_shows(sdist):
    metadata = HeaderParser().parsestr(contents_of(sdist)["PKG-INFO"].decode())
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Version"] == tfl.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_both_pass_twine(sdist, wheel):
    """As `make dist` asks, with the wheel for a Mac."""
    command = [sys.executable, "-m", "twine", "check", "--strict", sdist, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_changelog_has_this_version():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[:2] == ["Unreleased", tfl.__version__]
