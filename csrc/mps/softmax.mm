// softmax on device "mps": the kernels of softmax and softmax_backward, defined in torch_fused_lora/ops. Along the last
// dimension by this package's kernels, along another one by torch's own.
#include <torch/csrc/stable/library.h>

#include "../../metal/softmax.h"
#include "../plan/rows.h"
#include "kernels.h"
#include "tensors.h"

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

/// `dim` counted from 0.
int64_t check(const Expect& expect, const char* name, const Tensor& x, int64_t dim) {
  expect(is_supported(x.scalar_type()), name, x, kSupported);
  const int64_t most = x.dim() > 0 ? x.dim() : 1;
  expect(-most <= dim && dim < most, name, x, "a dimension ", dim);
  return dim < 0 ? dim + most : dim;
}

Tensor forward(const Tensor& x, int64_t dim) {
  dim = check({"softmax"}, "x", x, dim);
  if (dim != x.dim() - 1) return torch::stable::contiguous(call<Tensor>("aten::_softmax", "", x, dim, false));
  const Tensor y = empty(with_last(x, x.size(dim)), x);
  if (x.numel() == 0) return y;
  const Rows rows = rows_of(x);
  const auto plan = plan_or_throw(SoftmaxProblem{scalar(x.scalar_type()), rows.operand, gpu_cores()});
  launch(plan, {{SOFTMAX_X, rows.tensor}, {SOFTMAX_Y, y}});
  return y;
}

Tensor backward(const Tensor& grad, const Tensor& y, int64_t dim) {
  constexpr Expect expect = {"softmax_backward"};
  dim = check(expect, "y", y, dim);
  expect(is_alike(grad, y), "grad", grad, "y's ", describe(y));
  if (dim != y.dim() - 1) {
    const Tensor dx = call<Tensor>("aten::_softmax_backward_data", "", grad, y, dim, y.scalar_type());
    return torch::stable::contiguous(dx);
  }
  const Tensor dx = empty(with_last(y, y.size(dim)), y);
  if (y.numel() == 0) return dx;
  const Rows rows = rows_of(y), grad_rows = rows_of(grad);
  const auto plan =
      plan_or_throw(SoftmaxBackwardProblem{scalar(y.scalar_type()), grad_rows.operand, rows.operand, gpu_cores()});
  launch(
      plan, {{SOFTMAX_BACKWARD_GRAD, grad_rows.tensor}, {SOFTMAX_BACKWARD_Y, rows.tensor}, {SOFTMAX_BACKWARD_DX, dx}});
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_fused_lora, MPS, m) {
  m.impl("softmax_forward", TORCH_BOX(&forward));
  m.impl("softmax_backward", TORCH_BOX(&backward));
}

}  // namespace torch_fused_lora
