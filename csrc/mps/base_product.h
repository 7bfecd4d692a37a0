// The base product with the low-rank term inside it, forward and backward, over a weight packed or not: by lora_decode
// where the rows are few, else by lora_gemm.
#pragma once

#include "../plan/lora.h"
#include "low_rank.h"

namespace torch_fused_lora {

/// A frozen weight with what unpacks it. All contiguous where it is packed.
struct BaseWeight {
  Tensor data;
  OptionalTensor scales, biases;
  Weight weight;
};

BaseWeight plain(const Tensor& weight);

/// x W^T + bias + s h B^T, with h = dropout(x) A^T, which is written where it is given; without adapters, x W^T + bias.
Tensor forward_product(
    const Rows& x,
    const BaseWeight& base,
    const OptionalTensor& bias,
    const std::optional<Adapters>& adapters,
    const OptionalTensor& h);

/// dy W + mask * s z A with z = dy B, where `need_x`; and the low-rank gradients asked for.
struct ProductGradients {
  OptionalTensor x;
  LowRankGradients low_rank;
};

ProductGradients backward_product(
    const Rows& dy,
    const BaseWeight& base,
    bool need_x,
    const std::optional<Rows>& x,
    const OptionalTensor& h,
    const std::optional<Adapters>& adapters,
    LowRankNeeds need);

}  // namespace torch_fused_lora
