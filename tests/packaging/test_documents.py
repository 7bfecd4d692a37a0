"""The pages: every public name is explained, and no number stands there that its data does not have."""

from __future__ import annotations

import json
import re

import pytest

import torch_fused_lora
from docs import pictures, write_numbers
from tests import ROOT


def test_every_public_name_is_on_the_page_of_the_interface():
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(torch_fused_lora.__all__) <= set(re.findall(r"\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE))


@pytest.mark.parametrize("page", write_numbers.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_numbers_are_their_data_s(page):
    assert write_numbers.written(page.read_text()) == page.read_text(), "make numbers"


def test_every_file_of_numbers_says_where_it_comes_from():
    for path in write_numbers.DATA.glob("*.json"):
        document = json.loads(path.read_text())
        if path.stem == "earlier":
            assert all({"machine", "commit"} <= result.keys() for result in document["results"])
        elif path.stem not in ("counted", "time_model"):  # no clock was read for these
            assert {"command", "commit"} <= document["source"].keys(), path
            assert document["environment"]["torch"], path
            assert f":{path.stem} -->" in "".join(page.read_text() for page in write_numbers.PAGES), path


def test_no_time_stands_outside_of_the_blocks():
    for page in write_numbers.PAGES:
        rest = write_numbers.BLOCK.sub("", page.read_text())
        assert not re.findall(r"\d (?:ms|us|µs|tokens/s|GB/s)\b", rest), page


DOCUMENTS = sorted({*write_numbers.PAGES, *ROOT.glob("*.md"), *ROOT.glob("tests/**/README.md")})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(document):
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", document.read_text()):
        file, _, heading = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, target


def test_a_number_that_somebody_edits_is_noticed():
    readme = (ROOT / "README.md").read_text()
    block = write_numbers.BLOCK.search(readme)
    edited = readme[: block.start(3)] + re.sub(r"\d", "7", block[3]) + readme[block.end(3) :]
    assert edited != readme == write_numbers.written(edited)


def test_what_was_not_measured_stays_open():
    assert write_numbers.verdict([]) == "*unmeasured*"
    assert write_numbers.ratio(None) == "–"


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([0.8], "faster 0.80"),
        ([0.98, 1.02], "same 1.00 (0.98–1.02)"),
        ([0.9, 1.6], "**slower** 1.20 (0.90–1.60)"),
    ],
)
def test_verdicts(ratios, words):
    assert write_numbers.verdict(ratios) == words


def test_a_picture_is_drawn_anew_when_its_data_changes(tmp_path, monkeypatch):
    before = pictures.digest(pictures.kept)
    monkeypatch.setattr(pictures, "DATA", tmp_path)
    (tmp_path / "counted.json").write_text("{}")
    assert pictures.digest(pictures.kept) != before


@pytest.mark.parametrize("function", pictures.FIGURES, ids=lambda function: function.__name__)
def test_every_picture_is_up_to_date_and_small(function):
    text = (pictures.PICTURES / f"{function.__name__}.svg").read_text()
    assert pictures.digest(function) in text, "make numbers"
    assert len(text) < 100_000
