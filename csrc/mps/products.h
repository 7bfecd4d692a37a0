// torch's own products of matrices, which the low-rank term is added to.
#pragma once

#include "tensors.h"

namespace torch_fused_lora {

// All operands have two dimensions (`as_matrix`), and what comes back is contiguous. A half result is rounded once,
// and once more where a bias cannot go along with its product; each part of a long sum is rounded, and each sum of
// parts (tests/reference.py derives a bound from that).

/// x weight^T + bias.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

/// left right.
Tensor product(const Tensor& left, const Tensor& right);

/// sum += left right.
void add_product(const Tensor& sum, const Tensor& left, const Tensor& right);

Tensor transposed(const Tensor& matrix);

}  // namespace torch_fused_lora
