"""The row kernels of metal/ on torch CPU tensors, launched as csrc/plan/rows.h says: see launch_plan.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tests.kernels.launch_plan import DTYPES, Launch, Launcher, Operand, fresh, operand


class NormWeight(ctypes.Structure):
    _fields_ = [
        ("given", ctypes.c_bool),
        ("dtype", ctypes.c_int32),
        ("offset", ctypes.c_uint64),
        ("stride", ctypes.c_uint64),
    ]

    @classmethod
    def of(cls, weight: Tensor | None, x: Tensor) -> NormWeight:
        if weight is None:
            return cls(dtype=DTYPES[x.dtype])
        return cls(True, DTYPES[weight.dtype], weight.storage_offset(), weight.stride(0))


class RmsNormProblem(ctypes.Structure):
    plan = "plan_rms_norm"
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("x", Operand),
        ("weight", NormWeight),
        ("eps", ctypes.c_double),
        ("gpu_cores", ctypes.c_uint32),
    ]


class RmsNormBackwardProblem(ctypes.Structure):
    plan = "plan_rms_norm_backward"
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("grad", Operand),
        ("x", Operand),
        ("weight", NormWeight),
        ("need_x", ctypes.c_bool),
        ("need_weight", ctypes.c_bool),
        ("gpu_cores", ctypes.c_uint32),
    ]


class SoftmaxProblem(ctypes.Structure):
    plan = "plan_softmax"
    _fields_ = [("dtype", ctypes.c_int32), ("x", Operand), ("gpu_cores", ctypes.c_uint32)]


class SoftmaxBackwardProblem(ctypes.Structure):
    plan = "plan_softmax_backward"
    _fields_ = [("dtype", ctypes.c_int32), ("grad", Operand), ("y", Operand), ("gpu_cores", ctypes.c_uint32)]


class RowKernels(Launcher):
    """RMS norm and softmax; results are M x H, whatever the leading dimensions of x."""

    def rms_norm(self, x, weight, eps=1e-6) -> tuple[Tensor, Tensor]:
        """y and rstd (M,)."""
        y, rstd = self._result(x), fresh(torch.empty(0), operand(x).rows)
        for launch in self.plan_rms_norm(x, weight, eps):
            self._dispatch(launch, (x, weight, y, rstd))
        return y, rstd

    def plan_rms_norm(self, x, weight, eps=1e-6) -> list[Launch]:
        return self._plan(RmsNormProblem(DTYPES[x.dtype], operand(x), NormWeight.of(weight, x), eps, self.gpu_cores))[0]

    def rms_norm_backward(
        self, grad, x, weight, rstd, need_x=True, need_weight=True
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx and dweight, those asked for."""
        launches, splits = self.plan_rms_norm_backward(grad, x, weight, need_x, need_weight)
        dx = self._result(x) if need_x else None
        dweight = partial = fresh(weight, *weight.shape) if need_weight else None
        if splits > 1:
            partial = fresh(torch.empty(0), splits, *weight.shape)
        for launch in launches:
            if launch.kernel.startswith(b"sum_splits"):
                self._dispatch(launch, (partial, partial, dweight, dweight))
            else:
                self._dispatch(launch, (grad, x, weight, rstd, dx, partial))
        return dx, dweight

    def plan_rms_norm_backward(self, grad, x, weight, need_x=True, need_weight=True) -> tuple[list[Launch], int]:
        """The dispatches, and over how many partial sums the rows are split."""
        operands = operand(grad), operand(x), NormWeight.of(weight, x)
        problem = RmsNormBackwardProblem(DTYPES[x.dtype], *operands, need_x, need_weight, self.gpu_cores)
        return self._plan(problem)[:2]

    def softmax(self, x) -> Tensor:
        y = self._result(x)
        for launch in self.plan_softmax(x):
            self._dispatch(launch, (x, y))
        return y

    def plan_softmax(self, x) -> list[Launch]:
        return self._plan(SoftmaxProblem(DTYPES[x.dtype], operand(x), self.gpu_cores))[0]

    def softmax_backward(self, grad, y) -> Tensor:
        dx = self._result(y)
        for launch in self.plan_softmax_backward(grad, y):
            self._dispatch(launch, (grad, y, dx))
        return dx

    def plan_softmax_backward(self, grad, y) -> list[Launch]:
        return self._plan(SoftmaxBackwardProblem(DTYPES[y.dtype], operand(grad), operand(y), self.gpu_cores))[0]

    @staticmethod
    def _result(x: Tensor) -> Tensor:
        return fresh(x, operand(x).rows, x.shape[-1])
