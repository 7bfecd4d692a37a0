#include "low_rank.h"

#include "../../metal/lora_delta.h"
#include "../../metal/lora_grad.h"
#include "../plan/lora.h"
#include "kernels.h"
#include "products.h"

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

Tensor multiply(const Tensor& a, const Tensor& b) { return call<Tensor>("aten::mul", "Tensor", a, b); }

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

}  // namespace

OptionalTensor scratch(const PartialSums& sums, const Tensor& like) {
  const std::vector<int64_t> shape = {sums.splits, static_cast<int64_t>(sums.elements)};
  return sums.elements == 0 ? OptionalTensor() : empty_float(shape, like);
}

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

void check_low_rank(const Expect& expect, const Tensor& grad, const Adapters& adapters) {
  const Tensor &lora_A = adapters.lora_A, &lora_B = adapters.lora_B;
  expect(lora_A.dim() == 2 && lora_A.size(0) >= 1, "lora_A", lora_A, "shape (r, K) with r >= 1");
  const int64_t r = lora_A.size(0), K = lora_A.size(1);
  expect(
      lora_B.dim() == 2 && lora_B.size(1) == r, "lora_B", lora_B, "shape (N, ", r, "), since lora_A is (", r, ", ", K,
      ")");
  const int64_t N = lora_B.size(0);
  expect(
      grad.dim() >= 1 && grad.size(grad.dim() - 1) == N, "grad", grad, "shape (..., ", N, "), since lora_B is (", N,
      ", ", r, ")");
}

void check_saved(
    const Expect& expect,
    const char* name,
    const OptionalTensor& tensor,
    const std::vector<int64_t>& shape,
    const char* like_name,
    const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.has_value() && has_shape(*tensor, shape) && tensor->scalar_type() == like.scalar_type() &&
          !tensor->is_cpu(),
      expect.op, ": ", name, ": expected ", describe(shape), ", ", like_name, "'s dtype ", name_of(like.scalar_type()),
      ", on mps; got ", tensor.has_value() ? describe(*tensor) : "None");
}

int64_t rows_in(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

Tuned tuned_for(bool backward, const Rows& rows, const std::optional<Adapters>& adapters) {
  if (!adapters.has_value()) return Tuned({}, true);
  const auto u = [](int64_t size) { return static_cast<uint64_t>(size); };
  const Tensor &A = adapters->lora_A, &B = adapters->lora_B;
  const Layer layer = {
      backward,
      rows.operand.rows,
      u(A.size(1)),
      u(B.size(0)),
      u(A.size(0)),
      scalar(rows.tensor.scalar_type()),
      scalar(A.scalar_type())};
  return Tuned(layer, adapters->seed.has_value() || is_deterministic());
}

void add_delta(
    const OptionalTensor& y, const Rows& x, const Adapters& adapters, const OptionalTensor& h, bool by_torch) {
  if (by_torch) {
    const Tensor found = product(x.tensor, transposed(adapters.lora_A));
    add_product(*y, multiply(found, adapters.scaling), transposed(adapters.lora_B));
    if (Tensor kept = h.value_or(found); h.has_value()) torch::stable::copy_(kept, found);
    return;
  }
  const Rows A = rows_of(adapters.lora_A), B = rows_of(adapters.lora_B);
  const AdapterDropout dropout(adapters.lora_A.size(0), adapters.seed, adapters.dropout_p, adapters.ranks);
  const Tensor scale = constant(adapters.scaling);
  const OptionalTensor seed = constant(adapters.seed);
  const auto plan = plan_or_throw(DeltaProblem{
      Pass::forward, scalar(x.tensor.scalar_type()), scalar(adapters.lora_A.scalar_type()), x.operand, A.operand,
      B.operand, y.has_value(), h.has_value(), y ? static_cast<uint64_t>(y->storage_offset()) : 0, dropout,
      gpu_cores()});
  const OptionalTensor partial = scratch(plan.sums, x.tensor);
  launch(
      plan,
      {{DELTA_X, x.tensor},
       {DELTA_LORA_A, A.tensor},
       {DELTA_LORA_B, B.tensor},
       {DELTA_Y, y},
       {DELTA_H, h},
       {DELTA_PARTIAL, partial},
       Binding::constant(DELTA_SCALING, scale),
       Binding::constant(DELTA_SEED, seed)});
}

LowRankGradients low_rank_backward(
    const Rows& dy,
    const OptionalTensor& dx,
    const std::optional<Rows>& x,
    const OptionalTensor& h,
    const Adapters& adapters,
    const LowRankNeeds& need) {
  const auto& [lora_A, lora_B, scaling, seed, dropout_p, ranks] = adapters;
  const int64_t K = lora_A.size(1), N = lora_B.size(0), r = lora_A.size(0);
  const int64_t M = static_cast<int64_t>(dy.operand.rows);
  const Scalar dtype = scalar(dy.tensor.scalar_type()), adapter_dtype = scalar(lora_A.scalar_type());
  if (need.by_torch && M > 0) {
    const Tensor rows = as_matrix(dy).tensor, scaled = multiply(product(rows, lora_B), scaling);
    if (dx) add_product(*dx, scaled, lora_A);
    LowRankGradients found;
    if (need.A) found.A = product(transposed(scaled), as_matrix(*x).tensor);
    if (need.B) found.B = multiply(product(transposed(rows), *h), scaling);
    return found;
  }

  // Allocate.
  const auto fresh = [&](const std::vector<int64_t>& shape, const Tensor& like) {
    return M == 0 ? torch::stable::new_zeros(like, shape) : empty(shape, like);
  };
  OptionalTensor z, dA, dB, unscaled_dB, x_tensor, h_tensor;
  if (need.A || need.z) z = empty({M, r}, lora_A);
  if (need.A) dA = fresh({r, K}, lora_A);
  if (need.B || need.scaling) (need.scaling ? unscaled_dB : dB) = fresh({N, r}, lora_B);
  if (x.has_value()) x_tensor = x->tensor;
  if (h.has_value()) h_tensor = as_contiguous(*h);
  // A saved tensor that a hook brought back may begin anywhere; the plan takes h to begin at a run of elements.
  if (h_tensor && h_tensor->storage_offset() % RUN != 0) h_tensor = torch::stable::clone(*h_tensor);
  const Rows A = rows_of(lora_A), B = rows_of(lora_B);
  const Tensor scale = constant(scaling);
  const OptionalTensor seed_constant = constant(seed);

  // Plan.
  const AdapterDropout dropout(r, seed, dropout_p, ranks);
  Plan<DeltaConfiguration> delta;
  if (M > 0 && (dx || z)) {
    delta = plan_or_throw(DeltaProblem{
        Pass::backward, dtype, adapter_dtype, dy.operand, A.operand, B.operand, dx.has_value(), z.has_value(),
        dx ? static_cast<uint64_t>(dx->storage_offset()) : 0, dropout, gpu_cores()});
  }
  const Operand x_shape = {dy.operand.rows, static_cast<uint64_t>(K)};
  const Operand x_in = x.has_value() ? x->operand : x_shape;
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

  const OptionalTensor partial = scratch(delta.sums, dy.tensor);

  // Encode.
  Dispatches dispatches;
  dispatches.add(
      delta,
      {{DELTA_X, dy.tensor},
       {DELTA_LORA_A, B.tensor},
       {DELTA_LORA_B, A.tensor},
       {DELTA_Y, dx},
       {DELTA_H, z},
       {DELTA_PARTIAL, partial},
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
  if (!need.scaling) return {dA, dB, std::nullopt, z};
  if (need.B) dB = torch::stable::to(multiply(*unscaled_dB, scaling), lora_B.scalar_type());
  const Tensor wide = torch::stable::to(*unscaled_dB, ScalarType::Float);
  const Tensor total = torch::stable::sum(multiply(wide, lora_B));
  return {dA, dB, torch::stable::to(total, scaling.device()), z};
}

}  // namespace torch_fused_lora
