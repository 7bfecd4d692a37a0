"""The commands and the packaging."""

from __future__ import annotations

import json
from importlib.resources import files

import torch

import torch_fused_lora as tfl
from torch_fused_lora import doctor
from torch_fused_lora.__main__ import main
from torch_fused_lora.bench import measure


def test_doctor_reports_and_passes(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in ("torch 2", "lora_linear  portable", "float32      ok", "bfloat16     ok", "all is well"):
        assert expected in text


def test_doctor_fails_on_wrong_numbers(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "lora_linear", lambda *a: tfl.lora_linear(*a[:5], 0.5001))
    assert main(["doctor"]) == 1
    assert "float32      FAILED: error" in capsys.readouterr().out


def test_doctor_survives_a_backend_that_raises(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor, "lora_linear", broken)
    assert main(["doctor"]) == 1
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out


def test_bench_writes_table_json_and_plot(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "SMALL", ((4, 16, 8, 2),))
    assert main(["bench", "--device", "cpu", "--shapes", "small", "--seconds", "0", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "4 x 16 x 8, r 2, bf16 + fp32" in text
    assert "geometric mean of the forward tax" in text
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["environment"]["torch"] == torch.__version__
    assert {r["direction"] for r in document["results"]} == {"forward", "forward+backward"}
    for result in document["results"]:
        assert result["rounds"] >= 5
        assert result["patched_tax"]["low"] <= result["patched_tax"]["median"] <= result["patched_tax"]["high"]
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
    assert set(tfl.__all__) == {"LoRALinear", "lora_linear", "patch_peft", "unpatch_peft"}
    assert all(getattr(tfl, name).__doc__ for name in tfl.__all__)
