"""Loads the device library and gives it what it needs of Python: the Metal compiler and the texts of findings."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .. import metal_on_cpu as moc
from ..metal_on_cpu import abi
from ..metal_on_cpu.report import read_report
from . import build

ROOT = Path(__file__).resolve().parents[3]

CompileCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
DescribeCallback = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.POINTER(abi.RawReport))


class Host(ctypes.Structure):
    """``EmulatorHost`` of csrc/metal.h."""

    _fields_ = [("compile", CompileCallback), ("describe", DescribeCallback), ("execute", ctypes.c_void_p)]


@dataclass(frozen=True)
class Counters:
    """What the device did since the last reset; ``live_buffers`` and ``live_bytes`` are of now."""

    dispatches: dict[str, int]  # by kernel name
    fallbacks: dict[str, int]  # calls of ATen operators that the CPU's kernels computed, by name
    stable_calls: dict[str, int]  # operators that extensions called through PyTorch's stable ABI, by name
    command_blocks: int
    commits: int
    synchronisations: int  # the host waited for the device
    libraries: int  # Metal sources compiled
    allocations: int
    live_buffers: int
    live_bytes: int
    peak_bytes: int  # live at once, since the last reset


def counters() -> Counters:
    return Counters(**json.loads(library().emulator_counters()))


def reset_counters() -> None:
    library().emulator_reset_counters()


@contextmanager
def no_leaks() -> Iterator[None]:
    """Asserts that no buffer made inside is alive at the end."""
    torch.mps.synchronize()
    before = counters().live_buffers
    yield
    deadline = time.monotonic() + 2  # autograd's thread may still be letting go of a backward pass
    while True:
        torch.mps.synchronize()
        after = counters().live_buffers
        if after <= before:  # fewer: garbage from before went
            return
        assert time.monotonic() < deadline, f"{after - before} buffers leak"
        gc.collect()


@contextmanager
def execution(*, enabled: bool = True, order: str = "forward") -> Iterator[None]:
    """Execute kernels in another order (``metal_on_cpu``'s), or not at all: then outputs stay NaN, to time the host."""
    torch.mps.synchronize()
    library().emulator_set_execution(enabled, abi.ORDERS[order])
    try:
        yield
        torch.mps.synchronize()
    finally:
        library().emulator_set_execution(True, abi.ORDERS["forward"])


@contextmanager
def a_stream_a_thread(meet_seconds: float = 1.0) -> Iterator[None]:
    """Every thread encodes into a stream of its own, as with PyTorch's pool of streams, and none waits for another.

    The first to start encoding waits until a second one has started, too, for ``meet_seconds`` at most: two that share
    a kernel's handle without a lock go wrong every time, and two with a lock take that long.
    """
    library().emulator_give_each_thread_a_stream(meet_seconds)
    try:
        yield
    finally:
        library().emulator_share_one_stream()


def why_unavailable() -> str | None:
    """What keeps this machine from having the device, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the mps emulator runs on x86-64 Linux"
    if torch.cuda.is_available():
        return "PyTorch takes one accelerator a process, and has CUDA here"
    if shutil.which("g++") is None:
        return "the mps emulator is compiled by g++, which is not installed"
    if importlib.util.find_spec("ziglang") is None:
        return "the mps emulator is compiled by the package ziglang, which is not installed"
    return None


def install(name: str = "Apple M1 Max (emulator)", core_count: int = 32) -> None:
    """Make ``mps`` a device of this process; called again, only rename it.

    Comes before anything asks PyTorch whether it has mps, and raises RuntimeError if it comes too late or
    ``why_unavailable()``.
    ``name`` and ``core_count`` are what ``torch.backends.mps.get_name()`` and ``get_core_count()`` say.
    """
    if reason := why_unavailable():
        raise RuntimeError(reason)
    torch._C._has_mps = True
    library()
    torch.backends.mps.is_available.cache_clear()
    if not torch.backends.mps.is_available():
        raise RuntimeError("mps_on_linux.install() comes first: PyTorch was asked for mps before, and keeps the answer")
    torch._C._mps_get_name = lambda: name
    torch._C._mps_get_core_count = lambda: core_count
    torch.backends.mps.get_name.cache_clear()
    torch.backends.mps.get_core_count.cache_clear()
    torch.UntypedStorage.mps = storage_to_mps
    torch.UntypedStorage.clone = clone_storage


def install_with_extension() -> None:
    """``install()``, and the extension that the project's setup.py builds: before torch_fused_lora is imported."""
    install()
    folders = "csrc/mps", "csrc/plan", "metal"
    sources = [ROOT / "pyproject.toml", *(file for folder in folders for file in sorted((ROOT / folder).glob("*.*")))]
    os.environ["TORCH_FUSED_LORA_MPS"] = str(build.extension(ROOT / "setup.py", sources))


# PyTorch for Linux cannot construct a storage on mps, only a tensor.
def storage_on_mps(size: int) -> torch.UntypedStorage:
    return torch.empty(size, dtype=torch.uint8, device="mps").untyped_storage()


def storage_to_mps(self: torch.UntypedStorage) -> torch.UntypedStorage:
    return self if self.device.type == "mps" else storage_on_mps(self.nbytes()).copy_(self, False)


def clone_storage(self: torch.UntypedStorage) -> torch.UntypedStorage:
    fresh = storage_on_mps(self.nbytes()) if self.device.type == "mps" else torch.UntypedStorage(self.nbytes())
    return fresh.copy_(self)


@cache
def library() -> ctypes.CDLL:
    """The device; its C functions are visible to extensions that are loaded later."""
    device = ctypes.CDLL(str(build.device_library()), mode=ctypes.RTLD_GLOBAL)
    device.emulator_counters.restype = ctypes.c_char_p
    device.emulator_give_each_thread_a_stream.argtypes = [ctypes.c_double]
    device.emulator_set_execution.argtypes = [ctypes.c_bool, ctypes.c_uint32]
    device.emulator_add_kernel.argtypes = [
        *[ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint32],
        *[ctypes.POINTER(abi.Parameter), ctypes.c_uint32, ctypes.c_uint64],
    ]
    kernels: list[moc.Kernel] = []

    def compile_source(source: bytes, handle: int) -> int:
        try:
            compiled = moc.compile(source.decode("ascii"), "extension", strict=True)
        except Exception as error:
            device.emulator_say(str(error).encode())
            return 1
        for kernel in compiled.values():
            code = kernel.source.fast[1]
            launch = ctypes.cast(code[kernel.entry.symbol], ctypes.c_void_p)
            parameters = (abi.Parameter * len(kernel.parameters))(*kernel.parameters.values())
            name, threads = kernel.name.encode(), kernel.max_total_threads
            device.emulator_add_kernel(handle, name, launch, threads, parameters, len(parameters), len(kernels))
            kernels.append(kernel)
        return 0

    def describe(index: int, report: ctypes._Pointer[abi.RawReport]) -> None:
        kernel = kernels[index]
        path, variables = kernel.source.fast[0], kernel.source.variables
        findings = read_report(report.contents, kernel.name, kernel.arguments, path, variables).findings
        device.emulator_say("\n".join(map(str, findings)).encode())

    execute = ctypes.cast(abi.executor().executor_dispatch, ctypes.c_void_p)
    device.host = Host(
        CompileCallback(compile_source), DescribeCallback(describe), execute
    )  # keeps the callbacks alive
    device.emulator_set_host(ctypes.byref(device.host))
    return device
