#include "chain.h"

#include <algorithm>
#include <cstring>

void Chain::start_threadgroup() {
  steps = 0;
  memset(counts_, 0, sizeof counts_);
  memset(multiplies_, 0, sizeof multiplies_);
  memset(collectives_, 0, sizeof collectives_);
}

void Chain::load(uint32_t simdgroup, const void* pc) {
  Place* const begin = places_[simdgroup];
  Place* const end = begin + counts_[simdgroup];
  Place* place = std::find_if(begin, end, [=](const Place& other) { return other.pc == pc; });
  if (place == end) {
    if (counts_[simdgroup] == places) return;
    ++counts_[simdgroup];
    *place = {pc, 0};
  }
  ++place->passes;
}

void Chain::collective(uint32_t simdgroup, bool is_matrix_multiply) {
  ++(is_matrix_multiply ? multiplies_ : collectives_)[simdgroup];
}

void Chain::barrier() {
  uint32_t most = 0;
  for (size_t simdgroup = 0; simdgroup < simdgroups; ++simdgroup) {
    for (uint32_t i = 0; i < counts_[simdgroup]; ++i) most = std::max(most, places_[simdgroup][i].passes);
  }
  steps += most;
  memset(counts_, 0, sizeof counts_);
}

uint64_t Chain::multiplies() const { return *std::max_element(multiplies_, multiplies_ + simdgroups); }
uint64_t Chain::collectives() const { return *std::max_element(collectives_, collectives_ + simdgroups); }
