// lora_linear on device "mps": the kernels of _lora_linear and lora_linear_backward, defined in torch_fused_lora/ops.
//
// No synchronisation, no commit, no read of device memory: check, plan, allocate, encode.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "lora_plan.h"
#include "mps_kernels.h"
#include "products.h"
#include "tensors.h"

namespace torch_fused_lora {
namespace {

Tensor multiply(const Tensor& a, const Tensor& b) { return call<Tensor>("aten::mul", "Tensor", a, b); }

void check_adapters(
    const Expect& expect, const Tensor& like, const char* like_name, int64_t K, int64_t N, const Tensor& lora_A,
    const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& seed, const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks) {
  expect(
      is_supported(like.scalar_type()) && !like.is_cpu(), like_name, like,
      "float16, bfloat16 or float32, which device mps has, on mps");
  expect(lora_A.dim() == 2 && lora_A.size(1) == K && lora_A.size(0) >= 1, "lora_A", lora_A, "shape (r, ", K, ")");
  const int64_t r = lora_A.size(0);
  expect(has_shape(lora_B, {N, r}), "lora_B", lora_B, "shape (", N, ", ", r, ")");
  const ScalarType dtype = lora_A.scalar_type();
  expect(
      !lora_A.is_cpu() && (dtype == like.scalar_type() || dtype == ScalarType::Float), "lora_A", lora_A,
      name_of(like.scalar_type()), " or torch.float32, on mps");
  expect(
      !lora_B.is_cpu() && lora_B.scalar_type() == dtype, "lora_B", lora_B,
      "lora_A's dtype ", name_of(dtype), ", on mps");
  const bool scaling_fits = scaling.dim() == 0 && scaling.scalar_type() == ScalarType::Float;
  expect(scaling_fits, "scaling", scaling, "a 0-dim float32 tensor");
  if (!seed.has_value()) return;
  expect(
      seed->dim() == 0 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(), "seed", *seed,
      "a 0-dim int64 tensor on the CPU");
  int64_t sum = ranks.empty() ? r : 0;
  for (int64_t rank : ranks) sum += rank;
  STD_TORCH_CHECK(
      sum == r && dropout_p.size() == (ranks.empty() ? 1 : ranks.size()),
      expect.op, ": ranks: expected one for each of ", dropout_p.size(), " dropout_p, ", r, " in all; got ",
      ranks.size(), " that sum to ", sum);
  for (double p : dropout_p) {
    STD_TORCH_CHECK(p >= 0.0 && p < 1.0, expect.op, ": dropout_p: expected probabilities in [0, 1); got ", p);
  }
}

/// The parts of a Problem that forward and backward share. Keeps the ranks that it points to.
struct Layer {
  std::vector<uint32_t> ranks;
  std::vector<double> dropout_p;
  Rows lora_A, lora_B;
  Problem problem = {};

  Layer(
      ScalarType dtype, const Tensor& A, const Tensor& B, const OptionalTensor& seed, const std::vector<double>& p,
      const std::vector<int64_t>& adapter_ranks)
      : ranks(adapter_ranks.begin(), adapter_ranks.end()), dropout_p(p), lora_A(rows_of(A)), lora_B(rows_of(B)) {
    problem.dtype = scalar(dtype);
    problem.adapter_dtype = scalar(A.scalar_type());
    problem.lora_A = lora_A.operand;
    problem.lora_B = lora_B.operand;
    problem.weight.rows = problem.dy.cols = static_cast<uint64_t>(B.size(0));
    problem.weight.cols = problem.x.cols = static_cast<uint64_t>(A.size(1));
    problem.gpu_cores = gpu_cores();
    if (!seed.has_value()) return;
    if (ranks.empty()) ranks.push_back(static_cast<uint32_t>(A.size(0)));
    problem.adapters = static_cast<uint32_t>(ranks.size());
    problem.ranks = ranks.data();
    problem.dropout_p = dropout_p.data();
  }

  Layer(const Layer&) = delete;
};

// ------------------------------------------------------------------------------------------------------------- kernels

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& scaling, const OptionalTensor& seed, const std::vector<double>& dropout_p,
    const std::vector<int64_t>& ranks, bool save_h) {
  constexpr Expect expect = {"lora_linear"};
  expect(weight.dim() == 2, "weight", weight, "shape (N, K)");
  const int64_t N = weight.size(0), K = weight.size(1);
  expect(x.dim() >= 1 && x.size(x.dim() - 1) == K, "x", x, "shape (..., ", K, "), since weight is (", N, ", ", K, ")");
  expect(
      weight.scalar_type() == x.scalar_type() && !weight.is_cpu(), "weight", weight,
      "x's dtype ", name_of(x.scalar_type()), ", on mps");
  if (bias.has_value()) {
    expect(
        has_shape(*bias, {N}) && bias->scalar_type() == x.scalar_type() && !bias->is_cpu(), "bias", *bias,
        "shape (", N, ",), x's dtype and device");
  }
  check_adapters(expect, x, "x", K, N, lora_A, lora_B, scaling, seed, dropout_p, ranks);

  Layer layer(x.scalar_type(), lora_A, lora_B, seed, dropout_p, ranks);
  Problem& problem = layer.problem;
  Rows x_rows = rows_of(x);
  problem.x = x_rows.operand;
  if (weight.stride(1) == 1 || K == 1) problem.weight = rows_of(weight).operand;  // as it is: what lora_decode reads
  problem.save_h = save_h;
  problem.has_bias = bias.has_value();
  problem.bias_stride = bias.has_value() ? static_cast<uint64_t>(bias->stride(0)) : 0;
  const int64_t M = static_cast<int64_t>(problem.x.rows);
  const Tensor h = empty(save_h ? std::vector<int64_t>{M, lora_A.size(0)} : std::vector<int64_t>{0}, lora_A);
  const Binding h_binding = save_h ? Binding(h) : std::nullopt;
  if (M == 0 || N == 0) return {empty(with_last(x, N), x), h};

  if (tfl_decodes(&problem)) {
    const Tensor y = empty(with_last(x, N), x);
    const auto plan = [&](uint32_t i, Launch* l, uint32_t* n) { return tfl_plan_decode(&problem, i, l, n); };
    const Batch batch = {
        plan_all(plan),
        {x_rows.tensor, weight, bias, layer.lora_A.tensor, layer.lora_B.tensor, y, h_binding},
        {constant(scaling)}};
    encode({&batch, 1});
    return {y, h};
  }
  x_rows = as_matrix(x_rows);
  problem.x = x_rows.operand;
  const Tensor base = linear(x_rows.tensor, weight, bias);
  const Tensor y = x.dim() == 2 ? base : with_shape(base, with_last(x, N));
  problem.y_offset = static_cast<uint64_t>(y.storage_offset());
  const auto plan = [&](uint32_t i, Launch* l, uint32_t* n) { return tfl_plan_delta(&problem, i, l, n); };
  const Batch batch = {
      plan_all(plan),
      {x_rows.tensor, layer.lora_A.tensor, layer.lora_B.tensor, y, h_binding},
      {constant(scaling), seed.has_value() ? Binding(constant(*seed)) : std::nullopt}};
  encode({&batch, 1});
  return {y, h};
}

/// dA and dB, those asked for: one launch, and one more where the rows were split.
Batch plan_gradients(
    const Problem& problem, const Tensor& grad, const Binding& x, const Binding& z, const Binding& h,
    const Binding& dA, const Binding& dB, const Tensor& scaling, const Binding& seed, Batch* sum) {
  uint32_t splits = 1;
  std::vector<Launch> launches = plan_all([&](uint32_t i, Launch* l, uint32_t* n) {
    return tfl_plan_grad(&problem, dA.has_value(), dB.has_value(), i, l, n, &splits);
  });
  Binding partial_dA = dA, partial_dB = dB;
  if (splits > 1) {
    const auto partial = [&](const Tensor& whole) {
      return empty_float({splits, whole.size(0), whole.size(1)}, whole);
    };
    if (dA.has_value()) partial_dA = partial(*dA);
    if (dB.has_value()) partial_dB = partial(*dB);
    *sum = {{launches.back()}, {dA ? partial_dA : partial_dB, partial_dB, dA, dB}, {}};
    launches.pop_back();
  }
  return {launches, {x ? x : Binding(grad), z, grad, h, partial_dA, partial_dB}, {scaling, seed}};
}

void check_backward(
    const Tensor& grad, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& h, const OptionalTensor& seed,
    const std::vector<double>& dropout_p, const std::vector<int64_t>& ranks, const std::vector<bool>& needs) {
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
  check_adapters(expect, grad, "grad", K, N, lora_A, lora_B, scaling, seed, dropout_p, ranks);

  const auto given = [&](const char* name, const OptionalTensor& tensor, const std::vector<int64_t>& shape,
                         const char* like_name, const Tensor& like) {
    STD_TORCH_CHECK(
        tensor.has_value() && has_shape(*tensor, shape) && tensor->scalar_type() == like.scalar_type() &&
            !tensor->is_cpu(),
        expect.op, ": ", name, ": expected ", describe(shape), ", ", like_name, "'s dtype ",
        name_of(like.scalar_type()), ", on mps; got ", tensor.has_value() ? describe(*tensor) : "None");
  };
  const bool need_x = needs[0], need_weight = needs[1], need_A = needs[3], need_B = needs[4], need_scaling = needs[5];
  int64_t M = 1;
  for (int64_t d = 0; d + 1 < grad.dim(); ++d) M *= grad.size(d);
  if (need_A || need_weight) given("x", x, with_last(grad, K), "grad", grad);
  if (need_x) given("weight", weight, {N, K}, "grad", grad);
  if (need_B || need_scaling) given("h", h, {M, r}, "lora_A", lora_A);
}

std::vector<Tensor> backward(
    const Tensor& grad, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const Tensor& scaling, const OptionalTensor& h, const OptionalTensor& seed,
    const std::vector<double>& dropout_p, const std::vector<int64_t>& ranks, const std::vector<bool>& needs) {
  check_backward(grad, x, weight, lora_A, lora_B, scaling, h, seed, dropout_p, ranks, needs);
  const bool need_x = needs[0], need_weight = needs[1], need_bias = needs[2], need_A = needs[3], need_B = needs[4],
             need_scaling = needs[5];
  const int64_t K = lora_A.size(1), N = lora_B.size(0), r = lora_A.size(0);
  Layer layer(grad.scalar_type(), lora_A, lora_B, seed, dropout_p, ranks);
  Problem& problem = layer.problem;
  Rows dy = rows_of(grad);
  if (need_x || need_weight || need_bias) dy = as_matrix(dy);
  problem.dy = dy.operand;
  problem.x.rows = dy.operand.rows;
  const int64_t M = static_cast<int64_t>(dy.operand.rows);
  const bool empty_sum = M == 0;
  const auto fresh = [&](const std::vector<int64_t>& shape, const Tensor& like) {
    return empty_sum ? torch::stable::new_zeros(like, shape) : empty(shape, like);
  };
  std::vector<Batch> batches;
  Binding dx, dA, dB, z, unscaled_dB;
  const Tensor scale = constant(scaling);
  const Binding seed_binding = seed.has_value() ? Binding(constant(*seed)) : std::nullopt;
  if (need_x) dx = product(dy.tensor, *weight);
  if (need_A) dA = fresh({r, K}, lora_A);
  if (need_B && !need_scaling) dB = fresh({N, r}, lora_B);
  if (need_scaling) unscaled_dB = fresh({N, r}, lora_B);

  if (!empty_sum && (need_x || need_A)) {
    if (need_A) z = empty({M, r}, lora_A);
    problem.save_h = need_A;
    problem.y_offset = need_x ? static_cast<uint64_t>(dx->storage_offset()) : 0;
    const auto plan = [&](uint32_t i, Launch* l, uint32_t* n) {
      return tfl_plan_delta_dx(&problem, !need_x, i, l, n);
    };
    batches.push_back(
        {plan_all(plan), {dy.tensor, layer.lora_B.tensor, layer.lora_A.tensor, dx, z}, {scale, seed_binding}});
  }
  std::optional<Rows> x_rows;
  if (need_A || need_weight) {
    x_rows = rows_of(*x);
    if (need_weight) x_rows = as_matrix(*x_rows);
    problem.x = x_rows->operand;
  }
  const Binding x_binding = x_rows ? Binding(x_rows->tensor) : std::nullopt;
  const Binding h_binding = h.has_value() ? Binding(as_contiguous(*h)) : std::nullopt;
  const auto add_gradients = [&](const Binding& for_A, const Binding& for_B, const Tensor& factor) {
    if (empty_sum || (!for_A && !for_B)) return;
    Batch sum;
    batches.push_back(plan_gradients(
        problem, dy.tensor, x_binding, z, h_binding, for_A, for_B, factor, seed_binding, &sum));
    if (!sum.launches.empty()) batches.push_back(sum);
  };
  add_gradients(dA, dB, scale);
  if (need_scaling) {
    const std::vector<int64_t> no_dimensions;
    add_gradients(
        std::nullopt, unscaled_dB,
        torch::stable::full(
            no_dimensions, 1.0, ScalarType::Float, std::nullopt,
            torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  }
  encode(batches);

  std::vector<Tensor> found;
  if (need_x) found.push_back(grad.dim() == 2 ? *dx : with_shape(*dx, with_last(grad, K)));
  if (need_weight) found.push_back(product(transposed(dy.tensor), x_rows->tensor));
  if (need_bias) {
    const std::vector<int64_t> rows = {0};
    found.push_back(torch::stable::sum(dy.tensor, rows));
  }
  if (need_A) found.push_back(*dA);
  if (need_B) found.push_back(dB ? *dB : torch::stable::to(multiply(*unscaled_dB, scaling), lora_B.scalar_type()));
  if (need_scaling) {
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
