// What every launch plan is made with.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>

#include "../../metal/sizes.h"
#include "configuration.h"
#include "launch.h"

namespace torch_fused_lora {

inline uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

/// The number between `least` and `most` (`least` where that is less) that is nearest to `value`.
inline uint64_t within(uint64_t value, uint64_t least, uint64_t most) { return std::max(std::min(value, most), least); }

inline uint32_t bytes(Scalar dtype) { return kScalars[static_cast<int32_t>(dtype)].bytes; }
inline const char* msl(Scalar dtype) { return kScalars[static_cast<int32_t>(dtype)].msl; }

inline tfl::Pair pair(uint64_t x, uint64_t y) { return {static_cast<uint32_t>(x), static_cast<uint32_t>(y)}; }

/// The `levels` and `strides` of a kernel's Matrix.
tfl::Pair levels(const Operand& m);
tfl::Pair strides(const Operand& m);

Operand transposed(const Operand& m);

/// The elements of 16 bytes: what the kernels load and store at once.
inline uint32_t wide_elements(Scalar dtype) { return 16 / bytes(dtype); }

/// Whether runs of elements along the dimension of unit stride are aligned to 16 bytes wherever they start at a
/// multiple of `wide_elements`.
bool aligned(const Operand& m, Scalar dtype);

/// How the operand lies, to a kernel.
tfl::Layout layout_of(const Operand& m, Scalar dtype);

struct Named {
  const char* name;
  const Operand& operand;
};

/// One of which the stride alone counts.
inline Operand bias_of(uint64_t stride) { return {1, 1, 1, 0, 0, stride}; }

/// Empty if all extents and strides fit the kernels' 32-bit arguments, else a text that names the first that does not.
std::string too_large(std::initializer_list<Named> operands);

/// One instantiation of a kernel family: its template arguments as they stand in the source, and a name made of them,
/// such as lora_delta_half_float_down_2_4_plain.
class Variant {
 public:
  explicit Variant(const char* family) : family_(family), name_(family) {
    name_.reserve(64);
    arguments_.reserve(64);
  }

  Variant& add(const std::string& argument, const std::string& in_name) {
    arguments_ += (arguments_.empty() ? "" : ", ") + argument;
    if (!in_name.empty()) name_ += "_" + in_name;
    return *this;
  }
  Variant& add(const std::string& argument) { return add(argument, argument); }
  Variant& add(uint32_t argument) { return add(std::to_string(argument)); }

  /// The family's text and one instantiation line, put together once a process.
  void assemble(const char* text, Launch& launch) const;

 private:
  std::string family_, name_, arguments_;
};

void add_layout(Variant& variant, tfl::Layout layout);

/// A weight's format, as metal/weights.h has it: the kernel's argument, and its `layout`.
void add_format(Variant& variant, const Weight& weight, Scalar dtype);
tfl::Pair layout(const Weight& weight);

/// Threadgroups of `group` threads along x.
void set_grid(Launch& launch, uint32_t group, uint64_t x, uint64_t y = 1, uint64_t z = 1);

/// What a buffer index of the kernel's gets.
struct Word {
  uint32_t buffer;
  tfl::Pair value;
};

/// All words of a launch, the first of which follows the kernel's tensors.
void set_arguments(Launch& launch, std::initializer_list<Word> words);

/// sum_splits: two results of so many elements (none: 0) from `splits` partial sums each; nothing where there is one.
PartialSums plan_sums(Scalar dtype, uint64_t first_elements, uint64_t second_elements, uint64_t splits);

}  // namespace torch_fused_lora
