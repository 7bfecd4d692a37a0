// What a launch plan says: plain C++, no torch and no Metal in it.
//
// The extension links the plans; the tests load the same files through their C functions, so that what is tested is
// what is launched.
#pragma once

#include <cstdint>

namespace torch_fused_lora {

enum class Scalar : int32_t { float32, float16, bfloat16 };

/// A matrix in device memory. Strides and offset count elements. Its rows come in two levels, as the flattened leading
/// dimensions of a 3-D tensor do: row i starts at (i / inner) * outer_stride + (i % inner) * row_stride.
/// One level: inner >= rows.
struct Operand {
  uint64_t rows, cols, inner, outer_stride, row_stride, col_stride, offset;
};

/// One dispatch. Buffers [0, tensors) are the kernel's tensors in the order its signature gives them, the rest `words`,
/// eight bytes each. `threads` are totals, multiples of `group`. The strings live as long as the process, and `source`
/// is the same pointer for the same text: it can be the key of a library cache.
struct Launch {
  const char* source;
  const char* kernel;
  uint32_t threads[3], group[3];
  uint32_t tensors, word_count;
  uint64_t words[12];
};

}  // namespace torch_fused_lora
