"""Pytest plugin: of PEFT's tests, run those that concern LoRA, and write what came of each to ``--outcomes FILE``."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig

outcomes: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop what is parametrised with another method's config. What names no config is mostly LoRA, and cheap."""
    items[:] = [item for item in items if _parameters(item).get("config_cls", LoraConfig) is LoraConfig]


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Seed every test, so that two runs differ in nothing but the layers; skip one that wants to download a model."""
    torch.manual_seed(0)
    try:
        return (yield)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            pytest.skip("needs a model from the Hub")
        raise


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test is reported on after setup, call and teardown; the first of them that did not pass is its outcome."""
    if outcomes.get(report.nodeid, "passed") == "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # of xdist's processes, the controller sees every report
        session.config.getoption("--outcomes").write_text(json.dumps(outcomes, indent=1, sort_keys=True))
