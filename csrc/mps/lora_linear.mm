// lora_linear on device "mps": the kernels of _lora_linear and lora_linear_backward, defined in torch_fused_lora/ops.
//
// No synchronisation, no commit, no read of device memory.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../../metal/lora_decode.h"
#include "../../metal/lora_delta.h"
#include "../../metal/lora_grad.h"
#include "../plan/lora.h"
#include "kernels.h"
#include "products.h"
#include "tensors.h"

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

Tensor multiply(const Tensor& a, const Tensor& b) { return call<Tensor>("aten::mul", "Tensor", a, b); }

/// What forward and backward share of the operator's arguments.
struct Adapters {
  const Tensor &lora_A, &lora_B, &scaling;
  const OptionalTensor& seed;
  const std::vector<double>& dropout_p;
  const std::vector<int64_t>& ranks;
};

void check_adapters(
    const Expect& expect, const Tensor& like, const char* like_name, int64_t K, int64_t N, const Adapters& adapters) {
  const auto& [lora_A, lora_B, scaling, seed, dropout_p, ranks] = adapters;
  expect(is_supported(like.scalar_type()) && !like.is_cpu(), like_name, like, kSupported, ", on mps");
  expect(lora_A.dim() == 2 && lora_A.size(1) == K && lora_A.size(0) >= 1, "lora_A", lora_A, "shape (r, ", K, ")");
  const int64_t r = lora_A.size(0);
  expect(has_shape(lora_B, {N, r}), "lora_B", lora_B, "shape (", N, ", ", r, ")");
  const ScalarType dtype = lora_A.scalar_type();
  expect(
      !lora_A.is_cpu() && (dtype == like.scalar_type() || dtype == ScalarType::Float), "lora_A", lora_A,
      name_of(like.scalar_type()), " or torch.float32, on mps");
  expect(
      !lora_B.is_cpu() && lora_B.scalar_type() == dtype, "lora_B", lora_B, "lora_A's dtype ", name_of(dtype),
      ", on mps");
  const bool scaling_fits = scaling.dim() == 0 && scaling.scalar_type() == ScalarType::Float;
  expect(scaling_fits, "scaling", scaling, "a 0-dim float32 tensor");
  if (!seed.has_value()) return;
  expect(
      seed->dim() == 0 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(), "seed", *seed,
      "a 0-dim int64 tensor on the CPU");
  int64_t sum = ranks.empty() ? r : 0;
  for (int64_t rank : ranks) sum += rank;
  STD_TORCH_CHECK(
      sum == r && dropout_p.size() == (ranks.empty() ? 1 : ranks.size()), expect.op,
      ": ranks: expected one for each of ", dropout_p.size(), " dropout_p, ", r, " in all; got ", ranks.size(),
      " that sum to ", sum);
  for (double p : dropout_p) {
    STD_TORCH_CHECK(p >= 0.0 && p < 1.0, expect.op, ": dropout_p: expected probabilities in [0, 1); got ", p);
  }
}

/// The adapters' dropout. Keeps the ranks that the plan's refers to.
class AdapterDropout {
 public:
  AdapterDropout(int64_t r, const OptionalTensor& seed, const std::vector<double>& p, const std::vector<int64_t>& ranks)
      : ranks_(ranks.begin(), ranks.end()), p_(seed.has_value() ? p.data() : nullptr) {
    if (p_ != nullptr && ranks_.empty()) ranks_.push_back(static_cast<uint32_t>(r));
  }
  AdapterDropout(const AdapterDropout&) = delete;

  operator Dropout() const { return {p_ != nullptr ? static_cast<uint32_t>(ranks_.size()) : 0, ranks_.data(), p_}; }

 private:
  std::vector<uint32_t> ranks_;
  const double* p_;
};

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
  check_forward(x, weight, bias, {lora_A, lora_B, scaling, seed, dropout_p, ranks});

  const int64_t N = weight.size(0), K = weight.size(1), r = lora_A.size(0);
  Rows x_rows = rows_of(x);
  const int64_t M = static_cast<int64_t>(x_rows.operand.rows);
  OptionalTensor h;
  if (save_h) h = empty({M, r}, lora_A);
  const auto results = [&](const Tensor& y) { return std::tuple(y, save_h ? *h : empty({0}, lora_A)); };
  if (M == 0 || N == 0) return results(empty(with_last(x, N), x));

  const Rows A = rows_of(lora_A), B = rows_of(lora_B);
  const Scalar dtype = scalar(x.scalar_type()), adapter_dtype = scalar(lora_A.scalar_type());
  const Tensor scale = constant(scaling);
  Dispatches dispatches;
  const bool weight_in_rows = weight.stride(1) == 1 || K == 1;
  if (decodes(x_rows.operand.rows, A.operand.rows, weight_in_rows, seed.has_value())) {
    const Tensor y = empty(with_last(x, N), x);
    const uint64_t bias_stride = bias.has_value() ? static_cast<uint64_t>(bias->stride(0)) : 0;
    const auto plan = plan_or_throw(DecodeProblem{
        dtype, adapter_dtype, x_rows.operand, rows_of(weight).operand, A.operand, B.operand, bias_stride,
        bias.has_value(), save_h, gpu_cores()});
    dispatches.add(
        plan,
        {{DECODE_X, x_rows.tensor},
         {DECODE_WEIGHT, weight},
         {DECODE_BIAS, bias},
         {DECODE_LORA_A, A.tensor},
         {DECODE_LORA_B, B.tensor},
         {DECODE_Y, y},
         {DECODE_H, h},
         Binding::constant(DECODE_SCALING, scale)});
    dispatches.encode();
    return results(y);
  }

  x_rows = as_matrix(x_rows);
  const Tensor base = linear(x_rows.tensor, weight, bias);
  const Tensor y = x.dim() == 2 ? base : with_shape(base, with_last(x, N));
  const AdapterDropout dropout(r, seed, dropout_p, ranks);
  const OptionalTensor seed_constant = constant(seed);
  const auto plan = plan_or_throw(DeltaProblem{
      DeltaProblem::Pass::forward, dtype, adapter_dtype, x_rows.operand, A.operand, B.operand, true, save_h,
      static_cast<uint64_t>(y.storage_offset()), dropout, gpu_cores()});
  dispatches.add(
      plan,
      {{DELTA_X, x_rows.tensor},
       {DELTA_LORA_A, A.tensor},
       {DELTA_LORA_B, B.tensor},
       {DELTA_Y, y},
       {DELTA_H, h},
       Binding::constant(DELTA_SCALING, scale),
       Binding::constant(DELTA_SEED, seed_constant)});
  dispatches.encode();
  return results(y);
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
  const Tensor &lora_A = adapters.lora_A, &lora_B = adapters.lora_B;
  constexpr Expect expect = {"lora_linear_backward"};
  STD_TORCH_CHECK(needs.size() == 6, expect.op, ": needs: expected 6 flags, got ", needs.size());
  expect(lora_A.dim() == 2 && lora_A.size(0) >= 1, "lora_A", lora_A, "shape (r, K) with r >= 1");
  const int64_t r = lora_A.size(0), K = lora_A.size(1);
  expect(
      lora_B.dim() == 2 && lora_B.size(1) == r, "lora_B", lora_B, "shape (N, ", r, "), since lora_A is (", r, ", ", K,
      ")");
  const int64_t N = lora_B.size(0);
  expect(
      grad.dim() >= 1 && grad.size(grad.dim() - 1) == N, "grad", grad, "shape (..., ", N, "), since lora_B is (", N,
      ", ", r, ")");
  check_adapters(expect, grad, "grad", K, N, adapters);

  const auto given = [&](const char* name, const OptionalTensor& tensor, const std::vector<int64_t>& shape,
                         const char* like_name, const Tensor& like) {
    STD_TORCH_CHECK(
        tensor.has_value() && has_shape(*tensor, shape) && tensor->scalar_type() == like.scalar_type() &&
            !tensor->is_cpu(),
        expect.op, ": ", name, ": expected ", describe(shape), ", ", like_name, "'s dtype ",
        name_of(like.scalar_type()), ", on mps; got ", tensor.has_value() ? describe(*tensor) : "None");
  };
  const Needs need(needs);
  int64_t M = 1;
  for (int64_t d = 0; d + 1 < grad.dim(); ++d) M *= grad.size(d);
  if (need.A || need.weight) given("x", x, with_last(grad, K), "grad", grad);
  if (need.x) given("weight", weight, {N, K}, "grad", grad);
  if (need.B || need.scaling) given("h", h, {M, r}, "lora_A", lora_A);
}

/// dA and dB, those asked for, as one problem of lora_grad, and what its launches write: the partial sums, if there are
/// any.
struct Gradients {
  OptionalTensor dA, dB, written_dA, written_dB;
  Tensor factor;
  Plan<GradConfiguration> plan;
};

Gradients plan_gradients(
    const OptionalTensor& dA, const OptionalTensor& dB, const Tensor& factor, const GradProblem& problem) {
  Gradients found = {dA, dB, dA, dB, factor, plan_or_throw(problem)};
  const uint32_t splits = found.plan.sums.splits;
  if (splits == 1) return found;
  if (dA.has_value()) found.written_dA = empty_float({splits, dA->size(0), dA->size(1)}, *dA);
  if (dB.has_value()) found.written_dB = empty_float({splits, dB->size(0), dB->size(1)}, *dB);
  return found;
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
  check_backward(grad, x, weight, h, {lora_A, lora_B, scaling, seed, dropout_p, ranks}, needs);

  // Allocate. dx starts as torch's own product.
  const Needs need(needs);
  const int64_t K = lora_A.size(1), N = lora_B.size(0), r = lora_A.size(0);
  Rows dy = rows_of(grad);
  if (need.x || need.weight || need.bias) dy = as_matrix(dy);
  const int64_t M = static_cast<int64_t>(dy.operand.rows);
  std::optional<Rows> x_rows;
  if (need.A || need.weight) x_rows = need.weight ? as_matrix(rows_of(*x)) : rows_of(*x);
  const auto fresh = [&](const std::vector<int64_t>& shape, const Tensor& like) {
    return M == 0 ? torch::stable::new_zeros(like, shape) : empty(shape, like);
  };
  OptionalTensor dx, z, dA, dB, unscaled_dB, x_tensor, h_tensor;
  if (need.x) dx = product(dy.tensor, *weight);
  if (need.A) z = empty({M, r}, lora_A);
  if (need.A) dA = fresh({r, K}, lora_A);
  if (need.B || need.scaling) (need.scaling ? unscaled_dB : dB) = fresh({N, r}, lora_B);
  if (x_rows.has_value()) x_tensor = x_rows->tensor;
  if (h.has_value()) h_tensor = as_contiguous(*h);
  const Rows A = rows_of(lora_A), B = rows_of(lora_B);
  const Tensor scale = constant(scaling);
  const OptionalTensor seed_constant = constant(seed);

  // Plan.
  const Scalar dtype = scalar(grad.scalar_type()), adapter_dtype = scalar(lora_A.scalar_type());
  const AdapterDropout dropout(r, seed, dropout_p, ranks);
  Plan<DeltaConfiguration> delta;
  if (M > 0 && (need.x || need.A)) {
    delta = plan_or_throw(DeltaProblem{
        DeltaProblem::Pass::backward, dtype, adapter_dtype, dy.operand, A.operand, B.operand, need.x, need.A,
        need.x ? static_cast<uint64_t>(dx->storage_offset()) : 0, dropout, gpu_cores()});
  }
  const Operand x_shape = {dy.operand.rows, static_cast<uint64_t>(K)};
  const Operand x_in = x_rows.has_value() ? x_rows->operand : x_shape;
  const auto grad_problem = [&](bool need_A, bool need_B) {
    return GradProblem{dtype, adapter_dtype, x_in, dy.operand, A.operand.rows, need_A, need_B, dropout, gpu_cores()};
  };
  std::vector<Gradients> gradients;
  if (M > 0 && (dA || dB)) {
    gradients.push_back(plan_gradients(dA, dB, scale, grad_problem(dA.has_value(), dB.has_value())));
  }
  if (M > 0 && unscaled_dB) {
    const std::vector<int64_t> no_dimensions;
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const Tensor one = torch::stable::full(no_dimensions, 1.0, ScalarType::Float, std::nullopt, cpu);
    gradients.push_back(plan_gradients(std::nullopt, unscaled_dB, one, grad_problem(false, true)));
  }

  // Encode.
  Dispatches dispatches;
  dispatches.add(
      delta,
      {{DELTA_X, dy.tensor},
       {DELTA_LORA_A, B.tensor},
       {DELTA_LORA_B, A.tensor},
       {DELTA_Y, dx},
       {DELTA_H, z},
       Binding::constant(DELTA_SCALING, scale),
       Binding::constant(DELTA_SEED, seed_constant)});
  for (const Gradients& part : gradients) {
    dispatches.add(
        part.plan,
        {{GRAD_X, x_tensor},
         {GRAD_Z, z},
         {GRAD_DY, dy.tensor},
         {GRAD_H, h_tensor},
         {GRAD_DA, part.written_dA},
         {GRAD_DB, part.written_dB},
         Binding::constant(GRAD_SCALING, part.factor),
         Binding::constant(GRAD_SEED, seed_constant)});
    dispatches.add(part.plan.sums, part.written_dA, part.written_dB, part.dA, part.dB);
  }
  dispatches.encode();

  // Collect.
  std::vector<Tensor> found;
  if (need.x) found.push_back(grad.dim() == 2 ? *dx : with_shape(*dx, with_last(grad, K)));
  if (need.weight) found.push_back(product(transposed(dy.tensor), x_rows->tensor));
  if (need.bias) {
    const std::vector<int64_t> rows = {0};
    found.push_back(torch::stable::sum(dy.tensor, rows));
  }
  if (need.A) found.push_back(*dA);
  if (need.B) found.push_back(dB ? *dB : torch::stable::to(multiply(*unscaled_dB, scaling), lora_B.scalar_type()));
  if (need.scaling) {
    const Tensor wide = torch::stable::to(*unscaled_dB, ScalarType::Float);
    const Tensor total = torch::stable::sum(multiply(wide, lora_B));
    found.push_back(torch::stable::to(total, scaling.device()));
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_fused_lora, MPS, m) {
  m.impl("lora_linear_forward", TORCH_BOX(&forward));
  m.impl("lora_linear_backward", TORCH_BOX(&backward));
}

}  // namespace torch_fused_lora
