"""Pytest plugin: of PEFT's tests, run those that concern LoRA, on ``--device``, and write what came of each to
``--outcomes FILE``."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig
from peft.utils import infer_device

outcomes: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True)
    parser.addoption("--device", required=True, help="on which PEFT's tests have to run")


def pytest_configure(config: pytest.Config) -> None:
    if (device := infer_device()) != config.getoption("--device"):
        raise pytest.UsageError(f"PEFT's tests would run on {device} here: --device {device}")


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
    """A test is reported on after setup, call and teardown; the first of them that did not pass is its outcome. What
    fails in both runs has to fail for the same reason."""
    if not hasattr(report.longrepr, "reprcrash") and report.failed:
        pytest.exit(report.longreprtext, returncode=3)  # xdist: a process crashed in this test
    if outcomes.get(report.nodeid, "passed") == "passed":
        reason = f": {report.longrepr.reprcrash.message.splitlines()[0]}" if report.failed else ""
        outcomes[report.nodeid] = report.outcome + reason


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # of xdist's processes, the controller sees every report
        session.config.getoption("--outcomes").write_text(json.dumps(outcomes, indent=1, sort_keys=True))
