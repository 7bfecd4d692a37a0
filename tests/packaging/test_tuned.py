"""The file of tuned configurations: what of it is used, what is not, and the command that writes it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.emulator.metal_on_cpu.toolchain import cache_folder
from tests.packaging.test_package import run_python
from torch_fused_lora import doctor, plan, tuned
from torch_fused_lora.__main__ import main
from torch_fused_lora.bench import tune
from torch_fused_lora.mps import extension
from torch_fused_lora.tuned import Layer, Table

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the emulated mps")
LAYER = Layer(False, 64, 256, 128, 8, "float16", "float32")
TEXT = "lora_delta.splits=2"


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TORCH_FUSED_LORA_CACHE", str(cache_folder()))  # the emulator's, which is minutes of compiling
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def load(device: str = "Apple M1", cores: int = 8, accept=lambda layer, text: None) -> Table:
    return Table.load(device, cores, accept)


def save(entries: dict[Layer, str], **machine) -> Table:
    table = load(**machine)
    table.entries = entries
    table.save()
    return table


def test_what_is_saved_is_loaded(cache):
    saved = save({LAYER: TEXT})
    assert saved.path.parent == cache / "torch_fused_lora"
    accepted = []
    found = load(accept=lambda *entry: accepted.append(entry))
    assert found.entries == {LAYER: TEXT}
    assert accepted == [(LAYER, TEXT)]
    assert str(found) == f"1 layers as {saved.path} says"
    for other in ({"device": "Apple M2"}, {"cores": 10}):
        assert load(**other).entries == {}
        assert load(**other).trouble == ""


@pytest.mark.parametrize("module", ["version", "torch"])
def test_another_version_starts_anew(module, monkeypatch):
    save({LAYER: TEXT})
    monkeypatch.setattr(*{"version": (tuned, "__version__", "9"), "torch": (torch, "__version__", "9.0")}[module])
    assert load().entries == {}


def test_the_folder_is_the_systems(monkeypatch):
    assert str(tuned.cache_folder()) == os.environ["XDG_CACHE_HOME"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    for system, folder in (("Darwin", "Library/Caches"), ("Linux", ".cache")):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        assert tuned.cache_folder() == Path.home() / folder
        monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")  # which nobody can mean: it would go with the current folder
        assert tuned.cache_folder() == Path.home() / folder


def test_without_a_home_there_are_the_defaults(monkeypatch):
    """A container may run as a user that its system does not know."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(RuntimeError):
        Path.home()
    table = load()
    assert (table.entries, table.trouble) == ({}, "")
    with pytest.raises(OSError, match="Not a directory"):
        table.save()


@pytest.mark.parametrize("whole", [b"", b"\xff\xfe", b"{", b"[]", b"null", b"3", b'{"machine": 1}', b"[" * 100_000])
def test_a_corrupt_file_is_left_out_with_one_warning(whole):
    path = save({LAYER: TEXT}).path
    path.write_bytes(whole)
    with pytest.warns(UserWarning, match="is not used where it is wrong") as caught:
        found = load()
    assert len(caught) == 1
    assert found.entries == {}
    assert str(path) in str(found)


def test_a_foreign_file_is_left_out():
    """Copied from another machine, under this one's name."""
    path, foreign = load().path, save({LAYER: TEXT}, device="Apple M4", cores=40).path
    foreign.rename(path)
    with pytest.warns(UserWarning, match="it was tuned on .*Apple M4.*, and this is .*Apple M1"):
        assert load().entries == {}


@pytest.mark.parametrize(
    "change",
    [
        {0: 1},
        {0: None},
        {1: 100},
        {1: 0},
        {1: -64},
        {1: 64.0},
        {1: True},
        {2: 2**64},
        {3: "128"},
        {4: None},
        {7: 3},
        {7: ""},
        {7: None},
        {7: f"{TEXT}\0,threads=3"},
        {5: ["float16"]},
        {6: {}},
    ],
)
def test_an_edited_entry_is_left_out_alone(change):
    path = save({LAYER: TEXT, LAYER._replace(M=8): TEXT}).path
    document = json.loads(path.read_text())
    assert document["entries"][1] == [*LAYER, TEXT]
    for place, value in change.items():
        document["entries"][1][place] = value
    path.write_text(json.dumps(document))
    with pytest.warns(UserWarning, match="is no entry"):
        assert load().entries == {LAYER._replace(M=8): TEXT}


@pytest.mark.parametrize("entry", [None, 3, "text", [], [1], {"M": 64}, [*LAYER], [*LAYER, TEXT, TEXT]])
def test_an_entry_of_another_kind_is_left_out_alone(entry):
    path = save({LAYER: TEXT}).path
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"entries": [entry, *document["entries"]]}))
    with pytest.warns(UserWarning, match="is no entry"):
        assert load().entries == {LAYER: TEXT}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("lora_delta.splits=3", "lora_delta.splits=3: expected one of 1, 2, 4, 8, 16"),
        ("lora_delta.splits=0", "expected one of 1, 2, 4, 8, 16"),
        ("lora_delta.splits=4294967295", "expected one of 1, 2, 4, 8, 16"),
        ("lora_delta.row_blocks=8", "expected one of 1, 2, 4"),
        ("lora_delta.columns=64", "columns follows from the problem"),
        ("lora_delta.threads=64", "expected a field of that kernel"),
        ("grid.x=64", "expected a kernel of"),
        ("lora_linear.way=3", "expected one of 1, 2"),
    ],
)
@on_linux
def test_only_candidates_are_used_on_mps(text, wrong, mps):
    save({LAYER: text})
    with pytest.warns(UserWarning, match=wrong):
        assert load(accept=extension.tune).entries == {}
    assert "expected dtypes of" in extension.tune(LAYER._replace(dtype="float64"), TEXT)


def test_a_file_is_replaced_at_once(monkeypatch):
    table = save({LAYER: TEXT})
    before = table.path.read_bytes()
    table.entries = {}

    def full(*_):
        raise OSError("no space left")

    for function in ("replace", "fdopen"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="no space left"):
                table.save()
        assert [path.read_bytes() for path in table.path.parent.iterdir()] == [before]


LOADED = """
from tests.emulator import mps_on_linux
mps_on_linux.install_with_extension()
import torch, torch_fused_lora
from torch_fused_lora.doctor import tuned_on
torch.manual_seed(0)
x, W, A, B = (torch.randn(s).half().to("mps") for s in ((64, 256), (128, 256), (8, 256), (128, 8)))
y = torch_fused_lora.lora_linear(x, W, None, A.float(), B.float(), 0.5)
torch.mps.synchronize()
print("+".join(mps_on_linux.counters().dispatches), hash(y.cpu().numpy().tobytes()), tuned_on(y.device), sep="\\n")
"""


@on_linux
def test_a_file_is_read_once_at_import_and_gives_the_same_bits(mps):
    machine = {"device": torch.backends.mps.get_name(), "cores": torch.backends.mps.get_core_count()}
    table = save({LAYER: "lora_delta.row_blocks=1"}, **machine)
    hashed = {"PYTHONHASHSEED": "0"}
    runs = [run_python("-c", LOADED, **hashed) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][0] == 0, runs[0][1]
    kernels, bits, said = runs[0][1].splitlines()
    assert said == f"1 layers as {table.path} says"
    _, text = run_python("-c", LOADED, TORCH_FUSED_LORA_PLAN="lora_delta.row_blocks=1", **hashed)
    assert text.splitlines() == [kernels, bits, "TORCH_FUSED_LORA_PLAN instead"]
    table.path.write_text("{")
    _, text = run_python("-c", LOADED, **hashed)
    assert text.count("UserWarning: torch_fused_lora: ") == 1
    assert "\nlora_delta_half_float_" in f"\n{text}"
    assert kernels not in text


# --- The command


@pytest.fixture
def told(monkeypatch, mps):
    """`tune` with times that are told, not taken: the rounds of the first configuration that a text is part of, else of
    ones. Every step is made once."""
    told: dict[str, list[float]] = {}

    def interleaved(steps, device, seconds, min_rounds):
        for step in steps.values():
            step()
        torch.mps.synchronize()
        return {text: next((t for part, t in told.items() if part in text), [1.0] * 5) for text in steps}

    monkeypatch.setattr(tune, "interleaved", interleaved)
    monkeypatch.setattr(tune, "ROTATED", 0)
    monkeypatch.setattr(extension, "tuned", Table.load("Apple M1", 8, extension.tune))
    yield told
    for layer in extension.tuned.entries:
        extension.tune(layer, "")


def run_tune(capsys, *arguments: str) -> tuple[int, str]:
    status = main(["tune", "--device", "mps", "--rank", "4", *arguments])
    return status, " ".join(capsys.readouterr().out.split())


FORWARD = Layer(False, 64, 72, 40, 4, "float16", "float16")
BACKWARD = FORWARD._replace(backward=True)


def test_what_wins_is_kept_and_in_force(told, capsys):
    told["lora_delta.row_blocks=2"] = [0.5] * 5
    told["lora_grad.splits=2"] = [0.9, 0.9, 0.9, 0.99, 1.2]
    status, text = run_tune(capsys, "--shapes", "40x72x40", "64x72x40")
    assert status == 0
    assert "its times mean nothing" in text
    assert f"{load().path} has 2 layers" in text
    assert text.count("0.50 (0.50-0.50)") == 2
    assert load(accept=extension.tune).entries == {
        FORWARD: "lora_delta.row_blocks=2",
        BACKWARD: "lora_delta.row_blocks=2",
    }
    assert {d.configuration["row_blocks"] for d in plan.plan("lora_linear", (33, 72, 40, 4), "float16")[:2]} == {2}
    assert str(extension.tuned) == doctor.tuned_on(torch.device("mps"))
    with deterministic():
        assert doctor.tuned_on(torch.device("mps")) == "nothing, torch.use_deterministic_algorithms(True) ignores it"
        assert "nothing to tune" in run_tune(capsys, "--shapes", "40x72x40")[1]


@pytest.mark.parametrize(
    "rounds", [[0.99] * 5, [0.9, 0.9, 0.9, 1.1, 1.1]], ids=["by less than the margin", "within the noise"]
)
def test_the_default_stays_where_nothing_wins(rounds, told, capsys):
    told["lora_delta"] = rounds
    assert run_tune(capsys, "--shapes", "40x72x40")[0] == 0
    assert load().entries == {}


def test_torch_is_kept_where_it_is_fastest(told, capsys):
    told["lora_linear.way=2"] = [0.4] * 5
    told["lora_delta.row_blocks=2"] = [0.5] * 5
    assert "0.40 (0.40-0.40) lora_linear.way=2" in run_tune(capsys, "--shapes", "40x72x40")[1]
    assert load().entries == dict.fromkeys((FORWARD, BACKWARD), "lora_linear.way=2")
    # Float32 adapters: torch's own products would not have PEFT's numerics.
    run_tune(capsys, "--shapes", "40x72x40", "--adapter-dtype", "float32")
    found = load().entries
    assert {layer.adapter_dtype: text for layer, text in found.items()} == {
        "float16": "lora_linear.way=2",
        "float32": "lora_delta.row_blocks=2",
    }


def test_no_write_access_is_told(told, capsys, monkeypatch, cache):
    told["lora_delta.row_blocks=2"] = [0.5] * 5
    (cache / "file").touch()
    extension.tuned.path = cache / "file" / "table.json"
    status, text = run_tune(capsys, "--shapes", "40x72x40")
    assert status == 1
    assert "0.50 (0.50-0.50)" in text
    assert "not kept, there is no write access" in text


def test_no_time_is_told(told, capsys):
    status, text = run_tune(capsys, "--shapes", "40x72x40", "--seconds", "0")
    assert status == 0
    assert text.count("no time was left for 40 x 72 x 40, r 4, float16, ") == 2
    assert load().entries == {}


def test_nothing_to_tune(capsys, monkeypatch, mps):
    assert main(["tune", "--device", "cpu", "--shapes", "4x4x4"]) == 1
    assert "nothing to tune on cpu" in capsys.readouterr().out
    monkeypatch.setattr(extension, "overrides", "lora_delta.splits=2")
    assert "TORCH_FUSED_LORA_PLAN overrides" in run_tune(capsys, "--shapes", "4x4x4")[1]
    for wrong, said in (
        (["--shapes", "4x4x4", "--rows", "3"], "a shape has its own"),
        (["--model", "/no/folder"], "--model: "),
        ([], "one of the arguments --model --shapes is required"),
    ):
        with pytest.raises(SystemExit):
            main(["tune", *wrong])
        assert said in capsys.readouterr().err


def test_shapes_of_a_model(tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
    )
    config.save_pretrained(tmp_path)
    shapes = tune.shapes_of(tmp_path, [1, 8])
    assert shapes == [(M, *layer) for layer in ((64, 64), (64, 32), (64, 96), (96, 64)) for M in (1, 8)]


def test_shapes_of_a_model_that_brings_code(tmp_path):
    """Which is not run, and nobody is asked whether it may be."""
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_its_own", "auto_map": names}))
    with pytest.raises(ValueError, match=r"of_its_own|trust_remote_code"):
        tune.shapes_of(tmp_path, [1])
    assert not (tmp_path / "ran").exists()
