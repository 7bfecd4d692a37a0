// What lora_linear and lora_delta share on mps: the checks of the adapters, and the low-rank term with its gradients,
// by the kernels lora_delta and lora_grad.
#pragma once

#include <optional>
#include <vector>

#include "../plan/configuration.h"
#include "../plan/launch.h"
#include "tensors.h"

namespace torch_fused_lora {

/// What the operators' arguments have in common.
struct Adapters {
  const Tensor &lora_A, &lora_B, &scaling;
  const OptionalTensor& seed;
  const std::vector<double>& dropout_p;
  const std::vector<int64_t>& ranks;
};

/// Their shapes and dtypes beside `like`, the operand of the full width.
void check_adapters(
    const Expect& expect, const Tensor& like, const char* like_name, int64_t K, int64_t N, const Adapters& adapters);

/// Their shapes, and grad's beside them: what a backward knows before it is told which gradients are asked for.
void check_low_rank(const Expect& expect, const Tensor& grad, const Adapters& adapters);

/// An operand of a backward that was saved for it.
void check_saved(
    const Expect& expect,
    const char* name,
    const OptionalTensor& tensor,
    const std::vector<int64_t>& shape,
    const char* like_name,
    const Tensor& like);

/// The product of all dimensions of `tensor` but the last.
int64_t rows_in(const Tensor& tensor);

/// What is tuned for a call of lora_linear, while it lives: nothing where it drops or torch is to be deterministic.
Tuned tuned_for(bool backward, const Rows& rows, const std::optional<Adapters>& adapters);

/// What a plan's steps hand on to each other, if they do.
OptionalTensor scratch(const PartialSums& sums, const Tensor& like);

/// y += s h B^T in place, where y is given, with h = dropout(x) A^T, which is written where it is given. `by_torch`: by
/// torch's own products, of matrices y and x and without dropout.
void add_delta(
    const OptionalTensor& y, const Rows& x, const Adapters& adapters, const OptionalTensor& h, bool by_torch = false);

/// The gradients asked for, and z where it was needed.
struct LowRankGradients {
  OptionalTensor A, B, scaling, z;
};

struct LowRankNeeds {
  bool A, B, scaling, z = false, by_torch = false;
};

/// dx += mask * s z A in place, where dx is given, with z = dy B; and the gradients asked for. By torch's own products
/// if need.by_torch, without dropout and neither scaling's gradient nor z.
LowRankGradients low_rank_backward(
    const Rows& dy,
    const OptionalTensor& dx,
    const std::optional<Rows>& x,
    const OptionalTensor& h,
    const Adapters& adapters,
    const LowRankNeeds& need);

}  // namespace torch_fused_lora
