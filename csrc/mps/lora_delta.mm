// lora_delta on device "mps": the kernels of lora_delta_forward and lora_delta_backward, defined in
// torch_fused_lora/ops.
//
// No synchronisation, no commit, no read of device memory.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "low_rank.h"

namespace torch_fused_lora {
namespace {

bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16;
}

/// As the kernels take them where y is float32 and x, or the adapters, are half.
Tensor widened(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
}

OptionalTensor cast(const OptionalTensor& tensor, ScalarType dtype) {
  return !tensor || tensor->scalar_type() == dtype ? tensor : OptionalTensor(torch::stable::to(*tensor, dtype));
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& y,
    const Tensor& x,
    const Tensor& lora_A,
    const Tensor& lora_B,
    const Tensor& scaling,
    const OptionalTensor& seed,
    const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks,
    bool save_h) {
  constexpr Expect expect = {"lora_delta"};
  expect(x.dim() >= 1, "x", x, "shape (..., K)");
  expect(lora_B.dim() == 2, "lora_B", lora_B, "shape (N, r)");
  const int64_t N = lora_B.size(0), K = x.size(x.dim() - 1);
  const Adapters adapters = {lora_A, lora_B, scaling, seed, dropout_p, ranks};
  check_adapters(expect, x, "x", K, N, adapters);
  const bool is_wider = y.scalar_type() == ScalarType::Float && is_half(x);
  const std::vector<int64_t> y_shape = with_last(x, N);
  expect(
      has_shape(y, y_shape) && !y.is_cpu() && (y.scalar_type() == x.scalar_type() || is_wider), "y", y,
      describe(y_shape), ", x's dtype ", name_of(x.scalar_type()), " or torch.float32 over a half one, on mps");

  Tensor out = empty(y_shape, y);
  torch::stable::copy_(out, y);
  OptionalTensor h;
  if (save_h) h = empty({rows_in(x), lora_A.size(0)}, is_wider ? out : lora_A);
  if (rows_in(x) > 0 && N > 0) {
    if (is_wider) {
      const Tensor A = widened(lora_A), B = widened(lora_B);
      add_delta(out, rows_of(widened(x)), {A, B, scaling, seed, dropout_p, ranks}, h);
    } else {
      add_delta(out, rows_of(x), adapters, h);
    }
  }
  return {out, save_h ? *cast(h, lora_A.scalar_type()) : empty({0}, lora_A)};
}

std::vector<Tensor> backward(
    const Tensor& grad,
    const OptionalTensor& x,
    const Tensor& lora_A,
    const Tensor& lora_B,
    const Tensor& scaling,
    const OptionalTensor& h,
    const OptionalTensor& seed,
    const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks,
    const std::vector<bool>& needs) {
  constexpr Expect expect = {"lora_delta_backward"};
  STD_TORCH_CHECK(needs.size() == 4, expect.op, ": needs: expected 4 flags, got ", needs.size());
  check_low_rank(expect, grad, {lora_A, lora_B, scaling, seed, dropout_p, ranks});
  const int64_t r = lora_A.size(0), K = lora_A.size(1), N = lora_B.size(0);
  const bool need_x = needs[0];
  const LowRankNeeds need = {needs[1], needs[2], needs[3]};
  const bool is_wide = grad.scalar_type() == ScalarType::Float;
  const bool half_adapters = is_wide && is_half(lora_A), half_x = is_wide && x.has_value() && is_half(*x);
  check_adapters(
      expect, half_adapters ? lora_A : grad, half_adapters ? "lora_A" : "grad", K, N,
      {lora_A, lora_B, scaling, seed, dropout_p, ranks});
  if (need.A) check_saved(expect, "x", x, with_last(grad, K), half_x ? "x" : "grad", half_x ? *x : grad);
  if (need.B || need.scaling) check_saved(expect, "h", h, {rows_in(grad), r}, "lora_A", lora_A);

  const Tensor A = half_adapters ? widened(lora_A) : lora_A, B = half_adapters ? widened(lora_B) : lora_B;
  std::optional<Rows> x_rows;
  if (need.A) x_rows = rows_of(half_x ? widened(*x) : *x);
  const std::vector<int64_t> x_shape = with_last(grad, K);
  OptionalTensor dx;
  if (need_x) dx = torch::stable::new_zeros(grad, x_shape);
  const LowRankGradients low_rank = low_rank_backward(
      rows_of(grad), dx, x_rows, cast(h, A.scalar_type()), {A, B, scaling, seed, dropout_p, ranks}, need);

  std::vector<Tensor> found;
  if (need_x) found.push_back(*dx);
  if (need.A) found.push_back(*cast(low_rank.A, lora_A.scalar_type()));
  if (need.B) found.push_back(*cast(low_rank.B, lora_B.scalar_type()));
  if (need.scaling) found.push_back(*low_rank.scaling);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_fused_lora, MPS, m) {
  m.impl("lora_delta_forward", TORCH_BOX(&forward));
  m.impl("lora_delta_backward", TORCH_BOX(&backward));
}

}  // namespace torch_fused_lora
