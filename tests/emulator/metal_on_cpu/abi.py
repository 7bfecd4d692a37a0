"""runtime/executor.h for ctypes."""

from __future__ import annotations

import ctypes
from functools import cache

from .toolchain import runtime

BUFFERS, MAX_FINDINGS = 31, 64
UNBOUND, BUFFER, BYTES = range(3)
NO_SPACE, DEVICE, DEVICE_CONST, CONSTANT = range(4)
ORDERS = {"forward": 0, "reverse": 1, "permuted": 2}
KINDS = (
    *("race", "group-race", "uninitialised", "out-of-bounds", "divergent-barrier", "divergent-simd", "limit", "fault"),
)
NOTHING, BUFFER_OBJECT, THREADGROUP_OBJECT, CONSTANT_OBJECT, ARRAY_OBJECT = range(5)
u32, u64, i64 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64


class Parameter(ctypes.Structure):
    _fields_ = [("index", u32), ("space", u32), ("size", u32), ("alignment", u32)]


class Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", u64), ("binding", u32), ("space", u32), ("granule", u32)]


class Dispatch(ctypes.Structure):
    _fields_ = [
        *[
            ("launch", ctypes.c_void_p),
            ("threads", u32 * 3),
            ("group", u32 * 3),
            ("order", u32),
            ("most_groups", u32),
            ("trace", u32),
        ],
        ("buffers", Buffer * BUFFERS),
    ]


class RawFinding(ctypes.Structure):
    _fields_ = [
        *[("kind", u32), ("object", u32), ("index", u32), ("store", u32), ("offset", i64), ("size", u64)],
        *[("object_size", u64), ("pc", u64), ("thread", u32 * 3), ("group", u32 * 3)],
        *[("other_thread", u32), ("other_group", u32), ("other_store", u32), ("name", ctypes.c_char_p)],
    ]


class RawReport(ctypes.Structure):
    _fields_ = [
        *[("loaded", u64 * BUFFERS), ("stored", u64 * BUFFERS), ("constant_loaded", u64), ("barriers", u64)],
        *[("simdgroup_barriers", u64), ("matrix_multiplies", u64), ("threadgroups", u64), ("threadgroup_bytes", u64)],
        *[
            (name, u64)
            for name in ("threadgroup_accessed", "longest_steps", "longest_multiplies", "longest_collectives")
        ],
        *[("complete", u32), ("finding_count", u32), ("findings", RawFinding * MAX_FINDINGS)],
    ]


@cache
def executor() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime()))
    library.executor_dispatch.argtypes = [ctypes.POINTER(Dispatch), ctypes.POINTER(RawReport)]
    library.executor_dispatch.restype = None
    return library
