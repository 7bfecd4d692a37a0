"""PyTorch's MPS shim by ctypes: encode kernels from Python, well or badly."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from .build import TORCH_LIBRARIES
from .device import library

Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
Argument = torch.Tensor | int

libtorch = ctypes.CDLL(str(TORCH_LIBRARIES / "libtorch_cpu.so"))
libtorch.torch_exception_get_what_without_backtrace.restype = ctypes.c_char_p
capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype, capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class ShimError(RuntimeError):
    """A shim function returned an error status; the text is what it left for the caller."""


def call(name: str, *arguments: object) -> None:
    if getattr(library(), f"aoti_torch_mps_{name}")(*arguments):
        raise ShimError(libtorch.torch_exception_get_what_without_backtrace().decode())


class Kernel:
    """A kernel function of a shader library of its own."""

    def __init__(self, source: str, name: str) -> None:
        shader_library, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        call("create_shader_library", source.encode(), ctypes.byref(shader_library))
        call("get_kernel_function", shader_library, name.encode(), ctypes.byref(self.handle))
        call("delete_shader_library", shader_library)

    def start(self) -> None:
        call("start_encoding", self.handle)

    def set(self, index: int, value: Argument) -> None:
        if isinstance(value, int):
            call("set_arg_int", self.handle, ctypes.c_uint(index), ctypes.c_int64(value))
        else:
            capsule = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(value)
            tensor = ctypes.c_void_p(capsule_pointer(capsule, None))
            try:
                call("set_arg_tensor", self.handle, ctypes.c_uint(index), tensor)
            finally:
                libtorch.aoti_torch_delete_tensor_object(tensor)

    def dispatch(self, *threads: int, group: tuple[int, ...] | None = None) -> None:
        extents = (ctypes.c_uint64 * len(threads))(*threads)
        if group is None:
            call("dispatch_array", self.handle, extents, ctypes.c_size_t(len(threads)))
        else:
            sizes = (ctypes.c_uint64 * len(group))(*group)
            dimensions = ctypes.c_size_t(len(threads)), ctypes.c_size_t(len(group))
            call("dispatch_array_with_group_size", self.handle, extents, dimensions[0], sizes, dimensions[1])

    def run(self, encode: Callable[[], object]) -> None:
        """Call ``encode`` inside a command block."""
        error: list[BaseException] = []

        def callback(handle: int, data: int) -> None:
            try:
                encode()
            except BaseException as raised:
                error.append(raised)

        call("run_command_block", self.handle, Callback(callback), None)
        if error:
            raise error[0]

    def encode(self, *arguments: Argument, threads: tuple[int, ...], group: tuple[int, ...] | None = None) -> None:
        self.start()
        for index, value in enumerate(arguments):
            self.set(index, value)
        self.dispatch(*threads, group=group)

    def __call__(self, *arguments: Argument, threads: tuple[int, ...], group: tuple[int, ...] | None = None) -> None:
        self.run(lambda: self.encode(*arguments, threads=threads, group=group))
