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
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype, capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class ShimError(RuntimeError):
    """A shim function returned an error status; the text is what it left for the caller."""


def call(name: str, *arguments: object) -> None:
    if getattr(library(), f"aoti_torch_mps_{name}")(*arguments):
        raise ShimError(libtorch.torch_exception_get_what_without_backtrace().decode())


ABI_VERSION = sum(int(part) << shift for part, shift in zip(torch.__version__.split(".")[:2], (56, 48), strict=True))


def call_operator(name: str, overload: str, *arguments: torch.Tensor | None) -> None:
    """Call an ATen operator as an extension does, by the stable ABI's torch_call_dispatcher; the result is dropped.

    A tensor as the last of three arguments is an optional one.
    """
    stack = (ctypes.c_uint64 * len(arguments))(*[handle(value) if value is not None else 0 for value in arguments])
    if len(arguments) == 3 and arguments[2] is not None:
        box = ctypes.c_uint64.from_address(libc.malloc(8))  # the callee deletes it
        box.value, stack[2] = stack[2], ctypes.addressof(box)
    text = [word.encode() for word in (name, overload)]
    if library().torch_call_dispatcher(*text, stack, ctypes.c_uint64(ABI_VERSION)):
        raise ShimError(libtorch.torch_exception_get_what_without_backtrace().decode())
    libtorch.aoti_torch_delete_tensor_object(ctypes.c_void_p(stack[0]))


def handle(tensor: torch.Tensor) -> int:
    """A new AtenTensorHandle, which its receiver deletes."""
    return capsule_pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor), None)


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
            tensor = ctypes.c_void_p(handle(value))
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
