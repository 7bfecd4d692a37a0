// lora_linear_quantized on device "mps": the kernels of lora_linear_quantized_forward and
// lora_linear_quantized_backward, defined in torch_fused_lora/ops.
//
// No synchronisation, no commit, no read of device memory.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "base_product.h"
#include "low_rank.h"
#include "products.h"
#include "tensors.h"

namespace torch_fused_lora {
namespace {

BaseWeight check_packed(
    const Expect& expect,
    const Tensor& weight,
    const Tensor& scales,
    const Tensor& biases,
    int64_t bits,
    int64_t group_size) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, expect.op, ": bits: expected 4 or 8, got ", bits);
  STD_TORCH_CHECK(
      group_size == 32 || group_size == 64 || group_size == 128, expect.op,
      ": group_size: expected 32, 64 or 128, got ", group_size);
  const int64_t words = 32 / bits;  // elements of one
  expect(
      !weight.is_cpu() && weight.scalar_type() == ScalarType::UInt32 && weight.dim() == 2 &&
          weight.size(1) * words % group_size == 0,
      "weight", weight, "shape (N, K / ", words, "), torch.uint32, on mps, K a multiple of ", group_size);
  const int64_t N = weight.size(0), K = weight.size(1) * words;
  expect(
      !scales.is_cpu() && has_shape(scales, {N, K / group_size}) && is_supported(scales.scalar_type()), "scales",
      scales, "shape (", N, ", ", K / group_size, "), ", kSupported, ", on mps");
  expect(is_alike(biases, scales), "biases", biases, "as scales, ", describe(scales));
  const Tensor packed = as_contiguous(weight);
  const auto u = [](int64_t value) { return static_cast<uint64_t>(value); };
  const Operand elements = {u(N), u(K), u(N), 0, u(K), 1, 0};
  return {
      packed,
      as_contiguous(scales),
      as_contiguous(biases),
      {elements, static_cast<uint32_t>(bits), static_cast<uint32_t>(group_size), scalar(scales.scalar_type())}};
}

/// Both or neither.
std::optional<Adapters> adapters_of(
    const Expect& expect,
    const OptionalTensor& lora_A,
    const OptionalTensor& lora_B,
    const Tensor& scaling,
    const OptionalTensor& seed,
    const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks) {
  STD_TORCH_CHECK(
      lora_A.has_value() == lora_B.has_value() && (lora_A.has_value() || !seed.has_value()), expect.op,
      ": lora_A, lora_B: expected both or neither, and a seed only beside them");
  if (!lora_A.has_value()) return std::nullopt;
  return Adapters{*lora_A, *lora_B, scaling, seed, dropout_p, ranks};
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& scales,
    const Tensor& biases,
    const OptionalTensor& bias,
    const OptionalTensor& lora_A,
    const OptionalTensor& lora_B,
    const Tensor& scaling,
    const OptionalTensor& seed,
    const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks,
    int64_t bits,
    int64_t group_size,
    bool save_h) {
  constexpr Expect expect = {"lora_linear_quantized"};
  const BaseWeight base = check_packed(expect, weight, scales, biases, bits, group_size);
  const auto N = static_cast<int64_t>(base.weight.operand.rows), K = static_cast<int64_t>(base.weight.operand.cols);
  expect(!x.is_cpu() && is_supported(x.scalar_type()), "x", x, kSupported, ", on mps");
  expect(x.dim() >= 1 && x.size(x.dim() - 1) == K, "x", x, "shape (..., ", K, "), since weight is (", N, ", ", K, ")");
  check_bias(expect, bias, x, N);
  const auto adapters = adapters_of(expect, lora_A, lora_B, scaling, seed, dropout_p, ranks);
  if (adapters.has_value()) check_adapters(expect, x, "x", K, N, *adapters);

  const Tensor& h_like = lora_A.has_value() ? *lora_A : x;
  OptionalTensor h;
  if (save_h && adapters.has_value()) h = empty({rows_in(x), lora_A->size(0)}, *lora_A);
  return {forward_product(rows_of(x), base, bias, adapters, h), h.has_value() ? *h : empty({0}, h_like)};
}

std::vector<Tensor> backward(
    const Tensor& grad,
    const OptionalTensor& x,
    const Tensor& weight,
    const Tensor& scales,
    const Tensor& biases,
    const OptionalTensor& lora_A,
    const OptionalTensor& lora_B,
    const Tensor& scaling,
    const OptionalTensor& h,
    const OptionalTensor& seed,
    const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks,
    int64_t bits,
    int64_t group_size,
    const std::vector<bool>& needs) {
  constexpr Expect expect = {"lora_linear_quantized_backward"};
  STD_TORCH_CHECK(needs.size() == 5, expect.op, ": needs: expected 5 flags, got ", needs.size());
  const bool need_x = needs[0], need_bias = needs[1];
  const LowRankNeeds need = {needs[2], needs[3], needs[4]};
  const BaseWeight base = check_packed(expect, weight, scales, biases, bits, group_size);
  const auto N = static_cast<int64_t>(base.weight.operand.rows), K = static_cast<int64_t>(base.weight.operand.cols);
  expect(!grad.is_cpu() && is_supported(grad.scalar_type()), "grad", grad, kSupported, ", on mps");
  expect(
      grad.dim() >= 1 && grad.size(grad.dim() - 1) == N, "grad", grad, "shape (..., ", N, "), since weight is (", N,
      ", ", K, ")");
  const auto adapters = adapters_of(expect, lora_A, lora_B, scaling, seed, dropout_p, ranks);
  if (adapters.has_value()) {
    check_adapters(expect, grad, "grad", K, N, *adapters);
    if (need.A) check_saved(expect, "x", x, with_last(grad, K), "grad", grad);
    if (need.B || need.scaling) check_saved(expect, "h", h, {rows_in(grad), lora_A->size(0)}, "lora_A", *lora_A);
  }

  const Rows dy = rows_of(grad);
  std::optional<Rows> x_rows;
  if (need.A) x_rows = rows_of(*x);
  const ProductGradients gradients = backward_product(dy, base, need_x, x_rows, h, adapters, need);

  std::vector<Tensor> found;
  if (need_x) found.push_back(*gradients.x);
  if (need_bias) found.push_back(sum_of_rows(as_matrix(dy).tensor));
  for (const OptionalTensor& gradient : {gradients.low_rank.A, gradients.low_rank.B, gradients.low_rank.scaling}) {
    if (gradient) found.push_back(*gradient);
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_fused_lora, MPS, m) {
  m.impl("lora_linear_quantized_forward", TORCH_BOX(&forward));
  m.impl("lora_linear_quantized_backward", TORCH_BOX(&backward));
}

}  // namespace torch_fused_lora
