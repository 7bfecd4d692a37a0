// From torch's tensors to the launch plan's operands.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "launch_plan.h"

namespace torch_fused_lora {

/// A tensor as the kernels see it. `tensor` is a contiguous copy where they could not read the original: where its
/// leading dimensions do not fold into two levels of rows, or none of its dimensions has unit stride.
struct Rows {
  torch::stable::Tensor tensor;
  Operand operand;
};

void count_contiguous_copy();

inline Rows rows_of(const torch::stable::Tensor& tensor) {
  // The leading dimensions, folded where memory allows: the last two levels, the inner one second.
  struct Level {
    int64_t size, stride;
  };
  Level outer = {}, inner = {};
  int count = 0;
  const int64_t dims = tensor.dim();
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) {
    const Level level = {tensor.size(d), tensor.stride(d)};
    rows *= level.size;
    if (level.size == 1) continue;
    if (count > 0 && inner.stride == level.size * level.stride) {
      inner = {inner.size * level.size, level.stride};
    } else {
      outer = inner;
      inner = level;
      ++count;
    }
  }
  const int64_t cols = tensor.size(dims - 1), col_stride = cols > 1 ? tensor.stride(dims - 1) : 1;
  const int64_t row_stride = count == 0 ? cols : inner.stride;
  if (rows > 0 && cols > 0 && (count > 2 || (col_stride != 1 && row_stride != 1))) {
    count_contiguous_copy();
    return rows_of(torch::stable::contiguous(tensor));
  }
  const bool two = count == 2;
  const auto u = [](int64_t value) { return static_cast<uint64_t>(value); };
  const Operand operand = {
      u(rows), u(cols), u(two ? inner.size : rows), u(two ? outer.stride : 0), u(row_stride), u(col_stride),
      u(tensor.storage_offset())};
  return {tensor, operand};
}

}  // namespace torch_fused_lora
