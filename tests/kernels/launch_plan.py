"""The launch plan of csrc/ by ctypes, and the kernels of metal/ on torch CPU tensors, launched as it says.

Every function returns what the extension would have computed with the same launches, and records each dispatch's
report in `runs`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import runpy
from collections.abc import Sequence

import torch
from torch import Tensor

from tests import ROOT
from tests.emulator import metal_on_cpu

_EMBED_METAL = runpy.run_path(str(ROOT / "csrc" / "embed_metal.py"))
assemble, embed = _EMBED_METAL["assemble"], _EMBED_METAL["embed"]
OPERATORS = "decode", "delta", "delta_dx", "grad", "rms_norm", "rms_norm_backward", "softmax", "softmax_backward"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Operand(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("rows", "cols", "inner", "outer_stride", "row_stride", "col_stride", "offset")
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        *((name, Operand) for name in ("x", "weight", "lora_A", "lora_B", "dy")),
        ("y_offset", ctypes.c_uint64),
        ("bias_stride", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("has_bias", "save_h", "gpu_cores", "adapters")),
        ("ranks", ctypes.POINTER(ctypes.c_uint32)),
        ("dropout_p", ctypes.POINTER(ctypes.c_double)),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_char_p),
        ("kernel", ctypes.c_char_p),
        ("threads", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("tensors", ctypes.c_uint32),
        ("word_count", ctypes.c_uint32),
        ("words", ctypes.c_uint64 * 12),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The C++ of csrc/, with the sources of metal/ embedded as setup.py embeds them."""
    sources = ROOT / "build" / "tests" / "metal_sources.cpp"
    embed(ROOT / "metal", sources)
    flags = ["-std=c++17", f"-I{ROOT / 'metal'}"]  # its headers count for the cache
    path = metal_on_cpu.build_shared([*sorted((ROOT / "csrc").glob("*.cpp")), sources], "launch_plan", flags)
    plan = ctypes.CDLL(str(path))
    for operator in OPERATORS:
        getattr(plan, f"tfl_plan_{operator}").restype = ctypes.c_char_p
    return plan


def operand(x: Tensor) -> Operand:
    """A tensor of one to three dimensions as the kernels see it: its leading dimensions are rows."""
    strides, sizes = list(x.stride()), list(x.shape)
    while len(sizes) < 3:
        sizes.insert(0, 1)
        strides.insert(0, 0)
    outer, inner, cols = sizes
    col_stride = strides[2] if cols > 1 else 1
    if outer == 1 or strides[0] == inner * strides[1]:
        return Operand(outer * inner, cols, outer * inner, 0, strides[1], col_stride, x.storage_offset())
    return Operand(outer * inner, cols, inner, strides[0], strides[1], col_stride, x.storage_offset())


@dataclasses.dataclass
class Launcher:
    """Kernels of metal/ for one GPU, executed in one mode."""

    gpu_cores: int = 10
    trace: bool = False
    order: str = "forward"
    runs: list[tuple[str, metal_on_cpu.Report]] = dataclasses.field(default_factory=list)

    def _plan(self, function, problem: ctypes.Structure, before=(), after=()) -> list[Launch]:
        launches, count = [], ctypes.c_uint32(1)
        while len(launches) < count.value:
            launch = Launch()
            arguments = (ctypes.c_uint32(len(launches)), ctypes.byref(launch), ctypes.byref(count))
            error = function(ctypes.byref(problem), *before, *arguments, *after)
            if error:
                raise ValueError(error.decode())
            if count.value > 0:
                launches.append(launch)
        return launches

    def _dispatch(self, launch: Launch, tensors: Sequence[Tensor | None]) -> None:
        assert len(tensors) == launch.tensors
        kernel = metal_on_cpu.compile(launch.source.decode())[launch.kernel.decode()]
        words = [launch.words[i].to_bytes(8, "little") for i in range(launch.word_count)]
        report = kernel.dispatch(
            threads=launch.threads, group=launch.group, arguments=[*tensors, *words], trace=self.trace, order=self.order
        )
        self.runs.append((launch.kernel.decode(), report))


class Kernels(Launcher):
    """The kernels of a LoRA layer."""

    def decode(self, x, weight, bias, lora_A, lora_B, scaling, save_h=False) -> tuple[Tensor, Tensor | None]:
        """y (M, N) and h."""
        M, N = operand(x).rows, weight.shape[0]
        y, h = fresh(x, M, N), fresh(lora_A, M, lora_A.shape[0]) if save_h else None
        for launch in self.plan_decode(x, weight, bias, lora_A, lora_B, save_h):
            self._dispatch(launch, (x, weight, bias, lora_A, lora_B, y, h, scalar(scaling)))
        return y, h

    def plan_decode(self, x, weight, bias, lora_A, lora_B, save_h=False) -> list[Launch]:
        problem = self._problem(x, weight, lora_A, lora_B, save_h=save_h)
        problem.has_bias, problem.bias_stride = bias is not None, bias.stride(0) if bias is not None else 0
        return self._plan(library().tfl_plan_decode, problem)

    def delta(self, y, x, lora_A, lora_B, scaling, seed=0, dropout_p=(), ranks=(), save_h=False) -> Tensor | None:
        """Adds to y (M, N) in place; returns h."""
        h = fresh(lora_A, operand(x).rows, lora_A.shape[0]) if save_h else None
        for launch in self.plan_delta(y, x, lora_A, lora_B, dropout_p, ranks, save_h):
            self._dispatch(launch, (x, lora_A, lora_B, y, h, scalar(scaling), seed_tensor(seed)))
        return h

    def plan_delta(self, y, x, lora_A, lora_B, dropout_p=(), ranks=(), save_h=False) -> list[Launch]:
        problem = self._problem(x, None, lora_A, lora_B, dropout_p=dropout_p, ranks=ranks, save_h=save_h)
        problem.y_offset = y.storage_offset()
        return self._plan(library().tfl_plan_delta, problem)

    def delta_dx(self, dx, dy, lora_A, lora_B, scaling, seed=0, dropout_p=(), ranks=(), save_z=False) -> Tensor | None:
        """Adds to dx (M, K) in place, or computes nothing but z where dx is None; returns z."""
        z = fresh(lora_A, operand(dy).rows, lora_A.shape[0]) if save_z else None
        for launch in self.plan_delta_dx(dx, dy, lora_A, lora_B, dropout_p, ranks, save_z):
            self._dispatch(launch, (dy, lora_B, lora_A, dx, z, scalar(scaling), seed_tensor(seed)))
        return z

    def plan_delta_dx(self, dx, dy, lora_A, lora_B, dropout_p=(), ranks=(), save_z=False) -> list[Launch]:
        problem = self._problem(None, None, lora_A, lora_B, dy=dy, dropout_p=dropout_p, ranks=ranks, save_h=save_z)
        problem.y_offset = dx.storage_offset() if dx is not None else 0
        return self._plan(library().tfl_plan_delta_dx, problem, (ctypes.c_uint32(dx is None),))

    def grad(
        self, x, z, dy, h, lora_A, lora_B, scaling, seed=0, dropout_p=(), ranks=(), need_A=True, need_B=True
    ) -> tuple[Tensor | None, Tensor | None]:
        """dA (r, K) and dB (N, r), those asked for."""
        launches, splits = self.plan_grad(x, dy, lora_A, lora_B, dropout_p, ranks, need_A, need_B)
        dA, dB = (fresh(t, *t.shape) if need else None for t, need in ((lora_A, need_A), (lora_B, need_B)))
        out = partial = (dA, dB)
        if splits > 1:
            partial = tuple(fresh(torch.empty(0), splits, *t.shape) if t is not None else None for t in out)
        for launch in launches:
            if launch.kernel.startswith(b"sum_splits"):
                self._dispatch(launch, (*partial, *out))
            else:
                self._dispatch(launch, (x, z, dy, h, *partial, scalar(scaling), seed_tensor(seed)))
        return dA, dB

    def plan_grad(
        self, x, dy, lora_A, lora_B, dropout_p=(), ranks=(), need_A=True, need_B=True
    ) -> tuple[list[Launch], int]:
        """The dispatches, and over how many partial sums the rows are split."""
        problem = self._problem(x, None, lora_A, lora_B, dy=dy, dropout_p=dropout_p, ranks=ranks)
        splits = ctypes.c_uint32()
        needs = ctypes.c_uint32(need_A), ctypes.c_uint32(need_B)
        launches = self._plan(library().tfl_plan_grad, problem, needs, (ctypes.byref(splits),))
        return launches, splits.value

    def _problem(
        self,
        x,
        weight,
        lora_A,
        lora_B,
        dy=None,
        dropout_p: Sequence[float] = (),
        ranks: Sequence[int] = (),
        save_h=False,
    ) -> Problem:
        dtype = (x if x is not None else dy).dtype
        problem = Problem(DTYPES[dtype], DTYPES[lora_A.dtype], gpu_cores=self.gpu_cores, save_h=save_h)
        (r, K), N = lora_A.shape, lora_B.shape[0]
        problem.lora_A, problem.lora_B = operand(lora_A), operand(lora_B)
        problem.weight = operand(weight) if weight is not None else Operand(N, K)
        rows = operand(x if x is not None else dy).rows
        problem.x = operand(x) if x is not None else Operand(rows, K)
        problem.dy = operand(dy) if dy is not None else Operand(rows, N)
        if dropout_p:
            problem.adapters = len(dropout_p)
            problem.ranks = (ctypes.c_uint32 * len(dropout_p))(*(ranks or (r,)))
            problem.dropout_p = (ctypes.c_double * len(dropout_p))(*dropout_p)
        return problem


def fresh(like: Tensor, *shape: int) -> Tensor:
    """What a kernel has to write whole: NaN until then."""
    return torch.full(shape, torch.nan, dtype=like.dtype)


def scalar(value: float) -> bytes:
    return torch.tensor(value, dtype=torch.float32).numpy().tobytes()


def seed_tensor(seed: int) -> bytes:
    return seed.to_bytes(8, "little")
