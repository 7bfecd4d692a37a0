"""The launch plan of csrc/ by ctypes, and the kernels of metal/ on torch CPU tensors, launched as it says.

Every function returns what the extension would have computed with the same launches, and records each dispatch's
report in `runs`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import runpy
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests import ROOT
from tests.emulator import metal_on_cpu
from torch_fused_lora.affine import Packed
from torch_fused_lora.ops.rows import METAL_DTYPES

_EMBED = runpy.run_path(str(ROOT / "metal" / "embed.py"))
assemble, embed = _EMBED["assemble"], _EMBED["embed"]
DTYPES = {dtype: number for number, dtype in enumerate(METAL_DTYPES)}


class Operand(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("rows", "cols", "inner", "outer_stride", "row_stride", "col_stride", "offset")
    ]


class Dropout(ctypes.Structure):
    _fields_ = [
        ("adapters", ctypes.c_uint32),
        ("ranks", ctypes.POINTER(ctypes.c_uint32)),
        ("p", ctypes.POINTER(ctypes.c_double)),
    ]

    @classmethod
    def of(cls, p: Sequence[float], ranks: Sequence[int]) -> Dropout:
        count = len(p)
        return cls(count, (ctypes.c_uint32 * count)(*ranks), (ctypes.c_double * count)(*p)) if p else cls()


class Weight(ctypes.Structure):
    _fields_ = [
        ("operand", Operand),
        ("bits", ctypes.c_uint32),
        ("group_size", ctypes.c_uint32),
        ("scale_dtype", ctypes.c_int32),
        ("has_table", ctypes.c_bool),
    ]


class DecodeProblem(ctypes.Structure):
    plan = "plan_decode"
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        ("x", Operand),
        ("weight", Weight),
        *((name, Operand) for name in ("lora_A", "lora_B")),
        ("bias_stride", ctypes.c_uint64),
        ("has_bias", ctypes.c_bool),
        ("save_h", ctypes.c_bool),
        ("gpu_cores", ctypes.c_uint32),
    ]


class DeltaProblem(ctypes.Structure):
    plan = "plan_delta"
    _fields_ = [
        ("is_backward", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        *((name, Operand) for name in ("input", "lora_A", "lora_B")),
        ("has_out", ctypes.c_bool),
        ("has_low_rank", ctypes.c_bool),
        ("out_offset", ctypes.c_uint64),
        ("dropout", Dropout),
        ("gpu_cores", ctypes.c_uint32),
    ]


class GemmProblem(ctypes.Structure):
    plan = "plan_gemm"
    _fields_ = [
        ("is_backward", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        ("input", Operand),
        ("weight", Weight),
        ("factor", Operand),
        ("bias_stride", ctypes.c_uint64),
        ("has_bias", ctypes.c_bool),
        ("dropout_p", ctypes.c_double),
        ("gpu_cores", ctypes.c_uint32),
    ]


class GradProblem(ctypes.Structure):
    plan = "plan_grad"
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        ("x", Operand),
        ("dy", Operand),
        ("r", ctypes.c_uint64),
        ("need_A", ctypes.c_bool),
        ("need_B", ctypes.c_bool),
        ("dropout", Dropout),
        ("gpu_cores", ctypes.c_uint32),
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

    def constants(self) -> list[bytes]:
        """What the buffers behind the kernel's tensors get."""
        return [self.words[i].to_bytes(8, "little") for i in range(self.word_count)]


def build() -> Path:
    """The C++ of csrc/plan/, with the sources of metal/ embedded as setup.py embeds them, and plan_by_index.cpp."""
    sources = ROOT / "build" / "tests" / "metal_sources.cpp"
    embed(ROOT / "metal", sources)
    flags = ["-std=c++20", f"-I{ROOT / 'metal'}", f"-I{ROOT / 'csrc' / 'plan'}"]  # their headers count for the cache
    adapter = Path(__file__).with_name("plan_by_index.cpp")
    return metal_on_cpu.build_shared(
        [*sorted((ROOT / "csrc/plan").glob("*.cpp")), adapter, sources], "launch_plan", flags
    )


@functools.cache
def library(path: Path | None = None) -> ctypes.CDLL:
    """The plan as ``build`` has it, or built elsewhere."""
    plan = ctypes.CDLL(str(path or build()))
    plan.override_plans.restype = ctypes.c_char_p
    return plan


@contextlib.contextmanager
def overridden(text: str) -> Iterator[None]:
    """Plans as TORCH_FUSED_LORA_PLAN=text has them."""
    if error := library().override_plans(text.encode()):
        raise ValueError(error.decode())
    try:
        yield
    finally:
        library().override_plans(b"")


def operand(x: Tensor | None) -> Operand:
    """A tensor of one to three dimensions as the kernels see it: its leading dimensions are rows. None has none."""
    if x is None:
        return Operand()
    strides, sizes = list(x.stride()), list(x.shape)
    while len(sizes) < 3:
        sizes.insert(0, 1)
        strides.insert(0, 0)
    outer, inner, cols = sizes
    col_stride = strides[2] if cols > 1 else 1
    if outer == 1 or strides[0] == inner * strides[1]:
        return Operand(outer * inner, cols, outer * inner, 0, strides[1], col_stride, x.storage_offset())
    return Operand(outer * inner, cols, inner, strides[0], strides[1], col_stride, x.storage_offset())


def shape_of(weight: Tensor | Packed) -> tuple[int, int]:
    """N and K."""
    if isinstance(weight, Tensor):
        return tuple(weight.shape)
    N, groups = weight.scales.shape
    return N, groups * weight.group_size


def weight_of(weight: Tensor | Packed) -> Weight:
    """As the plan takes it."""
    if isinstance(weight, Tensor):
        return Weight(operand(weight))
    N, K = shape_of(weight)
    whole, scale_dtype = Operand(N, K, N, 0, K, 1, 0), DTYPES[weight.scales.dtype]
    return Weight(whole, weight.bits, weight.group_size, scale_dtype, weight.has_table)


@dataclasses.dataclass
class Launcher:
    """Kernels of metal/ for one GPU, executed in one mode."""

    gpu_cores: int = 10
    trace: bool = False
    order: str = "forward"
    runs: list[tuple[str, metal_on_cpu.Report]] = dataclasses.field(default_factory=list)

    @staticmethod
    def _plan(problem: ctypes.Structure) -> tuple[list[Launch], int, int]:
        """The dispatches, how many partial sums the last one adds up, and of how many elements each."""
        function = getattr(library(), problem.plan)
        function.restype = ctypes.c_char_p
        launches, count, splits, elements = [], ctypes.c_uint32(1), ctypes.c_uint32(), ctypes.c_uint64()
        while len(launches) < count.value:
            launch, index = Launch(), ctypes.c_uint32(len(launches))
            results = map(ctypes.byref, (launch, count, splits, elements))
            error = function(ctypes.byref(problem), index, *results)
            if error:
                raise ValueError(error.decode())
            if count.value > 0:
                launches.append(launch)
        return launches, splits.value, elements.value

    def _dispatch(self, launch: Launch, tensors: Sequence[Tensor | None]) -> None:
        assert len(tensors) == launch.tensors
        kernel = metal_on_cpu.compile(launch.source.decode(), trace=self.trace)[launch.kernel.decode()]
        report = kernel.dispatch(
            threads=launch.threads,
            group=launch.group,
            arguments=[*tensors, *launch.constants()],
            trace=self.trace,
            order=self.order,
        )
        self.runs.append((launch.kernel.decode(), report))


class Kernels(Launcher):
    """The kernels of a LoRA layer."""

    def decode(self, x, weight, bias, lora_A, lora_B, scaling, save_h=False) -> tuple[Tensor, Tensor | None]:
        """y (M, N) and h."""
        M, N = operand(x).rows, shape_of(weight)[0]
        y, h = fresh(x, M, N), fresh(lora_A, M, lora_A.shape[0]) if save_h else None
        launches, h_sums = self._plan_decode(x, weight, bias, lora_A, lora_B, save_h)
        for launch in launches:
            self._dispatch(launch, (x, *buffers(weight), bias, lora_A, lora_B, y, h, h_sums, scalar(scaling)))
        return y, h

    def plan_decode(self, x, weight, bias, lora_A, lora_B, save_h=False) -> list[Launch]:
        return self._plan_decode(x, weight, bias, lora_A, lora_B, save_h)[0]

    def _plan_decode(self, x, weight, bias, lora_A, lora_B, save_h) -> tuple[list[Launch], Tensor | None]:
        """The dispatches, and scratch that they share."""
        dtypes, stride = _dtypes(x, lora_A), bias.stride(0) if bias is not None else 0
        operands = operand(x), weight_of(weight), operand(lora_A), operand(lora_B)
        problem = DecodeProblem(*dtypes, *operands, stride, bias is not None, save_h, self.gpu_cores)
        launches, _, elements = self._plan(problem)
        return launches, fresh(torch.empty(0), elements) if elements else None

    def delta(self, y, x, lora_A, lora_B, scaling, seed=0, dropout_p=(), ranks=(), save_h=False) -> Tensor | None:
        """Adds to y (M, N) in place; returns h."""
        h = fresh(lora_A, operand(x).rows, lora_A.shape[0]) if save_h else None
        launches, partial = self._plan_pass(False, y, x, lora_A, lora_B, dropout_p, ranks, save_h)
        for launch in launches:
            self._dispatch(launch, (x, lora_A, lora_B, y, h, partial, scalar(scaling), seed_tensor(seed)))
        return h

    def plan_delta(self, y, x, lora_A, lora_B, dropout_p=(), ranks=(), save_h=False) -> list[Launch]:
        return self._plan_pass(False, y, x, lora_A, lora_B, dropout_p, ranks, save_h)[0]

    def delta_dx(self, dx, dy, lora_A, lora_B, scaling, seed=0, dropout_p=(), ranks=(), save_z=False) -> Tensor | None:
        """Adds to dx (M, K) in place, or computes nothing but z where dx is None; returns z."""
        z = fresh(lora_A, operand(dy).rows, lora_A.shape[0]) if save_z else None
        launches, partial = self._plan_pass(True, dx, dy, lora_A, lora_B, dropout_p, ranks, save_z)
        for launch in launches:
            self._dispatch(launch, (dy, lora_B, lora_A, dx, z, partial, scalar(scaling), seed_tensor(seed)))
        return z

    def plan_delta_dx(self, dx, dy, lora_A, lora_B, dropout_p=(), ranks=(), save_z=False) -> list[Launch]:
        return self._plan_pass(True, dx, dy, lora_A, lora_B, dropout_p, ranks, save_z)[0]

    def _plan_pass(
        self, is_backward, out, x, lora_A, lora_B, dropout_p, ranks, save
    ) -> tuple[list[Launch], Tensor | None]:
        """The dispatches, and scratch that they share."""
        dtypes, operands = _dtypes(x, lora_A), map(operand, (x, lora_A, lora_B))
        offset, dropout = (
            out.storage_offset() if out is not None else 0,
            Dropout.of(dropout_p, ranks or lora_A.shape[:1]),
        )
        problem = DeltaProblem(is_backward, *dtypes, *operands, out is not None, save, offset, dropout, self.gpu_cores)
        launches, splits, elements = self._plan(problem)
        return launches, fresh(torch.empty(0), splits, elements) if elements else None

    def gemm(self, x, weight, bias, lora_B, h, scaling) -> Tensor:
        """y (M, N), of a weight packed or not; without an adapter where h is None."""
        return self._gemm(False, x, weight, bias, lora_B, h, scaling)

    def gemm_dx(self, dy, weight, lora_A, z, scaling, seed=0, dropout_p=0.0) -> Tensor:
        """dx (M, K)."""
        return self._gemm(True, dy, weight, None, lora_A, z, scaling, seed, dropout_p)

    def _gemm(self, is_backward, x, weight, bias, factor, h, scaling, seed=0, dropout_p=0.0) -> Tensor:
        y = fresh(x, operand(x).rows, shape_of(weight)[is_backward])
        launches, splits = self._plan_gemm(is_backward, x, weight, bias, factor, dropout_p)
        written = fresh(torch.empty(0), splits, *y.shape) if splits > 1 else y
        for launch in launches:
            if launch.kernel.startswith(b"sum_splits"):
                self._dispatch(launch, (written, None, y, None))
            else:
                tensors = x, *buffers(weight), bias, h, factor, written
                self._dispatch(launch, (*tensors, scalar(scaling), seed_tensor(seed)))
        return y

    def plan_gemm(self, is_backward, x, weight, bias, factor, dropout_p=0.0) -> list[Launch]:
        return self._plan_gemm(is_backward, x, weight, bias, factor, dropout_p)[0]

    def _plan_gemm(self, is_backward, x, weight, bias, factor, dropout_p) -> tuple[list[Launch], int]:
        """The dispatches, and over how many partial sums the terms are split."""
        dtypes = _dtypes(x, factor)
        shapes = operand(x), weight_of(weight), operand(factor)
        stride = bias.stride(0) if bias is not None else 0
        return self._plan(
            GemmProblem(is_backward, *dtypes, *shapes, stride, bias is not None, dropout_p, self.gpu_cores)
        )[:2]

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
        (r, K), N = lora_A.shape, lora_B.shape[0]
        rows = operand(dy if dy is not None else x).rows
        operands = (operand(t) if t is not None else Operand(rows, cols) for t, cols in ((x, K), (dy, N)))
        dtypes, dropout = _dtypes(x if x is not None else dy, lora_A), Dropout.of(dropout_p, ranks or (r,))
        return self._plan(GradProblem(*dtypes, *operands, r, need_A, need_B, dropout, self.gpu_cores))[:2]


def buffers(weight: Tensor | Packed) -> tuple[Tensor | None, ...]:
    """What a kernel is given of a weight."""
    return weight[:3] if isinstance(weight, Packed) else (weight, None, None)


def _dtypes(x: Tensor, lora_A: Tensor | None) -> tuple[int, int]:
    return DTYPES[x.dtype], DTYPES[(x if lora_A is None else lora_A).dtype]


def fresh(like: Tensor, *shape: int) -> Tensor:
    """What a kernel has to write whole: NaN until then."""
    return torch.full(shape, torch.nan, dtype=like.dtype)


def scalar(value: float) -> bytes:
    return struct.pack("<f", value)


def seed_tensor(seed: int) -> bytes:
    return seed.to_bytes(8, "little")
