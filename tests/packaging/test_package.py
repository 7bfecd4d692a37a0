"""The commands and the packaging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files

import pytest
import torch

from tests import ROOT
from torch_fused_lora.__main__ import main
from torch_fused_lora.bench import measure
from torch_fused_lora.mps import extension

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a Mac has MPS, and the real one")


def run_python(*arguments: object, **environment: str) -> tuple[int, str]:
    """Exit status and output of a process that knows nothing of conftest's device."""
    clean = {name: value for name, value in os.environ.items() if name != "TORCH_FUSED_LORA_MPS"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@on_linux
def test_runner_gives_a_script_the_emulator(mps, tmp_path):
    (tmp_path / "beside.py").write_text("from torch_fused_lora.mps import extension")
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom beside import extension\nprint(extension.reason, sys.argv[1:])")
    assert run_python("-m", "tests.emulator.mps_on_linux", script, "--steps", 2) == (0, "loaded ['--steps', '2']\n")


def test_bench_writes_table_json_and_plot(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "SMALL", ((4, 16, 8, 2),))
    monkeypatch.setattr(measure, "ROWS", ((3, 16),))
    assert (
        main(["bench", "--device", "cpu", "--shapes", "small", "rows", "--seconds", "0", "--out", str(tmp_path)]) == 0
    )
    text = capsys.readouterr().out
    assert "4 x 16 x 8, r 2, bf16 + fp32" in text
    assert "geometric mean of the forward tax" in text
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["environment"]["torch"] == torch.__version__
    assert {r["direction"] for r in document["results"]} == {"forward", "forward+backward"}
    for result in document["results"]:
        assert result["plan"] == []
        assert result["rounds"] >= 5
        assert result["patched_tax"]["low"] <= result["patched_tax"]["median"] <= result["patched_tax"]["high"]
    assert "rms_norm, 3 x 16, bf16" in text
    assert {(r["case"]["operator"], r["direction"], r["over_module"] is None) for r in document["rows"]} == {
        (operator, direction, operator == "softmax")
        for operator in ("rms_norm", "softmax")
        for direction in ("forward", "forward+backward")
    }
    for cost, mode in zip(document["host_cost"], ("no_grad", "recording"), strict=True):
        assert f"host cost, {mode}: lora_linear" in text
        assert cost["mode"] == mode
        assert cost["lora_linear_us"] > 0 < cost["ratio"]["median"]
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_bench_on_mps_records_how_kernels_were_launched(mps, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "SMALL", ((4, 16, 8, 2),))
    monkeypatch.setattr(measure, "ROWS", ((3, 16),))
    monkeypatch.setattr(measure, "host_cost", lambda *_: measure.HostCost("no_grad", 1, 1, measure.Ratio(1, 1, 1)))
    monkeypatch.setattr(extension, "overrides", "lora_delta.splits=2")
    arguments = "--device", "mps", "--shapes", "small", "rows", "--seconds", "0", "--out", str(tmp_path)
    assert main(["bench", *arguments]) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["environment"]["plan overridden"] == "lora_delta.splits=2"
    launched = {
        (r["case"].get("operator"), r["direction"], *(d["kernel"].partition("_float")[0] for d in r["plan"]))
        for r in document["results"] + document["rows"]
        if r["case"].get("base", r["case"].get("dtype")) == "float32"
    }
    assert launched == {
        (None, "forward", "lora_decode"),
        (None, "forward+backward", "lora_decode", "lora_delta", "lora_grad"),
        ("rms_norm", "forward", "rms_norm"),
        ("rms_norm", "forward+backward", "rms_norm", "rms_norm_backward"),
        ("softmax", "forward", "softmax"),
        ("softmax", "forward+backward", "softmax", "softmax_backward"),
    }
    assert document["results"][0]["plan"][0]["configuration"]["w_rows"] == 1


def test_bytes_saved_for_backward_are_counted_exactly():
    """Over a bfloat16 base stock PEFT keeps a float32 x and h; ours the bfloat16 x, and h."""
    M, K, r = 64, 32, 4
    layers = measure.layers(measure.Case(M, K, 16, r, base="bfloat16"), torch.device("cpu"))
    x = torch.randn(M, K).bfloat16()
    saved = {name: measure.saved_bytes(measure._step(layer, x, "forward+backward")) for name, layer in layers.items()}
    assert saved == {"linear": 0, "peft": 4 * M * K + 4 * M * r, "patched": 2 * M * K + 4 * M * r}


def test_the_package_is_typed():
    assert files("torch_fused_lora").joinpath("py.typed").is_file()
