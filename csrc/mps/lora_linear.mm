// lora_linear on device "mps": the kernels of lora_linear_forward and lora_linear_backward, defined in
// torch_fused_lora/ops.
//
// No synchronisation, no commit, no read of device memory.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../../metal/lora_decode.h"
#include "../plan/lora.h"
#include "kernels.h"
#include "low_rank.h"
#include "products.h"
#include "tensors.h"

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

// ------------------------------------------------------------------------------------------------------------- forward

void check_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Adapters& adapters) {
  constexpr Expect expect = {"lora_linear"};
  expect(weight.dim() == 2, "weight", weight, "shape (N, K)");
  const int64_t N = weight.size(0), K = weight.size(1);
  expect(x.dim() >= 1 && x.size(x.dim() - 1) == K, "x", x, "shape (..., ", K, "), since weight is (", N, ", ", K, ")");
  expect(
      weight.scalar_type() == x.scalar_type() && !weight.is_cpu(), "weight", weight, "x's dtype ",
      name_of(x.scalar_type()), ", on mps");
  if (bias.has_value()) {
    expect(
        has_shape(*bias, {N}) && bias->scalar_type() == x.scalar_type() && !bias->is_cpu(), "bias", *bias, "shape (", N,
        ",), x's dtype and device");
  }
  check_adapters(expect, x, "x", K, N, adapters);
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x,
    const Tensor& weight,
    const OptionalTensor& bias,
    const Tensor& lora_A,
    const Tensor& lora_B,
    const Tensor& scaling,
    const OptionalTensor& seed,
    const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks,
    bool save_h) {
  const Adapters adapters = {lora_A, lora_B, scaling, seed, dropout_p, ranks};
  check_forward(x, weight, bias, adapters);

  const int64_t N = weight.size(0), K = weight.size(1), r = lora_A.size(0);
  Rows x_rows = rows_of(x);
  const int64_t M = static_cast<int64_t>(x_rows.operand.rows);
  OptionalTensor h;
  if (save_h) h = empty({M, r}, lora_A);
  const auto results = [&](const Tensor& y) { return std::tuple(y, save_h ? *h : empty({0}, lora_A)); };
  if (M == 0 || N == 0) return results(empty(with_last(x, N), x));

  const Tuned tuned = tuned_for(false, x_rows, adapters);
  const bool weight_in_rows = weight.stride(1) == 1 || K == 1;
  const bool is_left = by_torch(scalar(x.scalar_type()), scalar(lora_A.scalar_type()), seed.has_value());
  if (!is_left && decodes(x_rows.operand.rows, static_cast<uint64_t>(r), weight_in_rows, seed.has_value())) {
    const Tensor y = empty(with_last(x, N), x), scale = constant(scaling);
    const Rows A = rows_of(lora_A), B = rows_of(lora_B);
    const uint64_t bias_stride = bias.has_value() ? static_cast<uint64_t>(bias->stride(0)) : 0;
    const auto plan = plan_or_throw(DecodeProblem{
        scalar(x.scalar_type()), scalar(lora_A.scalar_type()), x_rows.operand, rows_of(weight).operand, A.operand,
        B.operand, bias_stride, bias.has_value(), save_h, gpu_cores()});
    const OptionalTensor h_sums = scratch(plan.sums, y);
    Dispatches dispatches;
    dispatches.add(
        plan,
        {{DECODE_X, x_rows.tensor},
         {DECODE_WEIGHT, weight},
         {DECODE_BIAS, bias},
         {DECODE_LORA_A, A.tensor},
         {DECODE_LORA_B, B.tensor},
         {DECODE_Y, y},
         {DECODE_H, h},
         {DECODE_H_SUMS, h_sums},
         Binding::constant(DECODE_SCALING, scale)});
    dispatches.encode();
    return results(y);
  }

  x_rows = as_matrix(x_rows);
  const Tensor base = linear(x_rows.tensor, weight, bias);
  add_delta(base, x_rows, adapters, h);
  return results(x.dim() == 2 ? base : with_shape(base, with_last(x, N)));
}

// ------------------------------------------------------------------------------------------------------------ backward

/// Which gradients are asked for.
struct Needs {
  bool x, weight, bias, A, B, scaling;

  explicit Needs(const std::vector<bool>& flags)
      : x(flags[0]), weight(flags[1]), bias(flags[2]), A(flags[3]), B(flags[4]), scaling(flags[5]) {}
};

void check_backward(
    const Tensor& grad,
    const OptionalTensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& h,
    const Adapters& adapters,
    const std::vector<bool>& needs) {
  constexpr Expect expect = {"lora_linear_backward"};
  STD_TORCH_CHECK(needs.size() == 6, expect.op, ": needs: expected 6 flags, got ", needs.size());
  check_low_rank(expect, grad, adapters);
  const int64_t r = adapters.lora_A.size(0), K = adapters.lora_A.size(1), N = adapters.lora_B.size(0);
  check_adapters(expect, grad, "grad", K, N, adapters);
  const Needs need(needs);
  if (need.A || need.weight) check_saved(expect, "x", x, with_last(grad, K), "grad", grad);
  if (need.x) check_saved(expect, "weight", weight, {N, K}, "grad", grad);
  if (need.B || need.scaling) check_saved(expect, "h", h, {rows_in(grad), r}, "lora_A", adapters.lora_A);
}

std::vector<Tensor> backward(
    const Tensor& grad,
    const OptionalTensor& x,
    const OptionalTensor& weight,
    const Tensor& lora_A,
    const Tensor& lora_B,
    const Tensor& scaling,
    const OptionalTensor& h,
    const OptionalTensor& seed,
    const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks,
    const std::vector<bool>& needs) {
  const Adapters adapters = {lora_A, lora_B, scaling, seed, dropout_p, ranks};
  check_backward(grad, x, weight, h, adapters, needs);

  const Needs need(needs);
  Rows dy = rows_of(grad);
  if (need.x || need.weight || need.bias) dy = as_matrix(dy);
  std::optional<Rows> x_rows;
  if (need.A || need.weight) x_rows = need.weight ? as_matrix(rows_of(*x)) : rows_of(*x);
  const Tuned tuned = tuned_for(true, dy, adapters);
  OptionalTensor dx;
  if (need.x) dx = product(dy.tensor, *weight);
  const LowRankGradients low_rank = low_rank_backward(dy, dx, x_rows, h, adapters, {need.A, need.B, need.scaling});

  std::vector<Tensor> found;
  if (need.x) found.push_back(grad.dim() == 2 ? *dx : with_shape(*dx, with_last(grad, lora_A.size(1))));
  if (need.weight) found.push_back(product(transposed(dy.tensor), x_rows->tensor));
  if (need.bias) {
    const std::vector<int64_t> rows = {0};
    found.push_back(torch::stable::sum(dy.tensor, rows));
  }
  for (const OptionalTensor& gradient : {low_rank.A, low_rank.B, low_rank.scaling}) {
    if (gradient) found.push_back(*gradient);
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_fused_lora, MPS, m) {
  m.impl("lora_linear_forward", TORCH_BOX(&forward));
  m.impl("lora_linear_backward", TORCH_BOX(&backward));
}

}  // namespace torch_fused_lora
