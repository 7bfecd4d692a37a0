"""The wheel for a Mac: built by setup.py on Linux, linked against macOS's torch, and held to what macOS 14 loads."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("builds on Linux what a Mac builds itself", allow_module_level=True)

from tests import ROOT
from tests.emulator.macos_wheel.binary import OLDEST_MACOS, PLACE, TORCH, exports, minimum_macos, problems
from tests.emulator.macos_wheel.build import HERE, build, copy_sources, run_setup, script
from tests.emulator.macos_wheel.compiler import command_for, linker
from tests.emulator.macos_wheel.mac_torch import (
    MacTorch,
    UnreachableError,
    imports,
    oldest_and_newest,
    parse,
    requirement,
)
from tests.emulator.metal_on_cpu.lint import lint
from tests.emulator.metal_on_cpu.toolchain import cached
from tests.kernels.launch_plan import Kernels, assemble

FAMILIES = {path.stem: assemble(path) for path in sorted((ROOT / "metal").glob("*.metal"))}


class Torches(NamedTuple):
    oldest: MacTorch
    newest: MacTorch


@pytest.fixture(scope="session")
def torches() -> Torches:
    if linker() is None:
        pytest.skip("no LLVM linker for Mach-O: apt-get install lld-19")
    try:
        return Torches(*oldest_and_newest())
    except UnreachableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def wheel(torches, tmp_path_factory) -> Path:
    """The wheel that is shipped: newest headers, newest libraries, as a Mac builds it."""
    return built(torches.newest, torches.newest, torches.newest.stubs, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def binary(wheel, tmp_path_factory) -> Path:
    return unpacked_binary(wheel, tmp_path_factory.mktemp("binary"))


def built(headers: MacTorch, libraries: MacTorch, stubs: Path, folder: Path) -> Path:
    """``build`` in a place of its own; out of the cache while nothing has changed."""

    def wrap(path: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(path, "w") as archive:
            wheel = build(Path(scratch), headers, libraries, stubs)
            archive.write(wheel, wheel.name)

    copy_sources(folder / "sources")
    inputs = [*sorted((folder / "sources").rglob("*.*")), *sorted(HERE.glob("*.py"))]
    parts = [f"{path.name}\n{path.read_text()}" for path in inputs if path.is_file()]
    tools = [sys.version, importlib.metadata.version("setuptools"), run(linker(), "--version").stdout]
    versions = [str(headers.version), str(libraries.version)]
    with zipfile.ZipFile(cached("mac-wheel", [*parts, *tools, *versions], ".zip", wrap)) as archive:
        (name,) = archive.namelist()
        return Path(archive.extract(name, folder))


def unpacked_binary(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(PLACE, folder))


def run(*words: str | Path | None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, env=os.environ | environment)


# ------------------------------------------------------------------------------------------------------- one binary


def test_same_bytes_again_and_for_the_whole_range(wheel, torches, tmp_path):
    """Built in another folder and linked against the oldest torch: reproducible, and one binary for all."""
    again = built(torches.newest, torches.oldest, torches.newest.stubs, tmp_path)
    assert again.name == wheel.name
    assert wheel.name.endswith("-py3-none-macosx_14_0_arm64.whl")
    assert again.read_bytes() == wheel.read_bytes()


def test_loads_as_far_as_its_bytes_tell(binary, torches):
    assert list(problems(binary, torches, torches.newest.stubs)) == []


def test_imports_are_bound_to_their_libraries(binary, torches):
    """torch's only through the C shim, which is what stays the same between its versions."""
    there = exports(torches.newest, torches.newest.stubs)
    for library, symbols in imports(binary).items():
        assert symbols <= there[library]
    torch_symbols = {symbol for library, symbols in imports(binary).items() if "torch" in library for symbol in symbols}
    assert {symbol for symbol in torch_symbols if not symbol.startswith(("_aoti_torch_", "_torch_"))} == set()


def test_names_that_are_looked_up_are_exported(torches):
    """By dlsym, where a name that is missing is no error of any linker's. One came with torch 2.13."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "mps").glob("*.mm"))
    names = {f"_{name}" for name in re.findall(r'dlsym\(\s*RTLD_DEFAULT,\s*"(\w+)"\)', text)}
    assert len(names) == text.count("dlsym(")
    older, newer = (set().union(*(exports(t, t.stubs)[library] for library in TORCH)) for t in torches)
    assert names - newer == set()
    assert names - older == {"_torch_exception_get_what_without_backtrace"}


def test_source_build_against_the_oldest_torch(torches, tmp_path):
    """What `pip install --no-build-isolation .` does where the oldest torch is installed."""
    wheel = built(torches.oldest, torches.oldest, torches.newest.stubs, tmp_path)
    assert list(problems(unpacked_binary(wheel, tmp_path), (torches.oldest,), torches.newest.stubs)) == []


def test_dependency_starts_where_the_proof_does(torches):
    """It has no end: whatever torch is newest is what was linked against."""
    supported = requirement().specifier
    assert all(supported.contains(torch.version) for torch in torches)
    major, minor = torches.oldest.version.release[:2]
    assert not supported.contains(f"{major}.{minor - 1}.9")
    assert supported.contains(f"{major + 1}.0")


def test_system_stubs_are_of_the_oldest_macos(torches):
    """What a torch imports is there on every macOS that it supports, so on the oldest that the wheel does."""
    assert minimum_macos(parse(torches.newest.libraries / "libc10.dylib")) <= OLDEST_MACOS


# ------------------------------------------------------------------------------------------------ what must not link

LINKS = {
    "torch": "int aoti_torch_device_type_mps(); }\nint f() { return aoti_torch_device_type_mps(); }",
    "libc++": "}\n#include <string>\nstd::string f(int i) { return std::to_string(i); }",
}
UNDEFINED = {
    "not torch's": (
        "int aoti_torch_mps_frobnicate(); }\nint f() { return aoti_torch_mps_frobnicate(); }",
        "_frobnicate",
    ),
    "of a newer torch": (
        "const char* torch_exception_get_what(); }\nauto f() { return torch_exception_get_what(); }",
        "",
    ),
    "not macOS's": ("int pidfd_open(int, int); }\nint f() { return pidfd_open(1, 0); }", "_pidfd_open"),
    "of a newer libc++": (
        "}\n#include <charconv>\nauto f(char* p, double x) { return std::to_chars(p, p + 9, x); }",
        "to_chars",
    ),
    "sized delete": ("}\n#include <new>\nvoid f(int* p) { ::operator delete(p, sizeof(int)); }", "__ZdlPvm"),
}


def link(source: str, libraries: MacTorch, stubs: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "planted.mm").write_text(f'extern "C" {{ {source}\n')
    compiler = [sys.executable, HERE / "compiler.py", stubs]
    options = ["-std=c++20", "-O2", "-c", folder / "planted.mm", "-o", folder / "planted.o"]
    compiled = run(*compiler, *options, MACOSX_DEPLOYMENT_TARGET="14.0")
    assert compiled.returncode == 0, compiled.stderr
    options = ["-bundle", "-undefined", "dynamic_lookup", folder / "planted.o", f"-L{libraries.libraries}"]
    options += ["-lc10", "-ltorch", "-ltorch_cpu", "-o", folder / "planted.so"]
    return run(*compiler, *options, MACOSX_DEPLOYMENT_TARGET="14.0")


@pytest.mark.parametrize("what", LINKS)
def test_what_is_there_links(what, torches, tmp_path):
    done = link(LINKS[what], torches.oldest, torches.newest.stubs, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", UNDEFINED)
def test_planted_call_does_not_link(what, torches, tmp_path):
    source, symbol = UNDEFINED[what]
    done = link(source, torches.oldest, torches.newest.stubs, tmp_path)
    assert done.returncode != 0
    assert "undefined symbol: " in done.stderr
    assert symbol in done.stderr


def test_newest_torch_has_what_the_oldest_lacks(torches, tmp_path):
    done = link(UNDEFINED["of a newer torch"][0], torches.newest, torches.newest.stubs, tmp_path)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------ what the checks must see

BUILD_VERSION = b"\x32\0\0\0\x20\0\0\0\x01\0\0\0"  # LC_BUILD_VERSION, 32 bytes, macOS; then minos
SPOILED = {
    "unsigned change": (b"rounded to A's type", b"rounded to B's type", "is not what was signed"),
    "import": (
        b"_aoti_torch_mps_set_arg_int\0",
        b"_aoti_torch_mps_set_arg_inx\0",
        "_aoti_torch_mps_set_arg_inx of @rpath/lib",
    ),
    "rpath": (
        b"@loader_path/../torch/lib\0",
        b"@loader_path/torch/lib/..\0",
        "expected to look for torch in torch/lib",
    ),
    "macOS": (
        BUILD_VERSION + b"\0\0\x0e\0",
        BUILD_VERSION + b"\0\0\x0f\0",
        "expected macOS (14, 0) as the oldest, got (15, 0)",
    ),
    "library": (b"@rpath/libtorch.dylib\0", b"@rpath/libtorch.so\0\0\0\0", "loads too much or too little"),
    "export": (b"_tfl_configure\0", b"_tfl_configurE\0", "_tfl_configure"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_checks_see_a_spoiled_binary(what, binary, torches, tmp_path):
    old, new, expected = SPOILED[what]
    assert old in binary.read_bytes()
    spoiled = tmp_path / "_mps.so"
    spoiled.write_bytes(binary.read_bytes().replace(old, new))
    assert expected in "\n".join(problems(spoiled, torches, torches.newest.stubs))


def test_checks_see_dynamic_lookup(torches, tmp_path):
    """As setup.py links on a Mac, where it would be noticed only when the function is called."""
    assert link(LINKS["torch"], torches.newest, torches.newest.stubs, tmp_path).returncode == 0
    words = ["-arch", "arm64", "-platform_version", "macos", "14.0", "14.0", "-bundle", "-undefined", "dynamic_lookup"]
    done = run(linker(), *words, tmp_path / "planted.o", "-o", tmp_path / "planted.so")
    assert done.returncode == 0, done.stderr
    found = "\n".join(problems(tmp_path / "planted.so", torches, torches.newest.stubs))
    assert "_aoti_torch_device_type_mps of no library in particular is not there" in found


# --------------------------------------------------------------------------------------------------------- the wheel


def pip_install(wheel: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder]
    return run(*command, *options, wheel)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("platform", ["macosx_14_0_arm64", "macosx_26_0_arm64"])
def test_pip_accepts_it(python, platform, wheel, tmp_path):
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--platform", platform]
    done = pip_install(wheel, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / PLACE).is_file()  # where mps.py looks, and torch/lib lies beside


@pytest.mark.parametrize("platform", ["macosx_13_0_arm64", "macosx_14_0_x86_64", "manylinux_2_28_aarch64", None])
def test_pip_refuses_it(platform, wheel, tmp_path):
    options = ["--only-binary=:all:", "--python-version", "3.12", "--platform", platform] if platform else []
    done = pip_install(wheel, tmp_path, *options)
    assert done.returncode != 0
    assert "is not a supported wheel on this platform" in done.stderr


def test_wheel_holds_the_package_and_nothing_of_this_machine(wheel):
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    modules = [path for path in (ROOT / "torch_fused_lora").rglob("*.py") if path.is_file()]
    package = {path.relative_to(ROOT).as_posix() for path in modules} | {"torch_fused_lora/py.typed"}
    information = {name for name in contents if ".dist-info/" in name}
    assert contents.keys() - information == package | {PLACE}
    assert {Path(name).name for name in information} == {"LICENSE", "METADATA", "RECORD", "WHEEL", "top_level.txt"}
    folders = [ROOT, Path.home(), sys.prefix, sys.base_prefix, tempfile.gettempdir()]
    for name, data in contents.items():
        for folder in folders:
            assert f"{folder}/".encode() not in data, (name, folder)


# ------------------------------------------------------------------------------------------------------- its kernels


@functools.cache
def launched_sources() -> set[str]:
    """The sources that the launch plan asks for, over dtypes, kinds of pass, row counts and dropout."""
    kernels, sources = Kernels(), set()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for adapter_dtype in {dtype, torch.float32}:
            A, B = torch.empty(16, 256, dtype=adapter_dtype), torch.empty(128, 16, dtype=adapter_dtype)
            weight = torch.empty(128, 256, dtype=dtype)
            for rows in (4, 33, 4096):
                x, y = torch.empty(rows, 256, dtype=dtype), torch.empty(rows, 128, dtype=dtype)
                launches = kernels.plan_decode(x, weight, None, A, B) if rows <= 8 else []
                for dropout_p in ((), (0.5,)):
                    launches += kernels.plan_delta(y, x, A, B, dropout_p=dropout_p)
                    launches += kernels.plan_grad(x, y, A, B, dropout_p=dropout_p)[0]
                sources |= {launch.source.decode() for launch in launches}
    return sources


def family_of(source: str) -> str:
    """The one family whose text a launched source starts with, before its instantiation."""
    (family,) = (name for name, text in FAMILIES.items() if source.startswith(text))
    return family


def test_every_kernel_source_is_inside(binary):
    data = binary.read_bytes()
    for name, text in FAMILIES.items():
        assert text.encode() + b"\0" in data, name
    assert {family_of(source) for source in launched_sources()} >= {"lora_decode", "lora_delta", "lora_grad"}


@pytest.mark.parametrize("family", FAMILIES)
def test_shader_source_is_what_torch_compiles(family):
    """ASCII, MSL 3.1 (the lint's rules, over headers that declare nothing newer), no include left."""
    text = FAMILIES[family]
    assert text.isascii()
    assert '#include "' not in text
    assert len(text) < 65536  # the string literal that every C++ compiler has to take
    launched = [source.removeprefix(text) for source in launched_sources() if family_of(source) == family]
    assert lint(text + "".join(sorted(line for line in launched if "bfloat" in line))) == []


# ------------------------------------------------------------------------------------------------ setup.py on a Mac

RECORD = """
import json, os, sys
log, *arguments = sys.argv[1:]
with open(log, "a") as file:
    print(json.dumps([os.environ["MACOSX_DEPLOYMENT_TARGET"], arguments]), file=file)
open(arguments[arguments.index("-o") + 1], "w").close()
"""


@pytest.fixture(scope="session")
def calls(torches, tmp_path_factory) -> list[tuple[str, list[str]]]:
    """The calls of clang++, and the oldest macOS given to each, that setup.py makes on a Mac: recorded, not run."""
    folder = tmp_path_factory.mktemp("mac")
    copy_sources(folder / "tree")
    (folder / "record.py").write_text(RECORD)
    recorder = script(folder / "clang++", sys.executable, folder / "record.py", folder / "log")
    run_setup(folder / "tree", recorder, torches.newest, torches.newest, "build_ext")
    return [tuple(json.loads(line)) for line in (folder / "log").read_text().splitlines()]


def test_setup_py_compiles_on_a_mac_what_is_compiled_here(calls, torches, monkeypatch):
    compiles = [call for _, call in calls if "-c" in call]
    assert {target for target, _ in calls} == {".".join(map(str, OLDEST_MACOS))}
    sources = {Path(word).name for call in compiles for word in call if word.endswith((".mm", ".cpp"))}
    written = {path.name for path in (ROOT / "csrc").rglob("*") if path.suffix in (".mm", ".cpp")}
    assert sources == written | {"metal_sources.cpp"}
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", "14.0")
    for call in compiles:
        ours = command_for(call, torches.newest.stubs)
        start = next(i for i in range(len(ours)) if ours[i : i + len(call)] == call)  # every word, in order
        assert not [word for word in ours[start + len(call) :] if not word.startswith(("-g0", "-ffile-prefix-map="))]
        assert {"-std=c++20", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"} <= set(call)
        assert f"-I{torches.newest.package}/include" in call
        assert [word for word in call if word.startswith("-O")][-1] == "-O2"


def test_setup_py_links_on_a_mac_what_is_linked_here(calls, torches, monkeypatch):
    (call,) = (call for _, call in calls if "-c" not in call)
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", "14.0")
    ours = command_for(call, torches.newest.stubs)
    linked = [word for word in call if word.endswith(".o") or word.startswith(("-l", "-L"))]
    assert [word for word in ours if word in linked] == linked
    assert "-Wl,-rpath,@loader_path/../torch/lib" in call
    assert ours[ours.index("-rpath") + 1] == "@loader_path/../torch/lib"
    assert "-bundle" in ours
    assert "dynamic_lookup" in call
    assert "-undefined" not in ours
    assert "dynamic_lookup" not in ours
