// rms_norm on device "mps": the kernels of _rms_norm and rms_norm_backward, defined in torch_fused_lora/ops.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "mps_kernels.h"
#include "row_plan.h"
#include "tensors.h"

namespace torch_fused_lora {
namespace {

void check(const Expect& expect, const Tensor& x, const OptionalTensor& weight) {
  expect(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x", x, "shape (..., H) with H >= 1");
  expect(is_supported(x.scalar_type()), "x", x, "float16, bfloat16 or float32, which device mps has");
  if (!weight.has_value()) return;
  const int64_t H = x.size(x.dim() - 1);
  expect(has_shape(*weight, {H}) && !weight->is_cpu(), "weight", *weight, "shape (", H, ",), on mps");
  const ScalarType dtype = weight->scalar_type();
  expect(
      dtype == x.scalar_type() || dtype == ScalarType::Float, "weight", *weight, name_of(x.scalar_type()),
      " or torch.float32");
}

RowProblem problem_of(const Rows& x, const OptionalTensor& weight) {
  RowProblem problem = {};
  problem.dtype = problem.weight_dtype = scalar(x.tensor.scalar_type());
  problem.x = x.operand;
  problem.gpu_cores = gpu_cores();
  if (weight.has_value()) {
    problem.has_weight = 1;
    problem.weight_dtype = scalar(weight->scalar_type());
    problem.weight_offset = static_cast<uint64_t>(weight->storage_offset());
    problem.weight_stride = static_cast<uint64_t>(weight->stride(0));
  }
  return problem;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, double eps) {
  check({"rms_norm"}, x, weight);
  const Tensor y = empty(with_last(x, x.size(x.dim() - 1)), x), rstd = empty_float(with_last(x, 1), x);
  if (x.numel() == 0) return {y, rstd};
  const Rows rows = rows_of(x);
  const RowProblem problem = problem_of(rows, weight);
  const auto plan = [&](uint32_t i, Launch* l, uint32_t* n) { return tfl_plan_rms_norm(&problem, eps, i, l, n); };
  const Batch batch = {plan_all(plan), {rows.tensor, weight, y, rstd}, {}};
  encode({&batch, 1});
  return {y, rstd};
}

std::vector<Tensor> backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& weight, const Tensor& rstd,
    const std::vector<bool>& needs) {
  constexpr Expect expect = {"rms_norm_backward"};
  check(expect, x, weight);
  const int64_t H = x.size(x.dim() - 1);
  STD_TORCH_CHECK(
      needs.size() == 2 && (weight.has_value() || !needs[1]),
      "rms_norm_backward: needs: expected two flags, the second for a weight");
  const bool need_x = needs[0], need_weight = needs[1];
  expect(is_alike(grad, x), "grad", grad, "x's ", describe(x));
  const bool rstd_fits =
      !rstd.is_cpu() && rstd.scalar_type() == ScalarType::Float && has_shape(rstd, with_last(x, 1));
  expect(rstd_fits, "rstd", rstd, "a torch.float32 a row of x, on mps");

  Binding dx, dweight, partial;
  if (need_x) dx = empty(with_last(x, H), x);
  if (need_weight) dweight = x.numel() == 0 ? torch::stable::new_zeros(*weight, weight->sizes()) : empty({H}, *weight);
  if (x.numel() > 0 && (need_x || need_weight)) {
    const Rows rows = rows_of(x), grad_rows = rows_of(grad);
    RowProblem problem = problem_of(rows, weight);
    problem.grad = grad_rows.operand;
    uint32_t splits = 1;
    std::vector<Launch> launches = plan_all([&](uint32_t i, Launch* l, uint32_t* n) {
      return tfl_plan_rms_norm_backward(&problem, need_x, need_weight, i, l, n, &splits);
    });
    std::vector<Batch> batches(1);
    partial = dweight;
    if (need_weight && splits > 1) {
      partial = empty_float({splits, H}, x);
      batches.push_back({{launches.back()}, {partial, partial, dweight, dweight}, {}});
      launches.pop_back();
    }
    batches[0] = {
        launches, {grad_rows.tensor, rows.tensor, weight, torch::stable::contiguous(rstd), dx, partial}, {}};
    encode(batches);
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
