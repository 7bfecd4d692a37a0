// The launch plan of the operators on rows: RMS norm and softmax.
#pragma once

#include "launch.h"

namespace torch_fused_lora {

/// Rows of H elements on one GPU: x (in softmax's backward the forward's result) and, in backward, grad; both M x H.
/// weight has H elements. All results are contiguous.
struct RowProblem {
  Scalar dtype, weight_dtype;
  Operand x, grad;
  uint64_t weight_offset, weight_stride;
  uint32_t has_weight, gpu_cores;
};

extern "C" {

// As in lora_plan.h: each function returns null or why the problem cannot be launched, and counts dispatches from 0.

/// y = x * rstd * weight with rstd = (mean of x^2 + eps)^(-1/2), M floats.
/// Tensors: x, weight, y, rstd.
const char* tfl_plan_rms_norm(const RowProblem*, double eps, uint32_t index, Launch*, uint32_t* count);

/// dx and dweight, those asked for. Tensors: grad, x, weight, rstd, dx, dweight. Where `*splits` > 1, dweight there is
/// float32 partial sums, splits x H, and the last dispatch is sum_splits with the tensors partial, partial, dweight,
/// dweight.
const char* tfl_plan_rms_norm_backward(
    const RowProblem*, uint32_t need_x, uint32_t need_weight, uint32_t index, Launch*, uint32_t* count,
    uint32_t* splits);

/// y = softmax of every row. Tensors: x, y.
const char* tfl_plan_softmax(const RowProblem*, uint32_t index, Launch*, uint32_t* count);

/// dx = y * (grad - sum of y * grad). Tensors: grad, y, dx.
const char* tfl_plan_softmax_backward(const RowProblem*, uint32_t index, Launch*, uint32_t* count);
}

}  // namespace torch_fused_lora
