"""GitHub's workflows, which have not run yet, say what the documents say; and what their steps on a Mac run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

import torch_fused_lora as tfl
from tests import ROOT
from tests.kernels import compile_shaders, kernel_code
from tests.packaging.commands import blocks

CI, RELEASE = (yaml.safe_load((ROOT / ".github" / "workflows" / f"{n}.yml").read_text()) for n in ("ci", "release"))
JOBS = CI["jobs"]
GATES = {"Build from source", "Install the wheel built on Linux", "Compile every kernel source"}
REPORTS = {"Doctor", "Doctor for a program", "Operator tests", "Fine-tune a model"}


def commands(job: str, jobs: dict = JOBS) -> dict[str, dict]:
    return {step["name"]: step for step in jobs[job]["steps"] if "run" in step}


def test_linux_runs_the_tests_of_the_readme():
    text = "".join(block.text for block in blocks("README.md"))
    (tests,) = re.findall("^pip install .*pytest.*$", text, re.MULTILINE)
    assert commands("linux")["Tests"]["run"] == tests


def test_a_mac_runs_the_first_three_commands_for_a_mac():
    names = "Doctor", "Operator tests", "Fine-tune a model"
    for name, block in zip(names, blocks("docs/on_a_mac.md")[:3], strict=True):
        assert block.text.strip() in commands("macos")[name]["run"]


def test_every_file_that_a_command_names_is_there():
    every = [(job, workflow["jobs"]) for workflow in (CI, RELEASE) for job in workflow["jobs"]]
    text = "\n".join(step["run"] for job in every for step in commands(*job).values())
    files, modules = re.findall(r"\b(?:tests|examples)/[\w./{},]+", text), re.findall(r"-m (tests\.[\w.]+)", text)
    assert len(files) >= 4
    assert len(modules) >= 3
    subprocess.run(["bash", "-c", f"ls {' '.join(files)}"], cwd=ROOT, check=True)  # bash, for the braces
    assert all(importlib.util.find_spec(module) for module in modules)


def test_what_needs_no_gpu_is_a_gate_on_a_mac():
    steps = commands("macos")
    assert {name for name, step in steps.items() if "continue-on-error" not in step} == GATES
    assert {name for name, step in steps.items() if step.get("continue-on-error") is True} == REPORTS
    assert "continue-on-error" not in JOBS["macos"]


def test_a_pipe_keeps_the_status_of_its_command():
    for workflow in (CI, RELEASE):
        assert workflow["defaults"]["run"]["shell"] == "bash"  # GitHub gives it pipefail only where it is named


def test_a_release_is_what_make_dist_makes():
    """Built and installed as CI does; published by a job that does nothing else, after a Mac has loaded the wheel."""
    jobs = RELEASE["jobs"]
    build, dist = commands("build", jobs), (ROOT / "Makefile").read_text().partition("\ndist:")[2].partition("\n\n")[0]
    assert build["Build"]["run"].startswith("make dist && ")
    assert all(command in dist for command in ("python -m build", "$(MAKE) wheel", "twine check --strict"))
    assert build["Install"] == commands("for-macos")["Install"]
    assert JOBS["macos"]["env"]["LOAD"] in commands("macos", jobs)["Load the wheel"]["run"]
    assert jobs["publish"]["needs"] == ["build", "macos"]
    assert not commands("publish", jobs)


def test_a_release_keeps_no_secret():
    """Trusted publishing: one job, of an environment of its own, may ask for a token; nothing else may."""
    jobs = RELEASE["jobs"]
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "environment" in jobs["publish"]
    assert CI["permissions"] == RELEASE["permissions"] == {"contents": "read"}
    assert "secrets" not in str(RELEASE)


def test_a_release_is_of_the_tagged_version():
    tags = RELEASE[True]["push"]["tags"]  # YAML's `on`
    assert tags == ["v*"]
    check = commands("build", RELEASE["jobs"])["The tag is the version"]["run"]
    for tag, expected in ((f"v{tfl.__version__}", 0), ("v0.0.1", 1)):
        environment = os.environ | {"GITHUB_REF_NAME": tag, "PYTHONPATH": str(ROOT)}
        assert subprocess.run(["bash", "-c", check], cwd=ROOT, env=environment).returncode == expected


def compiler(source: str) -> None:
    """In torch.mps.compile_shader's place."""
    if "= undeclared;" in source:
        raise SyntaxError("use of undeclared identifier 'undeclared'")


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """Two kernels' sources as kernel_code.py writes them, and a compiler."""
    monkeypatch.setattr(torch.mps, "compile_shader", compiler)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "a Mac's GPU")
    launches = kernel_code.variants()
    two = {name: launches[name] for name in ("softmax_bfloat_8_1_looped_any", "sum_splits_half")}
    kernel_code.write_sources(two, tmp_path)
    assert {path.stem: path.read_bytes() for path in tmp_path.iterdir()} == {k: v.source for k, v in two.items()}
    return tmp_path


def compile_folder(folder: Path) -> int:
    return compile_shaders.compile_all(sorted(folder.glob("*.metal")))


def test_sources_that_compile(mac, capsys):
    assert compile_folder(mac) == 0
    assert "2 sources, 0 refused, " in capsys.readouterr().out


def test_a_source_that_is_refused(mac, capsys):
    with (mac / "sum_splits_half.metal").open("a") as source:
        source.write("\nkernel void k(device float* y [[buffer(0)]]) { *y = undeclared; }\n")
    assert compile_folder(mac) == 1
    text = capsys.readouterr().out
    assert "sum_splits_half: refused\nuse of undeclared identifier 'undeclared'\n" in text
    assert "2 sources, 1 refused, " in text


@pytest.mark.parametrize(
    ("module", "name", "function", "reason"),
    [
        (torch.mps, "compile_shader", lambda source: None, "nothing is compiled here"),
        (torch.backends.mps, "is_available", lambda: False, "no device mps to compile for"),
    ],
)
def test_nothing_counts_as_compiled_where_nothing_can_be(mac, monkeypatch, module, name, function, reason):
    monkeypatch.setattr(module, name, function)
    with pytest.raises(SystemExit, match=reason):
        compile_folder(mac)


def test_an_empty_folder_is_no_success(tmp_path):
    with pytest.raises(SystemExit, match=r"no \.metal file"):
        compile_folder(tmp_path)
