// Dropout of stacked adapters: the slices of ranks that have a launch of their own, and what the kernels get.
#pragma once

#include <algorithm>
#include <cstring>

#include "lora.h"
#include "planning.h"

namespace torch_fused_lora {

/// A slice of the stacked ranks that one launch covers: at most `max_ranks` of one adapter, or of all where none drops.
struct Slice {
  uint32_t begin, end, stream;
  double p;
};

template <typename Visit>
void for_each_slice(const Dropout& dropout, uint64_t r, uint32_t max_ranks, const Visit& visit) {
  uint32_t begin = 0;
  for (uint32_t adapter = 0; adapter < std::max(dropout.adapters, 1u); ++adapter) {
    const bool drops = dropout.adapters > 0;
    const uint32_t end = drops ? begin + dropout.ranks[adapter] : static_cast<uint32_t>(r);
    while (begin < end) {
      const uint32_t ranks = std::min(max_ranks, end - begin);
      visit(Slice{begin, begin + ranks, adapter, drops ? dropout.p[adapter] : 0.0});
      begin += ranks;
    }
  }
}

/// The threshold below which a random word drops, and the bits of 1 / (1 - p).
inline tfl::Pair dropout_words(double p) {
  const double scaled = p * 4294967296.0;
  const double rounded = static_cast<double>(static_cast<uint64_t>(scaled));
  uint64_t threshold = static_cast<uint64_t>(scaled);
  const double rest = scaled - rounded;  // round half to even, as Python's round does
  if (rest > 0.5 || (rest == 0.5 && threshold % 2 == 1)) ++threshold;
  const float inverse_keep = static_cast<float>(1.0 / (1.0 - p));
  uint32_t bits;
  std::memcpy(&bits, &inverse_keep, sizeof bits);
  return pair(std::min<uint64_t>(threshold, UINT32_MAX), bits);
}

}  // namespace torch_fused_lora
