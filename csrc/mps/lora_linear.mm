// lora_linear and lora_linear_quantized on device "mps": the kernels of their operators forward and backward, defined
// in torch_fused_lora/ops. For few rows and over a packed weight the low-rank term is inside the product of ours; else
// it is added to torch's.
//
// No synchronisation, no commit, no read of device memory.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../../metal/lora_decode.h"
#include "../../metal/lora_gemm.h"
#include "../plan/lora.h"
#include "kernels.h"
#include "low_rank.h"
#include "products.h"
#include "tensors.h"

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

using MaybeAdapters = std::optional<Adapters>;

/// A frozen weight with what unpacks it, all contiguous where it is packed.
struct Base {
  Tensor data;
  OptionalTensor scales, biases;
  Weight weight;

  int64_t N() const { return static_cast<int64_t>(weight.operand.rows); }
  int64_t K() const { return static_cast<int64_t>(weight.operand.cols); }
  bool is_packed() const { return weight.bits > 0; }
  bool multiplied_by_us() const { return is_packed() || multiplies_plain(scalar(data.scalar_type())); }
};

Base plain(const Tensor& weight) {
  const Rows rows = rows_of(weight);
  return {rows.tensor, std::nullopt, std::nullopt, {rows.operand}};
}

Base packed(
    const Expect& expect,
    const Tensor& weight,
    const Tensor& scales,
    const Tensor& biases,
    int64_t bits,
    int64_t group) {
  const bool has_table = weight.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(
      bits == 4 || (bits == 8 && !has_table), expect.op, ": bits: expected ", has_table ? "4" : "4 or 8", ", got ",
      bits);
  STD_TORCH_CHECK(
      group == 32 || group == 64 || group == 128, expect.op, ": group_size: expected 32, 64 or 128, got ", group);
  const int64_t in_word = (has_table ? 8 : 32) / bits, word_bytes = sizeof(uint32_t);
  expect(
      !weight.is_cpu() && (has_table || weight.scalar_type() == ScalarType::UInt32) && weight.dim() == 2 &&
          weight.is_contiguous() && weight.size(1) * in_word % group == 0,
      "weight", weight, "shape (N, K / ", in_word, "), ", has_table ? "torch.uint8" : "torch.uint32",
      ", contiguous, on mps, K a multiple of ", group);
  const int64_t N = weight.size(0), K = weight.size(1) * in_word, groups = K / group;
  const auto fits = [&](const Tensor& t) { return !t.is_cpu() && has_shape(t, {N, groups}); };
  const ScalarType dtype = scales.scalar_type();
  expect(
      fits(scales) && (has_table ? dtype == ScalarType::Float : is_supported(dtype)), "scales", scales, "shape (", N,
      ", ", groups, "), ", has_table ? "torch.float32" : kSupported);
  const bool biases_fit = has_table ? !biases.is_cpu() && has_shape(biases, {16}) : fits(biases);
  expect(
      biases_fit && biases.scalar_type() == dtype, "biases", biases,
      has_table ? "a table of shape (16,), scales's" : "scales's shape,", " dtype and device");
  const auto u = [](int64_t value) { return static_cast<uint64_t>(value); };
  const bool begins_a_word = !has_table || weight.storage_offset() % word_bytes == 0;  // as the kernels read them
  return {
      begins_a_word ? weight : torch::stable::clone(weight),
      as_contiguous(scales),
      as_contiguous(biases),
      {{u(N), u(K), u(N), 0, u(K), 1},
       static_cast<uint32_t>(bits),
       static_cast<uint32_t>(group),
       scalar(dtype),
       has_table}};
}

/// An adapter's matrix as the plans and kernels take it; nothing of it where there is no adapter.
struct Factor {
  OptionalTensor tensor;
  Operand operand;
  Scalar dtype;

  Factor(const Tensor* matrix, const Rows& like) : operand(), dtype(scalar(like.tensor.scalar_type())) {
    if (matrix == nullptr) return;
    const Rows rows = rows_of(*matrix);
    tensor = rows.tensor;
    operand = rows.operand;
    dtype = scalar(rows.tensor.scalar_type());
  }
};

uint64_t stride_of(const OptionalTensor& bias) { return bias.has_value() ? static_cast<uint64_t>(bias->stride(0)) : 0; }

/// x W^T + bias + s (x A^T) B^T of few rows, and h where it is given.
Tensor decode(
    const Rows& x,
    const Base& base,
    const OptionalTensor& bias,
    const MaybeAdapters& adapters,
    const OptionalTensor& h) {
  const Tensor y = empty(with_last(x.tensor, base.N()), x.tensor);
  const Factor A(adapters ? &adapters->lora_A : nullptr, x), B(adapters ? &adapters->lora_B : nullptr, x);
  const OptionalTensor scale = adapters ? OptionalTensor(constant(adapters->scaling)) : std::nullopt;
  const auto plan = plan_or_throw(DecodeProblem{
      scalar(x.tensor.scalar_type()), A.dtype, x.operand, base.weight, A.operand, B.operand, stride_of(bias),
      bias.has_value(), h.has_value(), gpu_cores()});
  const OptionalTensor h_sums = scratch(plan.sums, y);
  launch(
      plan,
      {{DECODE_X, x.tensor},
       {DECODE_WEIGHT, base.data},
       {DECODE_SCALES, base.scales},
       {DECODE_BIASES, base.biases},
       {DECODE_BIAS, bias},
       {DECODE_LORA_A, A.tensor},
       {DECODE_LORA_B, B.tensor},
       {DECODE_Y, y},
       {DECODE_H, h},
       {DECODE_H_SUMS, h_sums},
       Binding::constant(DECODE_SCALING, scale)});
  return y;
}

/// x W^T + bias + s h B^T, or backward dy W + mask * s z A, `low_rank` being h or z.
Tensor multiply(
    Pass pass,
    const Rows& in,
    const Base& base,
    const OptionalTensor& bias,
    const MaybeAdapters& adapters,
    const OptionalTensor& low_rank) {
  const bool is_forward = pass == Pass::forward;
  const Tensor y = empty(with_last(in.tensor, is_forward ? base.N() : base.K()), in.tensor);
  if (y.numel() == 0) return y;
  const Factor factor(!adapters ? nullptr : is_forward ? &adapters->lora_B : &adapters->lora_A, in);
  const OptionalTensor scale = adapters ? OptionalTensor(constant(adapters->scaling)) : std::nullopt;
  const OptionalTensor seed = adapters ? constant(adapters->seed) : std::nullopt;
  const auto plan = plan_or_throw(GemmProblem{
      pass, scalar(in.tensor.scalar_type()), factor.dtype, in.operand, base.weight, factor.operand, stride_of(bias),
      bias.has_value(), !is_forward && seed ? adapters->dropout_p[0] : 0.0, gpu_cores()});
  const OptionalTensor partial = scratch(plan.sums, y), summed = y;
  Dispatches dispatches;
  dispatches.add(
      plan,
      {{GEMM_X, in.tensor},
       {GEMM_WEIGHT, base.data},
       {GEMM_SCALES, base.scales},
       {GEMM_BIASES, base.biases},
       {GEMM_BIAS, bias},
       {GEMM_H, low_rank},
       {GEMM_FACTOR, factor.tensor},
       {GEMM_Y, partial ? partial : summed},
       Binding::constant(GEMM_SCALING, scale),
       Binding::constant(GEMM_SEED, seed)});
  dispatches.add(plan.sums, partial, std::nullopt, summed, std::nullopt);
  dispatches.encode();
  return y;
}

/// Whether a layer is left to torch's own products.
bool is_left_to_torch(const Rows& rows, const MaybeAdapters& adapters, bool is_packed) {
  if (!adapters.has_value() || is_packed) return false;
  const ScalarType dtype = rows.tensor.scalar_type(), adapter_dtype = adapters->lora_A.scalar_type();
  return by_torch(scalar(dtype), scalar(adapter_dtype), adapters->seed.has_value());
}

// ------------------------------------------------------------------------------------------------------------- forward

std::tuple<Tensor, Tensor> forward(
    const Expect& expect,
    const Tensor& x,
    const Base& base,
    const OptionalTensor& bias,
    const MaybeAdapters& adapters,
    bool save_h) {
  const int64_t N = base.N(), K = base.K();
  expect(is_supported(x.scalar_type()) && !x.is_cpu(), "x", x, kSupported, ", on mps");
  expect(
      !bias.has_value() || (has_shape(*bias, {N}) && bias->scalar_type() == x.scalar_type() && !bias->is_cpu()), "bias",
      bias.has_value() ? *bias : x, "shape (", N, ",), x's dtype and device");
  if (adapters.has_value()) check_adapters(expect, x, "x", K, N, *adapters);

  const Rows rows = rows_of(x);
  const int64_t M = static_cast<int64_t>(rows.operand.rows), r = adapters.has_value() ? adapters->lora_A.size(0) : 0;
  OptionalTensor h;
  if (save_h && r > 0) h = empty({M, r}, adapters->lora_A);
  const auto results = [&](const Tensor& y) {
    return std::tuple(y, h.has_value() ? *h : empty({0}, r > 0 ? adapters->lora_A : x));
  };
  if (M == 0 || N == 0) return results(empty(with_last(x, N), x));

  const Tuned tuned = tuned_for(false, rows, base.is_packed() ? std::nullopt : adapters);
  const bool weight_in_rows = base.weight.operand.col_stride == 1, drops = r > 0 && adapters->seed.has_value();
  const bool is_left = is_left_to_torch(rows, adapters, base.is_packed());
  if (!is_left && decodes(rows.operand.rows, static_cast<uint64_t>(r), weight_in_rows, drops)) {
    return results(decode(rows, base, bias, adapters, h));
  }
  if (!is_left && base.multiplied_by_us()) {
    OptionalTensor low_rank = h;
    if (r > 0 && !h.has_value()) low_rank = empty({M, r}, adapters->lora_A);
    if (r > 0) add_delta(std::nullopt, rows, *adapters, low_rank);
    return results(multiply(Pass::forward, rows, base, bias, adapters, low_rank));
  }
  const Rows matrix = as_matrix(rows);
  const Tensor product = linear(matrix.tensor, base.data, bias);
  add_delta(product, matrix, *adapters, h, is_left);
  return results(x.dim() == 2 ? product : with_shape(product, with_last(x, N)));
}

std::tuple<Tensor, Tensor> lora_linear(
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
  constexpr Expect expect = {"lora_linear"};
  expect(weight.dim() == 2, "weight", weight, "shape (N, K)");
  const int64_t N = weight.size(0), K = weight.size(1);
  expect(x.dim() >= 1 && x.size(x.dim() - 1) == K, "x", x, "shape (..., ", K, "), since weight is (", N, ", ", K, ")");
  expect(
      weight.scalar_type() == x.scalar_type() && !weight.is_cpu(), "weight", weight, "x's dtype ",
      name_of(x.scalar_type()), ", on mps");
  return forward(expect, x, plain(weight), bias, Adapters{lora_A, lora_B, scaling, seed, dropout_p, ranks}, save_h);
}

std::tuple<Tensor, Tensor> lora_linear_quantized(
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
  const Base base = packed(expect, weight, scales, biases, bits, group_size);
  const bool fits = x.dim() >= 1 && x.size(x.dim() - 1) == base.K();
  expect(fits, "x", x, "shape (..., ", base.K(), "), since weight is (", base.N(), ", ", base.K(), ")");
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), expect.op, ": lora_A, lora_B: expected both or neither");
  MaybeAdapters adapters;
  if (lora_A) adapters.emplace(Adapters{*lora_A, *lora_B, scaling, seed, dropout_p, ranks});
  return forward(expect, x, base, bias, adapters, save_h);
}

// ------------------------------------------------------------------------------------------------------------ backward

/// Which gradients are asked for.
struct Needs {
  bool x, weight, bias, A, B, scaling;
};

std::vector<Tensor> backward(
    const Expect& expect,
    const Tensor& grad,
    const OptionalTensor& x,
    const std::optional<Base>& base,
    const OptionalTensor& h,
    const MaybeAdapters& adapters,
    int64_t N,
    int64_t K,
    const Needs& need) {
  if (adapters.has_value()) check_adapters(expect, grad, "grad", K, N, *adapters);
  if (need.A || need.weight) check_saved(expect, "x", x, with_last(grad, K), "grad", grad);
  if (need.B || need.scaling) {
    check_saved(expect, "h", h, {rows_in(grad), adapters->lora_A.size(0)}, "lora_A", adapters->lora_A);
  }

  Rows dy = rows_of(grad);
  const bool is_packed = base.has_value() && base->is_packed();
  const Tuned tuned = tuned_for(true, dy, is_packed ? std::nullopt : adapters);
  const bool is_left = !need.scaling && is_left_to_torch(dy, adapters, is_packed);
  const bool by_us = need.x && !is_left && base->multiplied_by_us();
  if ((need.x && !by_us) || need.weight || need.bias) dy = as_matrix(dy);
  std::optional<Rows> x_rows;
  if (need.A || need.weight) x_rows = need.weight ? as_matrix(rows_of(*x)) : rows_of(*x);
  // Adapters that drop apart have a mask each, and lora_gemm has one: lora_delta adds them.
  const bool inside = by_us && !(adapters.has_value() && adapters->seed.has_value() && adapters->ranks.size() > 1);
  OptionalTensor dx;
  if (need.x && !by_us) dx = product(dy.tensor, base->data);
  if (by_us && !inside) dx = multiply(Pass::backward, dy, *base, std::nullopt, std::nullopt, std::nullopt);
  LowRankGradients low_rank;
  if (adapters.has_value()) {
    low_rank = low_rank_backward(dy, dx, x_rows, h, *adapters, {need.A, need.B, need.scaling, inside, is_left});
  }
  if (inside) dx = multiply(Pass::backward, dy, *base, std::nullopt, adapters, low_rank.z);

  std::vector<Tensor> found;
  if (need.x) found.push_back(grad.dim() == 2 ? *dx : with_shape(*dx, with_last(grad, K)));
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

void check_grad(const Expect& expect, const Tensor& grad) {
  expect(is_supported(grad.scalar_type()) && !grad.is_cpu(), "grad", grad, kSupported, ", on mps");
}

std::vector<Tensor> lora_linear_backward(
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
  constexpr Expect expect = {"lora_linear_backward"};
  STD_TORCH_CHECK(needs.size() == 6, expect.op, ": needs: expected 6 flags, got ", needs.size());
  const Adapters adapters = {lora_A, lora_B, scaling, seed, dropout_p, ranks};
  check_low_rank(expect, grad, adapters);
  check_grad(expect, grad);
  const int64_t K = lora_A.size(1), N = lora_B.size(0);
  std::optional<Base> base;
  if (needs[0]) {
    check_saved(expect, "weight", weight, {N, K}, "grad", grad);
    base = plain(*weight);
  }
  const Needs need = {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5]};
  return backward(expect, grad, x, base, h, adapters, N, K, need);
}

std::vector<Tensor> lora_linear_quantized_backward(
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
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), expect.op, ": lora_A, lora_B: expected both or neither");
  MaybeAdapters adapters;
  if (lora_A) adapters.emplace(Adapters{*lora_A, *lora_B, scaling, seed, dropout_p, ranks});
  STD_TORCH_CHECK(
      needs.size() == 5 && (adapters.has_value() || !(needs[2] || needs[3] || needs[4])), expect.op,
      ": needs: expected 5 flags, none of an adapter's where there is none, got ", needs.size());
  const Base base = packed(expect, weight, scales, biases, bits, group_size);
  const bool fits = grad.dim() >= 1 && grad.size(grad.dim() - 1) == base.N();
  expect(fits, "grad", grad, "shape (..., ", base.N(), "), since weight is (", base.N(), ", ", base.K(), ")");
  check_grad(expect, grad);
  const Needs need = {needs[0], false, needs[1], needs[2], needs[3], needs[4]};
  return backward(expect, grad, x, base, h, adapters, base.N(), base.K(), need);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_fused_lora, MPS, m) {
  m.impl("lora_linear_forward", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("lora_linear_quantized_forward", TORCH_BOX(&lora_linear_quantized));
  m.impl("lora_linear_quantized_backward", TORCH_BOX(&lora_linear_quantized_backward));
}

}  // namespace torch_fused_lora
