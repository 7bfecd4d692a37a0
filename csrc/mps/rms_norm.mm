// rms_norm on device "mps": the kernels of _rms_norm and rms_norm_backward, defined in torch_fused_lora/ops.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../../metal/rms_norm.h"
#include "../plan/rows.h"
#include "kernels.h"
#include "tensors.h"

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

void check(const Expect& expect, const Tensor& x, const OptionalTensor& weight) {
  expect(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x", x, "shape (..., H) with H >= 1");
  expect(is_supported(x.scalar_type()), "x", x, kSupported);
  if (!weight.has_value()) return;
  const int64_t H = x.size(x.dim() - 1);
  expect(has_shape(*weight, {H}) && !weight->is_cpu(), "weight", *weight, "shape (", H, ",), on mps");
  const ScalarType dtype = weight->scalar_type();
  expect(
      dtype == x.scalar_type() || dtype == ScalarType::Float, "weight", *weight, name_of(x.scalar_type()),
      " or torch.float32");
}

NormWeight weight_of(const OptionalTensor& weight, Scalar dtype) {
  if (!weight.has_value()) return {false, dtype, 0, 0};
  const auto u = [](int64_t value) { return static_cast<uint64_t>(value); };
  return {true, scalar(weight->scalar_type()), u(weight->storage_offset()), u(weight->stride(0))};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, double eps) {
  check({"rms_norm"}, x, weight);
  const Tensor y = empty(with_last(x, x.size(x.dim() - 1)), x), rstd = empty_float(with_last(x, 1), x);
  if (x.numel() == 0) return {y, rstd};
  const Rows rows = rows_of(x);
  const Scalar dtype = scalar(x.scalar_type());
  const auto plan = plan_or_throw(RmsNormProblem{dtype, rows.operand, weight_of(weight, dtype), eps, gpu_cores()});
  launch(plan, {{NORM_X, rows.tensor}, {NORM_WEIGHT, weight}, {NORM_Y, y}, {NORM_RSTD, rstd}});
  return {y, rstd};
}

std::vector<Tensor> backward(
    const Tensor& grad,
    const Tensor& x,
    const OptionalTensor& weight,
    const Tensor& rstd,
    const std::vector<bool>& needs) {
  constexpr Expect expect = {"rms_norm_backward"};
  check(expect, x, weight);
  const int64_t H = x.size(x.dim() - 1);
  STD_TORCH_CHECK(
      needs.size() == 2 && (weight.has_value() || !needs[1]),
      "rms_norm_backward: needs: expected two flags, the second for a weight");
  const bool need_x = needs[0], need_weight = needs[1];
  expect(is_alike(grad, x), "grad", grad, "x's ", describe(x));
  const bool rstd_fits = !rstd.is_cpu() && rstd.scalar_type() == ScalarType::Float && has_shape(rstd, with_last(x, 1));
  expect(rstd_fits, "rstd", rstd, "a torch.float32 a row of x, on mps");

  OptionalTensor dx, dweight;
  if (need_x) dx = empty(with_last(x, H), x);
  if (need_weight) dweight = x.numel() == 0 ? torch::stable::new_zeros(*weight, weight->sizes()) : empty({H}, *weight);
  if (x.numel() > 0 && (need_x || need_weight)) {
    const Rows rows = rows_of(x), grad_rows = rows_of(grad);
    const Scalar dtype = scalar(x.scalar_type());
    const auto plan = plan_or_throw(RmsNormBackwardProblem{
        dtype, grad_rows.operand, rows.operand, weight_of(weight, dtype), need_x, need_weight, gpu_cores()});
    const OptionalTensor none, sums = plan.sums.splits > 1 ? empty_float({plan.sums.splits, H}, x) : dweight;
    const Tensor rstd_rows = torch::stable::contiguous(rstd);
    Dispatches dispatches;
    dispatches.add(
        plan,
        {{NORM_BACKWARD_GRAD, grad_rows.tensor},
         {NORM_BACKWARD_X, rows.tensor},
         {NORM_BACKWARD_WEIGHT, weight},
         {NORM_BACKWARD_RSTD, rstd_rows},
         {NORM_BACKWARD_DX, dx},
         {NORM_BACKWARD_DWEIGHT, sums}});
    dispatches.add(plan.sums, sums, none, dweight, none);
    dispatches.encode();
  }
  std::vector<Tensor> found;
  if (need_x) found.push_back(*dx);
  if (need_weight) found.push_back(*dweight);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_fused_lora, MPS, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&forward));
  m.impl("rms_norm_backward", TORCH_BOX(&backward));
}

}  // namespace torch_fused_lora
