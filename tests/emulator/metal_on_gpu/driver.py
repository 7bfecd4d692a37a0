"""The CUDA driver by ctypes, as much of it as loading, launching and copying take. torch's context is shared."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

SLOTS = 31  # of the shim's KernelArguments


class CudaError(RuntimeError):
    """The driver refused, or a kernel failed; the text is the driver's."""


class Driver:
    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'').decode()} ({status})")

    def load(self, code: bytes, kernel: str) -> ctypes.c_void_p:
        """A kernel of a module, which stays loaded."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), code)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        return function

    def launch(
        self,
        function: ctypes.c_void_p,
        groups: Sequence[int],
        group: Sequence[int],
        slots: Sequence[int],
        stream: int = 0,
    ) -> None:
        """Every slot: a buffer's address, or a constant's eight bytes."""
        values = (ctypes.c_uint64 * SLOTS)(*slots)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(values))
        extents = map(ctypes.c_uint, (*groups, *group, 0))
        self.call("cuLaunchKernel", function, *extents, ctypes.c_void_p(stream), parameters, None)

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")

    def allocate(self, size: int) -> int:
        """Device memory, all bytes 0xFF."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self.call("cuMemsetD8_v2", address, 0xFF, ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, host: int, size: int) -> None:
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(host), ctypes.c_size_t(size))

    def read(self, host: int, address: int, size: int) -> None:
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(host), ctypes.c_uint64(address), ctypes.c_size_t(size))


driver = cache(Driver)
