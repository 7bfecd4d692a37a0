#include "planning.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "../../metal/sum_splits.h"

extern const char sum_splits_source[];

namespace torch_fused_lora {

using namespace tfl;  // what metal/ says

Pair levels(const Operand& m) { return pair(std::max<uint64_t>(std::min(m.inner, m.rows), 1), m.outer_stride); }

Pair strides(const Operand& m) { return pair(m.row_stride, m.col_stride); }

bool aligned(const Operand& m, Scalar dtype) {
  const uint64_t quantum = wide_elements(dtype);
  const bool along_cols = m.col_stride == 1;
  if (!along_cols && m.row_stride != 1) return false;
  const uint64_t across = along_cols ? (m.rows > 1 ? m.row_stride : 0) : (m.cols > 1 ? m.col_stride : 0);
  const uint64_t outer = m.inner < m.rows ? m.outer_stride : 0;
  return m.offset % quantum == 0 && across % quantum == 0 && outer % quantum == 0;
}

Layout layout_of(const Operand& m, Scalar dtype) {
  if (!aligned(m, dtype) || m.inner < m.rows) return Layout::any;
  if (m.col_stride == 1) return m.cols % RUN == 0 ? Layout::rows : Layout::any;
  return m.rows % RUN == 0 ? Layout::columns : Layout::any;
}

Operand transposed(const Operand& m) { return {m.cols, m.rows, m.cols, 0, m.col_stride, m.row_stride, m.offset}; }

std::string too_large(std::initializer_list<Named> operands) {
  for (const auto& [name, m] : operands) {
    for (uint64_t value : {m.rows, m.cols, m.outer_stride, m.row_stride, m.col_stride}) {
      if (value > UINT32_MAX) return std::string(name) + ": a dimension or stride of 2**32 elements or more";
    }
  }
  return {};
}

void Variant::assemble(const char* text, Launch& launch) const {
  static std::mutex mutex;
  static std::map<std::string, std::string> sources;
  std::lock_guard<std::mutex> lock(mutex);
  auto [found, is_new] = sources.try_emplace(name_);
  if (is_new) {
    const std::string function = "tfl::" + family_ + "<" + arguments_ + ">";
    found->second = std::string(text) + "\ntemplate [[host_name(\"" + name_ + "\")]] [[kernel]] decltype(" + function +
        ") " + function + ";\n";
  }
  launch.kernel = found->first.c_str();
  launch.source = found->second.c_str();
}

void add_layout(Variant& variant, Layout layout) {
  const char* const names[] = {"any", "rows", "columns"};
  const std::string name = names[static_cast<int>(layout)];
  variant.add("tfl::Layout::" + name, name);
}

void add_format(Variant& variant, const Weight& weight, Scalar dtype) {
  const std::string bits = std::to_string(weight.bits), scale = msl(weight.scale_dtype);
  if (weight.bits == 0) {
    variant.add(std::string("tfl::Plain<") + msl(dtype) + ">", "");
  } else if (weight.has_table) {
    variant.add("tfl::Packed<tfl::Table>", "table" + bits);
  } else {
    variant.add("tfl::Packed<tfl::Affine<" + bits + ", " + scale + ">>", "affine" + bits + "_" + scale);
  }
}

Pair layout(const Weight& weight) {
  uint32_t shift = 0;
  while ((weight.group_size >> shift) > 1) ++shift;
  return weight.bits == 0 ? strides(weight.operand) : pair(weight.operand.cols * weight.bits / 32, shift);
}

void set_grid(Launch& launch, uint32_t group, uint64_t x, uint64_t y, uint64_t z) {
  if (x * group > UINT32_MAX) throw std::runtime_error(std::string(launch.kernel) + ": 2**32 threads or more");
  const uint32_t threads[3] = {static_cast<uint32_t>(x * group), static_cast<uint32_t>(y), static_cast<uint32_t>(z)};
  const uint32_t groups[3] = {group, 1, 1};
  std::memcpy(launch.threads, threads, sizeof threads);
  std::memcpy(launch.group, groups, sizeof groups);
}

void set_arguments(Launch& launch, std::initializer_list<Word> words) {
  launch.tensors = words.begin()->buffer;
  launch.word_count = static_cast<uint32_t>(words.size());
  for (const Word& word : words) std::memcpy(&launch.words[word.buffer - launch.tensors], &word.value, sizeof(Pair));
}

PartialSums plan_sums(Scalar dtype, uint64_t first_elements, uint64_t second_elements, uint64_t splits) {
  PartialSums sums;
  if (splits <= 1) return sums;
  sums.splits = static_cast<uint32_t>(splits);
  sums.elements = first_elements + second_elements;
  Variant("sum_splits").add(msl(dtype)).assemble(sum_splits_source, sums.launch);
  const uint64_t slices = splits > SUM_SLICES ? SUM_SLICES : 1;
  set_grid(sums.launch, SUM_THREADS, ceil_div(sums.elements, SUM_THREADS / slices));
  set_arguments(
      sums.launch, {{SUM_ELEMENTS, pair(first_elements, second_elements)}, {SUM_SPLITS, pair(splits, slices)}});
  return sums;
}

}  // namespace torch_fused_lora
