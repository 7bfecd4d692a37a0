"""The table of versions: what is kept of a cell, and that one which was not run says so."""

from __future__ import annotations

import json

import pytest

from tests import ROOT
from tests.packaging import versions


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "RECORD", tmp_path / "benchmarks" / "versions.json")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_two.py").write_text("def test_one(): pass\ndef test_mps(): assert 0\n")
    cells = {"here": versions.Cell("3.11", ("torch==2.13.*",), tests=("tests/test_two.py",))}
    cells["far"] = versions.Cell("3.12", ("torch==2.11.*",), "on the GPU machine")
    monkeypatch.setattr(versions, "CELLS", cells)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    return tmp_path


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["versions", *arguments])
    return versions.main()


def test_what_was_run_and_what_was_not(kept, monkeypatch, capsys):
    assert run(monkeypatch, "--here") == 0
    here, far = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert here[0] == "here"
    assert here[-2:] == ["1", "passed"]
    assert far == ["far", "3.12", "2.11.*", "newest", "newest", "not", "run", "on", "the", "GPU", "machine"]
    cells = json.loads(versions.RECORD.read_text())["cells"]
    assert (cells["here"]["status"], "status" in cells["far"]) == (0, False)


def test_a_cell_that_fails(kept, monkeypatch, capsys):
    (kept / "tests" / "test_two.py").write_text("def test_one(): assert 0\n")
    assert run(monkeypatch, "--here", "--cell", "here") == 1
    assert "1 failed" in capsys.readouterr().out.splitlines()[-2]


def test_a_python_that_is_not_there(kept, monkeypatch, capsys):
    monkeypatch.setitem(versions.CELLS, "here", versions.Cell("3.0", ()))
    assert run(monkeypatch) == 1
    assert "not run: no python3.0 on PATH" in capsys.readouterr().out
    assert not versions.RECORD.exists()


def test_the_tests_of_the_table_are_there():
    for cell in versions.CELLS.values():
        assert all((ROOT / test).is_file() for test in cell.tests)
