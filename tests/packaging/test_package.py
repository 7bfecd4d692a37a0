"""The commands and the packaging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files

import pytest
import torch

import torch_fused_lora as tfl
from tests import ROOT
from torch_fused_lora.__main__ import main
from torch_fused_lora.bench import measure

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


def test_bytes_saved_for_backward_are_counted_exactly():
    """Over a bfloat16 base stock PEFT keeps a float32 x and h; ours the bfloat16 x and h, and a float32 scaling."""
    M, K, r = 64, 32, 4
    layers = measure.layers(measure.Case(M, K, 16, r, base="bfloat16"), torch.device("cpu"))
    x = torch.randn(M, K).bfloat16()
    saved = {name: measure.saved_bytes(measure._step(layer, x, "forward+backward")) for name, layer in layers.items()}
    assert saved == {"linear": 0, "peft": 4 * M * K + 4 * M * r, "patched": 2 * M * K + 4 * M * r + 4}


def test_the_package_is_typed():
    assert files("torch_fused_lora").joinpath("py.typed").is_file()


def test_public_names():
    patches = {"patch_norms", "patch_peft", "unpatch_norms", "unpatch_peft"}
    assert set(tfl.__all__) == {"LoRALinear", "keep_operators", "lora_linear", "rms_norm", "softmax", *patches}
    assert all(getattr(tfl, name).__doc__ for name in tfl.__all__)
