"""The row kernels of metal/ on torch CPU tensors, launched as csrc/row_plan.h says: see launch_plan.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tests.kernels.launch_plan import DTYPES, Launch, Launcher, Operand, fresh, library, operand


class RowProblem(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("x", Operand),
        ("grad", Operand),
        ("weight_offset", ctypes.c_uint64),
        ("weight_stride", ctypes.c_uint64),
        ("has_weight", ctypes.c_uint32),
        ("gpu_cores", ctypes.c_uint32),
    ]


class RowKernels(Launcher):
    """RMS norm and softmax; results are M x H, whatever the leading dimensions of x."""

    def rms_norm(self, x, weight, eps=1e-6) -> tuple[Tensor, Tensor]:
        """y and rstd (M,)."""
        y, rstd = self._result(x), fresh(torch.empty(0), operand(x).rows)
        for launch in self.plan_rms_norm(x, weight, eps):
            self._dispatch(launch, (x, weight, y, rstd))
        return y, rstd

    def plan_rms_norm(self, x, weight, eps=1e-6) -> list[Launch]:
        before = (ctypes.c_double(eps),)
        return self._plan(library().tfl_plan_rms_norm, self._problem(x, weight=weight), before)

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
        splits = ctypes.c_uint32()
        needs = ctypes.c_uint32(need_x), ctypes.c_uint32(need_weight)
        problem = self._problem(x, grad, weight)
        launches = self._plan(library().tfl_plan_rms_norm_backward, problem, needs, (ctypes.byref(splits),))
        return launches, splits.value

    def softmax(self, x) -> Tensor:
        y = self._result(x)
        for launch in self.plan_softmax(x):
            self._dispatch(launch, (x, y))
        return y

    def plan_softmax(self, x) -> list[Launch]:
        return self._plan(library().tfl_plan_softmax, self._problem(x))

    def softmax_backward(self, grad, y) -> Tensor:
        dx = self._result(y)
        for launch in self.plan_softmax_backward(grad, y):
            self._dispatch(launch, (grad, y, dx))
        return dx

    def plan_softmax_backward(self, grad, y) -> list[Launch]:
        return self._plan(library().tfl_plan_softmax_backward, self._problem(y, grad))

    def _problem(self, x, grad=None, weight=None) -> RowProblem:
        problem = RowProblem(DTYPES[x.dtype], x=operand(x), gpu_cores=self.gpu_cores)
        if grad is not None:
            problem.grad = operand(grad)
        if weight is not None:
            problem.has_weight, problem.weight_dtype = True, DTYPES[weight.dtype]
            problem.weight_offset, problem.weight_stride = weight.storage_offset(), weight.stride(0)
        return problem

    @staticmethod
    def _result(x: Tensor) -> Tensor:
        return fresh(x, operand(x).rows, x.shape[-1])
