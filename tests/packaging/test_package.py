"""The commands and the packaging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from tests import ROOT
from torch_fused_lora.__main__ import main
from torch_fused_lora.bench import measure, model
from torch_fused_lora.bench.formats import held
from torch_fused_lora.mps import extension
from torch_fused_lora.originals import Patched

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a Mac has MPS, and the real one")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")


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


def test_bench_compares_two_files(capsys, tmp_path):
    """Of kinds that do not match nothing is said."""

    def document(card, forward, wall):
        def ratio(median):
            return {"median": median, "low": median - 0.05, "high": median + 0.05}

        case = {"M": 4, "dropout": 0.0}
        return {
            "environment": {"device": card, "torch": "2.11.0"},
            "results": [
                {"case": case, "direction": "forward", "linear_ms": 1.0, "patched_tax": ratio(forward)},
                {"case": case, "compared": {"wall_ms": {"floor": 3.0, "over_stock": {"patched": ratio(wall)}}}},
            ],
        }

    documents = document("H100", 1.2, 0.9), document("H200", 1.5, 0.92), document("H100", 1, 1) | {"results": []}
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, content in zip(paths, documents, strict=True):
        path.write_text(json.dumps(content))
    assert main(["bench", "--compare", *map(str, paths[:2])]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["device:", "H100", "|", "H200"], ["torch:", "2.11.0"]]
    assert ["4", "0.0", "forward", "patched_tax", "1.200", "1.500", "1.25"] in lines
    assert ["4", "0.0", "compared", "wall_ms", "over_stock", "patched", "0.900", "0.920", "1.02"] in lines
    assert main(["bench", "--compare", *map(str, paths[1:])]) == 1


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
        (None, "forward+backward", "lora_decode", "lora_delta", "lora_delta", "lora_grad"),
        ("rms_norm", "forward", "rms_norm"),
        ("rms_norm", "forward+backward", "rms_norm", "rms_norm_backward"),
        ("softmax", "forward", "softmax"),
        ("softmax", "forward+backward", "softmax", "softmax_backward"),
    }
    assert document["results"][0]["plan"][0]["configuration"]["dispatches"] in (1, 2)


TINY = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16) | {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_bench_of_a_model_writes_table_and_json(device, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(model.SIZES, "small", TINY)
    arguments = "--device", str(device), "--batches", "2x3", "--rank", "2", "--seconds", "0"
    assert main(["bench", "--model", *arguments, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    document = json.loads((tmp_path / "model.json").read_text())
    assert document["environment"]["torch"] == torch.__version__
    attention, mlp, norms = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 16, 3 * 16
    assert document["model"] == TINY | {
        "name": "small",
        "dtype": "bfloat16",
        "format": "",
        "parameters": attention + mlp + norms + 2 * 16 * 16,  # the embeddings and the head
    }
    assert [tuple(result["case"].values()) for result in document["results"]] == [
        (2, 3, 2, adapters, dropout) for adapters in ("bfloat16", "float32") for dropout in (0, 0.05)
    ]
    assert "2 x 3, bf16, dropout 0 " in text
    for result in document["results"]:
        assert result["rounds"] >= 5
        wall = result["compared"].pop("wall_ms")
        assert not result["compared"]  # what only CUDA gives
        assert list(wall["over_floor"]) == ["stock", "patched", "patched+norms"]
        assert list(wall["over_stock"]) == ["patched", "patched+norms"]
        for ratio in (*wall["over_floor"].values(), *wall["over_stock"].values()):
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
            assert str(measure.Ratio(**ratio)) in text


def test_models_of_the_bench_share_tensors_and_compute_the_same(device, monkeypatch):
    """All but the floor, whose adapters are not there; only what a variant is named for is patched."""
    monkeypatch.setitem(model.SIZES, "small", TINY)
    base = model.build("small", device)
    variants = model.variants((base, base), model.ModelCase(1, 4, 2, "float32", 0.0))
    tensors = {name: {id(p) for p in variant.parameters()} for name, variant in variants.items()}
    assert tensors["floor"] < tensors["stock"] == tensors["patched"] == tensors["patched+norms"]
    trained = [p.dtype for p in variants["patched"].parameters() if p.requires_grad]
    assert trained == [torch.float32] * 2 * 7  # lora_A and lora_B of seven layers
    patched = {
        name: {module._patched_name.split(".")[-1] for module in variant.modules() if isinstance(module, Patched)}
        for name, variant in variants.items()
    }
    linear = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert patched == {
        "floor": set(),
        "stock": set(),
        "patched": linear,
        "patched+norms": linear | {"input_layernorm", "post_attention_layernorm", "norm"},
    }

    labels = torch.tensor([[3, 1, 4, 1]], device=device)
    embeddings = base.get_input_embeddings()(labels).detach().requires_grad_()
    logits = {name: variant(inputs_embeds=embeddings).logits.float().cpu() for name, variant in variants.items()}
    torch.testing.assert_close(logits["patched"], logits["stock"], rtol=0.05, atol=0.005)
    torch.testing.assert_close(logits["patched+norms"], logits["stock"], rtol=0.05, atol=0.005)
    assert (logits["floor"] - logits["stock"]).abs().max() > 0.1
    for variant in variants.values():
        assert model._step(variant, embeddings, labels)().isfinite()
        assert all(tensor.grad is None for tensor in (embeddings, *variant.parameters()))


@pytest.mark.parametrize("format", ["4bit", "called", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_a_model_of_the_bench_over_another_format(format, monkeypatch):
    """The base without adapters is as it was, embeddings and head are shared; ours computes what stock PEFT does."""
    monkeypatch.setitem(model.SIZES, "small", TINY | dict.fromkeys(("hidden_size", "intermediate_size"), 64))
    base = model.build("small", torch.device("cpu"))
    under = held(model._sharing(base), format)
    kept = {id(p) for p in (base.lm_head.weight, base.get_input_embeddings().weight)}
    assert kept <= {id(p) for p in under.parameters()}
    named = {"4bit": "QuantLinear", "called": "Called", "nf4": "Linear4bit"}
    assert {type(module).__name__ for module in under.modules() if isinstance(module, nn.Linear)} == {
        named[format],
        "Linear",  # the head
    }
    assert {type(module) for module in base.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    variants = model.variants((base, under), model.ModelCase(1, 4, 2, "float32", 0.0))
    embeddings = torch.randn(1, 4, 64, dtype=torch.bfloat16)
    logits = {name: variant(inputs_embeds=embeddings).logits.float() for name, variant in variants.items()}
    torch.testing.assert_close(logits["patched"], logits["stock"], rtol=0.05, atol=0.01)


def test_bench_of_a_base_that_is_called(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "CALLED", [measure.Case(4, 64, 8, 2, format="called")])
    arguments = "--device", "cpu", "--shapes", "called", "--seconds", "0", "--out", str(tmp_path)
    assert main(["bench", *arguments]) == 0
    assert "4 x 64 x 8, r 2, fp32, called" in capsys.readouterr().out


def test_bench_says_that_bitsandbytes_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("torch_fused_lora.__main__.find_spec", lambda name: None)
    for arguments in (["--shapes", "packed"], ["--model", "--format", "nf4"]):
        with pytest.raises(SystemExit):
            main(["bench", *arguments])
        assert "pip install bitsandbytes" in capsys.readouterr().err


def test_ratios_of_a_model_are_of_the_same_round():
    samples = {"patched": [9.0, 3.0], "floor": [3.0, 1.0], "stock": [6.0, 4.0], "patched+norms": [3.0, 1.0]}
    found = model.Compared.of(samples, 1e-3)
    assert found.floor == 2000
    assert {name: ratio.median for name, ratio in found.over_floor.items()} == {
        "stock": 3,
        "patched": 3,
        "patched+norms": 1,
    }
    assert {name: ratio.median for name, ratio in found.over_stock.items()} == {
        "patched": 1.125,
        "patched+norms": 0.375,
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_bench_of_a_model_on_cudahas_kernels_and_memory(monkeypatch):
    monkeypatch.setitem(model.SIZES, "small", TINY | dict.fromkeys(("hidden_size", "intermediate_size"), 256))
    base = model.build("small", torch.device("cuda"))
    bases = base, base
    result = model.counted(bases, model.timed(bases, model.ModelCase(4, 512, 8, "float32", 0.0), 0))
    assert list(result.compared) == ["wall_ms", "kernels_ms", "peak_MiB"]
    assert 0 < result.compared["kernels_ms"].floor < result.compared["wall_ms"].floor
    assert result.compared["peak_MiB"].floor > 4 * 512 * 256 * 2 / 2**20  # one activation
    assert result.compared["peak_MiB"].over_stock["patched"].median < 1


@pytest.mark.parametrize("package", ["peft", "transformers", "rich"])
def test_bench_of_a_model_names_the_extra_that_is_missing(package, capsys, monkeypatch):
    for module in ("measure", "model", "report"):
        monkeypatch.delitem(sys.modules, f"torch_fused_lora.bench.{module}", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["bench", "--model"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert package in error
    assert error.endswith("pip install 'torch-fused-lora[bench]'\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rank", "4"], "--batches, --rank, --dropout and --format go with --model"),
        (["--model", "--shapes", "small"], "not allowed with argument"),
        (["--model", "7B"], "invalid choice: '7B'"),
        (["--model", "--batches", "4"], "expected LINESxTOKENS, such as 4x1024, got '4'"),
    ],
)
def test_bench_refuses_options_that_do_not_fit(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--device", "none", *arguments])  # were they not refused, no bench would run
    assert expected in capsys.readouterr().err


def test_bytes_saved_for_backward_are_counted_exactly():
    """Over a bfloat16 base stock PEFT keeps a float32 x and h; ours the bfloat16 x, and h."""
    M, K, r = 64, 32, 4
    layers = measure.layers(measure.Case(M, K, 16, r, base="bfloat16"), torch.device("cpu"))
    x = torch.randn(M, K).bfloat16()
    saved = {name: measure.saved_bytes(measure._step(layer, x, "forward+backward")) for name, layer in layers.items()}
    assert saved == {"linear": 0, "peft": 4 * M * K + 4 * M * r, "patched": 2 * M * K + 4 * M * r}


def test_the_package_is_typed():
    assert files("torch_fused_lora").joinpath("py.typed").is_file()
