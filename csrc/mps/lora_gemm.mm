#include "lora_gemm.h"

#include "../../metal/lora_gemm.h"
#include "kernels.h"

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

/// One dispatch; `low_rank` is h or z.
Tensor multiply(
    Pass pass,
    const Rows& in,
    const BaseWeight& base,
    const OptionalTensor& bias,
    const std::optional<Adapters>& adapters,
    const OptionalTensor& low_rank) {
  const bool is_forward = pass == Pass::forward;
  const Operand& W = base.weight.operand;
  const int64_t rows = static_cast<int64_t>(in.operand.rows),
                columns = static_cast<int64_t>(is_forward ? W.rows : W.cols);
  const Tensor y = empty({rows, columns}, in.tensor);
  if (rows == 0 || columns == 0) return y;
  OptionalTensor factor, scaling, seed;
  GemmProblem problem = {
      pass, scalar(in.tensor.scalar_type()), scalar(in.tensor.scalar_type()), in.operand, base.weight};
  problem.gpu_cores = gpu_cores();
  if (bias.has_value()) {
    problem.has_bias = true;
    problem.bias_stride = static_cast<uint64_t>(bias->stride(0));
  }
  if (adapters.has_value()) {
    const Rows side = rows_of(is_forward ? adapters->lora_B : adapters->lora_A);
    factor = side.tensor;
    problem.factor = side.operand;
    problem.adapter_dtype = scalar(side.tensor.scalar_type());
    problem.r = static_cast<uint64_t>(low_rank->size(1));
    scaling = constant(adapters->scaling);
    seed = constant(adapters->seed);
    if (!is_forward && seed.has_value()) problem.dropout_p = adapters->dropout_p[0];
  }
  const auto plan = plan_or_throw(problem);
  Dispatches dispatches;
  dispatches.add(
      plan,
      {{GEMM_X, in.tensor},
       {GEMM_WEIGHT, base.data},
       {GEMM_SCALES, base.scales},
       {GEMM_BIASES, base.biases},
       {GEMM_BIAS, bias},
       {GEMM_H, low_rank},
       {GEMM_FACTOR, factor},
       {GEMM_Y, y},
       Binding::constant(GEMM_SCALING, scaling),
       Binding::constant(GEMM_SEED, seed)});
  dispatches.encode();
  return y;
}

}  // namespace

BaseWeight plain(const Tensor& weight) {
  const Rows rows = rows_of(weight);
  return {rows.tensor, std::nullopt, std::nullopt, {rows.operand}};
}

Tensor forward_product(
    const Rows& x,
    const BaseWeight& base,
    const OptionalTensor& bias,
    const std::optional<Adapters>& adapters,
    const OptionalTensor& h) {
  OptionalTensor low_rank = h;
  if (adapters.has_value() && x.operand.rows > 0) {
    const Tensor& A = adapters->lora_A;
    if (!h.has_value()) low_rank = empty({static_cast<int64_t>(x.operand.rows), A.size(0)}, A);
    add_delta(std::nullopt, x, *adapters, low_rank);
  }
  return multiply(Pass::forward, x, base, bias, adapters, low_rank);
}

ProductGradients backward_product(
    const Rows& dy,
    const BaseWeight& base,
    bool need_x,
    const std::optional<Rows>& x,
    const OptionalTensor& h,
    const std::optional<Adapters>& adapters,
    LowRankNeeds need) {
  ProductGradients found;
  // Adapters that drop apart have a mask each, and the sums of one simdgroup are all of them: lora_delta adds them.
  const bool apart = adapters.has_value() && adapters->seed.has_value() && adapters->ranks.size() > 1;
  if (need_x && apart) found.x = multiply(Pass::backward, dy, base, std::nullopt, std::nullopt, std::nullopt);
  if (adapters.has_value()) {
    need.z = need_x && !apart;
    found.low_rank = low_rank_backward(dy, found.x, x, h, *adapters, need);
  }
  if (need_x && !apart) found.x = multiply(Pass::backward, dy, base, std::nullopt, adapters, found.low_rank.z);
  return found;
}

}  // namespace torch_fused_lora
