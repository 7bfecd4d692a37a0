// The launch plans of the kernels on rows, RMS norm and softmax. x, y and grad are M x H; all results are contiguous.
#pragma once

#include "configuration.h"
#include "launch.h"

namespace torch_fused_lora {

/// H elements, or none: then all are one, of the rows' dtype.
struct NormWeight {
  bool given;
  Scalar dtype;
  uint64_t offset, stride;
};

/// rms_norm: y = x * rstd * weight with rstd = (mean of x^2 + eps)^(-1/2), M floats.
struct RmsNormProblem {
  Scalar dtype;
  Operand x;
  NormWeight weight;
  double eps;
  uint32_t gpu_cores;
};

/// rms_norm_backward: dx and dweight, those asked for. With partial sums, dweight there is splits x H.
struct RmsNormBackwardProblem {
  Scalar dtype;
  Operand grad, x;
  NormWeight weight;
  bool need_x, need_weight;
  uint32_t gpu_cores;
};

/// softmax: y = softmax of every row.
struct SoftmaxProblem {
  Scalar dtype;
  Operand x;
  uint32_t gpu_cores;
};

/// softmax_backward: dx = y * (grad - sum of y * grad).
struct SoftmaxBackwardProblem {
  Scalar dtype;
  Operand grad, y;
  uint32_t gpu_cores;
};

Plan<RowConfiguration> plan(const RmsNormProblem& problem);
Plan<RowConfiguration> plan(const RmsNormBackwardProblem& problem);
Plan<RowConfiguration> plan(const SoftmaxProblem& problem);
Plan<RowConfiguration> plan(const SoftmaxBackwardProblem& problem);

}  // namespace torch_fused_lora
