"""Modules built on one machine and launched on another, with the interface of metal_on_cpu's library."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from tests.emulator.metal_on_cpu import Counters, ExecutionError, Finding, Report
from tests.emulator.metal_on_gpu import ptx
from tests.emulator.metal_on_gpu.driver import driver
from tests.kernels.launch_plan import Kernels, Launch
from tests.kernels.row_plan import RowKernels

GUARD = 256  # bytes of 0xFF on both sides of every buffer: what a kernel writes there is an overrun
NOTHING_COUNTED = Counters([0] * 31, [0] * 31, *[0] * (len(dataclasses.fields(Counters)) - 2))


def key(source: str, variant: str) -> str:
    return f"{variant}/{hashlib.sha256(source.encode()).hexdigest()[:24]}"


def family(name: str) -> str:
    """A kernel's name up to its first template argument."""
    return re.split(r"_(?:float|half|bfloat)", name)[0]


def write(path: Path, modules: Iterable[tuple[str, str, ptx.Module]]) -> None:
    """A file of (source, variant, module)."""
    index = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for source, variant, module in modules:
            name = key(source, variant)
            if name not in index:
                archive.writestr(name, module.code)
                index[name] = {host_name: dataclasses.asdict(found) for host_name, found in module.kernels.items()}
        archive.writestr("index.json", json.dumps(index))


@dataclasses.dataclass
class Dispatches(Kernels, RowKernels):
    """The kernels as their plans launch them on `gpu_cores`; each launch and all its arguments go to `run`."""

    run: Callable[[Launch, list[torch.Tensor | bytes | None]], None] = lambda *_: None

    def _dispatch(self, launch: Launch, tensors: Sequence[torch.Tensor | bytes | None]) -> None:
        self.run(launch, [*tensors, *launch.constants()])


class Kernel:
    """A kernel by its host name. ``dispatch`` is metal_on_cpu's, on the GPU."""

    def __init__(self, code: bytes, name: str, entry: ptx.Kernel) -> None:
        self.name, self.entry = name, entry
        self.function = driver().load(code, name)

    def groups(self, threads: Sequence[int], group: Sequence[int]) -> list[int]:
        assert not any(a % b for a, b in zip(threads, group, strict=True)), "threadgroups are full"
        return [a // b for a, b in zip(threads, group, strict=True)]

    def slot(self, index: int, value: bytes) -> int:
        assert index in self.entry.constants, f"buffer {index} takes an address"
        assert len(value) <= 8, f"buffer {index}: constants are of at most eight bytes"
        return int.from_bytes(value, "little")

    def dispatch(
        self,
        *,
        threads: Sequence[int],
        group: Sequence[int],
        arguments: Sequence[torch.Tensor | bytes | None],
        trace: bool = False,
        order: str = "forward",
        guard: int | None = None,
    ) -> Report:
        """CPU tensors are copied to the GPU and, where the kernel may write them, back. ``trace`` and ``order`` mean
        nothing here. ``guard``: bytes around each buffer."""
        guard, gpu, slots, buffers = GUARD if guard is None else guard, driver(), [], {}
        for index, value in enumerate(arguments):
            if not isinstance(value, torch.Tensor):
                slots.append(0 if value is None else self.slot(index, value))
                continue
            storage = value.untyped_storage()
            host, size = storage.data_ptr(), storage.nbytes()
            if host not in buffers:
                buffers[host] = (gpu.allocate(size + 2 * guard), size, [])
                gpu.write(buffers[host][0] + guard, host, size)
            address, _, indices = buffers[host]
            indices.append(index)
            slots.append(address + guard + value.storage_offset() * value.element_size())
        groups = self.groups(threads, group)
        try:
            if all(groups):
                gpu.launch(self.function, groups, group, slots)
                gpu.synchronize()
            for host, (address, size, indices) in buffers.items():
                if set(indices) & set(self.entry.written):
                    gpu.read(host, address + guard, size)
                for place in (address, address + guard + size):
                    self.check_guard(place, guard, indices[0])
        finally:
            for address, _, _ in buffers.values():
                gpu.free(address)
        return Report(NOTHING_COUNTED, [])

    def check_guard(self, address: int, size: int, index: int) -> None:
        found = ctypes.create_string_buffer(size)
        driver().read(ctypes.addressof(found), address, size)
        if found.raw != b"\xff" * size:
            text = f"a store beyond buffer {index}"
            finding = Finding("out-of-bounds", self.name, 0, (0, 0, 0), (0, 0, 0), text)
            raise ExecutionError(str(finding), Report(NOTHING_COUNTED, [finding]))


class Modules:
    """What ``write`` wrote."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        self.index = json.loads(self.archive.read("index.json"))
        self.kernel = cache(self._kernel)

    def entry(self, source: str, name: str, variant: str = "exact") -> ptx.Kernel:
        return ptx.Kernel(**self.index[key(source, variant)][name])

    def registers(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By build and kernel, and the bytes of local memory: what ptxas gives a thread."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for name, kernels in self.index.items():
            for host_name, kernel in kernels.items():
                variant = found.setdefault(name.partition("/")[0], {})
                variant[host_name] = kernel["registers"], kernel["local_bytes"]
        return found

    def _kernel(self, source: str, name: str, variant: str = "exact") -> Kernel:
        return Kernel(self.archive.read(key(source, variant)), name, self.entry(source, name, variant))

    def compile(
        self, source: str, name: str = "metal", *, strict: bool = False, trace: bool = False
    ) -> dict[str, Kernel]:
        """As metal_on_cpu.compile, of what was built before."""
        if (found := key(source, "exact")) not in self.index:
            raise LookupError(f"no module was built of this source, the kernels of which end: {source[-200:]}")
        return {host_name: self.kernel(source, host_name) for host_name in self.index[found]}
