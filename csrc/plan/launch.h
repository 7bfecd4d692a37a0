// What a launch plan says: plain C++, no torch and no Metal in it. The extension links the plans and the tests load the
// same files, so that what is tested is what is launched.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace torch_fused_lora {

/// An element's type. DTYPES in torch_fused_lora/mps.py has the same order.
enum class Scalar : int32_t { float32, float16, bfloat16 };

/// What a Metal source calls a Scalar, and its size.
inline constexpr struct ScalarFacts {
  const char* msl;
  uint32_t bytes;
} kScalars[] = {{"float", 4}, {"half", 2}, {"bfloat", 2}};

/// A matrix in device memory. Strides and offset count elements. Its rows come in two levels, as the flattened leading
/// dimensions of a 3-D tensor do: row i starts at (i / inner) * outer_stride + (i % inner) * row_stride.
/// One level: inner >= rows.
struct Operand {
  uint64_t rows, cols, inner, outer_stride, row_stride, col_stride, offset;
};

/// A frozen weight, N x K: elements, or packed words of so many bits, whose rows are contiguous.
struct Weight {
  Operand operand;
  uint32_t bits;  // 0: elements of x's dtype
  uint32_t group_size;
  Scalar scale_dtype;
  bool has_table;  // that the codes are looked up in
};

constexpr uint32_t kMostTensors = 11, kMostWords = 12;

/// One dispatch. Buffers [0, tensors) are the kernel's tensors, the rest `words`, eight bytes each. `threads` are
/// totals, multiples of `group`. The strings live as long as the process, and `source` is the same pointer for the same
/// text: it can be the key of a library cache.
struct Launch {
  const char* source;
  const char* kernel;
  uint32_t threads[3], group[3];
  uint32_t tensors, word_count;
  uint64_t words[kMostWords];
};

/// Scratch: float32 partial sums, `splits` of each of `elements`, which `launch` (sum_splits) adds up after all else,
/// or the steps themselves where it has no kernel. None where `elements` is 0.
struct PartialSums {
  uint32_t splits = 1;
  uint64_t elements = 0;
  Launch launch = {};
};

/// How a problem is launched: every dispatch with the configuration it was given, in order.
template <typename Configuration>
struct Plan {
  struct Step {
    Launch launch;
    Configuration configuration;
  };

  std::string error = {};  // why the problem cannot be launched, naming the operand
  std::vector<Step> steps = {};
  PartialSums sums = {};
};

}  // namespace torch_fused_lora
