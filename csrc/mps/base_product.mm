#include "base_product.h"

#include "../../metal/lora_decode.h"
#include "../../metal/lora_gemm.h"
#include "kernels.h"

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

namespace {

uint64_t stride_of(const OptionalTensor& bias) { return bias.has_value() ? static_cast<uint64_t>(bias->stride(0)) : 0; }

/// x W^T + bias + s (x A^T) B^T of few rows, and h where it is given.
Tensor decode(
    const Rows& x,
    const BaseWeight& base,
    const OptionalTensor& bias,
    const std::optional<Adapters>& adapters,
    const OptionalTensor& h) {
  const Tensor y = empty(with_last(x.tensor, static_cast<int64_t>(base.weight.operand.rows)), x.tensor);
  const Scalar dtype = scalar(x.tensor.scalar_type());
  DecodeProblem problem = {dtype, dtype, x.operand, base.weight};
  OptionalTensor A, B, scaling;
  if (adapters.has_value()) {
    const Rows A_rows = rows_of(adapters->lora_A), B_rows = rows_of(adapters->lora_B);
    A = A_rows.tensor;
    B = B_rows.tensor;
    scaling = constant(adapters->scaling);
    problem.lora_A = A_rows.operand;
    problem.lora_B = B_rows.operand;
    problem.adapter_dtype = scalar(A->scalar_type());
  }
  problem.bias_stride = stride_of(bias);
  problem.has_bias = bias.has_value();
  problem.save_h = h.has_value();
  problem.gpu_cores = gpu_cores();
  const auto plan = plan_or_throw(problem);
  const OptionalTensor h_sums = scratch(plan.sums, y);
  Dispatches dispatches;
  dispatches.add(
      plan,
      {{DECODE_X, x.tensor},
       {DECODE_WEIGHT, base.data},
       {DECODE_SCALES, base.scales},
       {DECODE_BIASES, base.biases},
       {DECODE_BIAS, bias},
       {DECODE_LORA_A, A},
       {DECODE_LORA_B, B},
       {DECODE_Y, y},
       {DECODE_H, h},
       {DECODE_H_SUMS, h_sums},
       Binding::constant(DECODE_SCALING, scaling)});
  dispatches.encode();
  return y;
}

/// By lora_gemm; `low_rank` is h or z.
Tensor multiply(
    Pass pass,
    const Rows& in,
    const BaseWeight& base,
    const OptionalTensor& bias,
    const std::optional<Adapters>& adapters,
    const OptionalTensor& low_rank) {
  const bool is_forward = pass == Pass::forward;
  const Operand& W = base.weight.operand;
  const Tensor y = empty(with_last(in.tensor, static_cast<int64_t>(is_forward ? W.rows : W.cols)), in.tensor);
  if (y.numel() == 0) return y;
  const Scalar dtype = scalar(in.tensor.scalar_type());
  OptionalTensor factor, scaling, seed;
  GemmProblem problem = {pass, dtype, dtype, in.operand, base.weight};
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
  problem.bias_stride = stride_of(bias);
  problem.has_bias = bias.has_value();
  problem.gpu_cores = gpu_cores();
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
  const uint64_t r = adapters.has_value() ? static_cast<uint64_t>(adapters->lora_A.size(0)) : 0;
  const bool drops = adapters.has_value() && adapters->seed.has_value();
  const bool some = x.operand.rows > 0 && base.weight.operand.rows > 0;
  if (some && decodes(x.operand.rows, r, base.weight.operand.col_stride == 1, drops))
    return decode(x, base, bias, adapters, h);
  OptionalTensor low_rank = h;
  if (adapters.has_value() && some) {
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
