"""The doctor: what it says of machines that are here, and of those that are not."""

from __future__ import annotations

import functools
import json
import re
import sys

import pytest
import torch

import torch_fused_lora as tfl
from tests.packaging.test_package import run_python
from torch_fused_lora import doctor
from torch_fused_lora.__main__ import main
from torch_fused_lora.system import System, gpu_family, metal_version, notable_variables

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a Mac has MPS, and the real one")


_self_test_once = functools.cache(doctor._run_self_test)


@pytest.fixture
def tested_before(monkeypatch):
    """For a test of something else: the self-tests are made once, and their results kept."""
    monkeypatch.setattr(doctor, "_run_self_test", _self_test_once)


def test_doctor_reports_and_passes(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in ("torch 2", "lora_linear  portable", "float32      ok", "bfloat16     ok", "all is well"):
        assert expected in text
    for package, (oldest, newest) in doctor.TESTED.items():
        assert re.search(rf"^  {package} \S+ \(tested with {oldest} to {newest}\)$", text, re.MULTILINE)


def test_doctor_on_mps(mps, capsys):
    assert main(["doctor"]) == 0
    section = capsys.readouterr().out.partition(f"\nmps: {torch.backends.mps.get_name()}, ")[2]
    for expected in (
        f"{torch.backends.mps.get_core_count()} cores",
        "lora_linear  mps kernels",
        "inside the Metal kernels",
        "float32      ok",
        "bfloat16     ok",
        "float16      ok",
        "extension    loaded; in this process ",
        "GPU          family Apple7, by its name",
        "copies       ",
    ):
        assert expected in section


@on_linux
def test_doctor_without_mps():
    status, text = run_python("-m", "torch_fused_lora", "doctor")
    assert status == 0
    assert "mps: none: this torch is built without MPS" in text
    assert "all is well" in text


@on_linux
@pytest.mark.parametrize("built", [False, True])
def test_doctor_says_why_there_is_no_extension(built, mps, tmp_path):
    extension = tmp_path / "_mps.so"
    if built:
        extension.write_text("built for something else")
    install = "from tests.emulator import mps_on_linux; mps_on_linux.install()"
    doctor_on_mps = f"{install}; from torch_fused_lora.doctor import doctor; exit(doctor())"
    status, text = run_python("-c", doctor_on_mps, TORCH_FUSED_LORA_MPS=str(extension))
    reason = (
        "_mps.so is no extension of this package, or one too old to say, wanted torch_fused_lora interface 5"
        if built
        else "it is not built (_mps.so is missing): on the Mac"
    )
    assert status == 1
    assert f"lora_linear  none, calls raise: the Metal extension is missing, {reason}" in text
    assert "float32      FAILED: NotImplementedError: lora_linear: device 'mps' needs this package's Metal" in text
    assert f"extension    {reason}" in text


DELTA = """\
  lora_delta_bfloat_float_down_2_4_plain_LAYOUT
    rank_blocks 2, width 128, row_blocks 4, up_row_blocks 4, k_splits 8, k_columns 128, splits 8, columns 128
    8 x 16 x 1 threadgroups of 256 threads, 262144 bytes of scratch
  lora_delta_bfloat_float_up_2_4_plain_LAYOUT
    rank_blocks 2, width 128, row_blocks 4, up_row_blocks 4, k_splits 8, k_columns 128, splits 8, columns 128
    8 x 16 x 1 threadgroups of 256 threads, no scratch
"""


def test_plan_of_many_rows(mps, capsys):
    arguments = "--plan", "512x1024x1024", "--rank", "16", "--dtype", "bfloat16", "--adapter-dtype", "float32"
    assert main(["doctor", *arguments, "--gpu-cores", "40"]) == 0
    expected = f"""\
512 x 1024 x 1024, rank 16, bfloat16 + float32 adapters, 40 GPU cores
forward, after torch's own x W^T + b:
{DELTA.replace("LAYOUT", "rows")}backward, after torch's own dy W:
{DELTA.replace("LAYOUT", "columns")}  lora_grad_bfloat_float_float_2_plain_rows
    rank_blocks 2, columns 128, depth 32, splits 8, split_rows 64
    16 x 8 x 1 threadgroups of 256 threads, 1048576 bytes of scratch
  sum_splits_float
    nothing to choose
    128 x 1 x 1 threadgroups of 256 threads, no scratch
"""
    assert capsys.readouterr().out == expected


def test_plan_of_a_single_row_is_for_this_gpu(mps, capsys):
    texts = []
    for cores in ((), ("--gpu-cores", "32"), ("--gpu-cores", "8")):
        assert main(["doctor", "--plan", "1x4096x4096", *cores]) == 0
        texts.append(capsys.readouterr().out.partition("\n")[2])
    assert texts[0] == texts[1] != texts[2]
    assert "forward:\n  lora_decode_half_half_1\n    slices 4, dispatches 2\n    4 x 1 x 1 threadgroups" in texts[0]


def test_plan_refuses(mps, capsys):
    assert main(["doctor", "--plan", "64x4294967296x8"]) == 1
    assert capsys.readouterr().out == "x: a dimension or stride of 2**32 elements or more\n"
    for wrong in ("64x8", "64x8x8x8", "0x8x8", "64xax8"):
        with pytest.raises(SystemExit):
            main(["doctor", "--plan", wrong])
        assert "expected MxKxN" in (error := capsys.readouterr().err) or "expected a whole number" in error


def test_plan_without_the_extension(capsys, monkeypatch):
    monkeypatch.setattr("torch_fused_lora.plan.extension", type(doctor.extension)())
    assert main(["doctor", "--plan", "64x64x64"]) == 1
    text = capsys.readouterr().out
    assert "the launch plan is part of the Metal extension, which is missing: this machine has no MPS" in text


PLAN = """
from tests.emulator import mps_on_linux
mps_on_linux.install_with_extension()
import torch, torch_fused_lora
from torch_fused_lora.__main__ import main
x = torch.ones(64, 256, device="mps")
print(torch_fused_lora.lora_linear(x, x, None, x[:8], x[:, :8]).sum().item())
exit(main(["doctor", "--plan", "64x256x64"]))
"""


@on_linux
def test_an_override_is_told_and_obeyed(mps):
    numbers = set()
    asked = "lora_delta.row_blocks=1,lora_delta.splits=2"
    for overrides, splits in (("", 1), (asked, 2)):
        status, text = run_python("-c", PLAN, TORCH_FUSED_LORA_PLAN=overrides)
        assert status == 0, text
        numbers.add(text.partition("\n")[0])
        assert f"splits {splits}, " in text
        assert (f"\nas TORCH_FUSED_LORA_PLAN={asked} says\n" in text) == bool(overrides)
        assert ("lora_delta_half_half_down_2_1_plain" in text) == bool(overrides)
    assert len(numbers) == 1


@on_linux
def test_a_wrong_override_raises_at_import(mps):
    status, text = run_python("-c", PLAN, TORCH_FUSED_LORA_PLAN="lora_delta.splits=none")
    assert status == 1
    wrong = "TORCH_FUSED_LORA_PLAN: lora_delta.splits=none: expected a whole number from 1 on"
    assert text.splitlines()[-1] == f"ValueError: {wrong}"


def test_doctor_fails_on_wrong_numbers(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "lora_linear", lambda *a: tfl.lora_linear(*a[:5], 0.5001))
    assert main(["doctor"]) == 1
    assert "float32      FAILED: error" in capsys.readouterr().out


def test_doctor_survives_a_backend_that_raises(capsys, monkeypatch):
    def broken(*_):
        raise OSError("no such kernel")

    monkeypatch.setattr(doctor, "lora_linear", broken)
    assert main(["doctor"]) == 1
    assert "FAILED: OSError: no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize("operator", ["lora_linear", "lora_linear_quantized", "rms_norm", "softmax"])
def test_doctor_sees_a_nan(operator, capsys, monkeypatch):
    function = getattr(tfl, operator)
    monkeypatch.setattr(
        f"torch_fused_lora.doctor.{operator}", lambda *a, **options: function(*a, **options) * torch.nan
    )
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.count("FAILED: error nan") == 3 * len(doctor.devices())  # dtypes


def test_json_holds_all_of_it(mps, tested_before, capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"]
    assert found["packages"]["torch"] == torch.__version__
    assert [device["type"] for device in found["devices"]] == ["cpu", "mps"]
    assert all(test["passed"] for device in found["devices"] for test in device["self_tests"])
    metal = found["metal"]
    assert metal["loaded"]
    assert metal["compile_seconds"] > 0 < metal["compiled_kernels"]
    assert (metal["cores"], metal["family"], metal["virtual"]) == (32, "Apple7", False)


def test_json_of_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "lora_linear", lambda *a: tfl.lora_linear(*a[:5], 0.5) * torch.nan)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert not found["healthy"]
    assert found["devices"][0]["self_tests"][0]["error"] == "nan"


@pytest.mark.parametrize(
    "probe",
    [
        "devices",
        "device_name",
        "System.here",
        "System.without_metal",
        "platform.platform",
        "torch.backends.mps.get_name",
        "torch.backends.mps.get_core_count",
        "metal_version",
    ],
)
def test_a_probe_that_fails_fails_alone(probe, mps, tested_before, capsys, monkeypatch):
    def broken(*_):
        raise OSError("no answer")

    monkeypatch.setattr(f"torch_fused_lora.doctor.{probe}", broken)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "float32      ok" in text
    assert "all is well" in text


@pytest.mark.parametrize(
    ("system", "said"),
    [
        (System("Windows", "AMD64"), "Windows has no Metal"),
        (System("Darwin", "x86_64", "15.1", translated=True), "which Rosetta translates"),
        (System("Darwin", "x86_64", "13.6"), "an Intel Mac"),
        (System("Darwin", "arm64", "13.6.1"), "macOS 13.6.1, and the Metal kernels need 14"),
        (System("Darwin", "arm64", "14.0"), None),
        (System("Darwin", "arm64", ""), None),
        (System("Linux", "x86_64"), None),
    ],
)
def test_a_system_without_metal_gets_one_sentence(system, said):
    sentence = system.without_metal()
    if said is None:
        assert sentence is None
    else:
        assert said in sentence
        assert "compute on the CPU" in sentence
        assert sentence.count(".\n") == 0
        assert sentence.endswith(".")


@pytest.mark.parametrize("system", [System("Windows", "AMD64"), System("Darwin", "arm64", "13.6")])
def test_such_a_system_computes(system, mps, tested_before, capsys, monkeypatch):
    """On its CPU; its mps device, if torch has one, says why not."""
    monkeypatch.setattr(System, "here", lambda: system)
    assert main(["doctor"]) == 0
    assert f"  {system.without_metal()}\n" in capsys.readouterr().out
    extension = type(doctor.extension)()
    extension.load()
    assert extension.library is None
    assert extension.reason == system.without_metal()


@pytest.mark.parametrize(
    ("macos", "language"),
    [("26.1", "4.0"), ("27.0", "4.0"), ("15.6", "3.2"), ("14.0", "3.1"), ("13.6", "3.0 or older"), ("", "unknown")],
)
def test_the_language_is_what_torch_compiles_for(macos, language):
    assert metal_version(macos) == language


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Apple M1 Max", "Apple7"),
        ("Apple M2", "Apple8"),
        ("Apple M3 Ultra", "Apple9"),
        ("Apple M4 Pro", "Apple9"),
        ("Apple M5", "Apple10"),
        ("Apple M17", "unknown"),
        ("Apple Paravirtual device", "unknown, a virtual GPU"),
        ("AMD Radeon Pro 5500M", "unknown"),
    ],
)
def test_the_family_is_known_by_name(name, family):
    assert gpu_family(name) == family


def test_a_virtual_gpu_is_called_one(mps, tested_before, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple Paravirtual device")
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 1 // 0)
    main(["doctor"])
    text = capsys.readouterr().out
    assert "mps: Apple Paravirtual device, unknown cores" in text
    assert "GPU          virtual" in text


@pytest.mark.parametrize("name", ["PYTORCH_MPS_FAST_MATH", "PYTORCH_ENABLE_MPS_FALLBACK"])
def test_variables_are_told_only_where_they_are_set(name, tested_before, capsys, monkeypatch):
    monkeypatch.setenv(name, "1")
    main(["doctor"])
    assert f"  {name}=1: " in capsys.readouterr().out
    assert notable_variables({name: "0"}) == notable_variables({name: ""}) == notable_variables({}) == {}


@pytest.mark.parametrize("value", ["off", "0"])
def test_switched_off_is_told(value, tested_before, monkeypatch):
    monkeypatch.setenv("TORCH_FUSED_LORA", value)
    assert f"  TORCH_FUSED_LORA={value}: patch_peft and patch_norms patch nothing" in str(doctor.examine())


def test_kernels_of_an_extension_that_did_not_load(mps, monkeypatch):
    monkeypatch.setattr(doctor, "extension", type(doctor.extension)())
    assert doctor.backend_of("softmax", "mps")[0] == "mps kernels of an extension that is not ours"
