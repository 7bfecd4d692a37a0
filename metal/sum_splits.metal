// sum_splits: a sum over all rows, from the partial sums of several threadgroups; of two results in one dispatch.
//
// Algorithm. One thread an element of a result, which adds the element's partial sums in order: deterministic.
// Threads. 256. Bytes. Every partial sum is read once, every element written once: the least possible.
// Rounding. Sums are float32; a result is rounded once to its type.
#include <metal_stdlib>

#include "sum_splits.h"

namespace tfl {

using namespace metal;

template <typename T>
[[kernel]] [[max_total_threads_per_threadgroup(SUM_THREADS)]]
void sum_splits(
    device const float* first_partial [[buffer(SUM_FIRST_PARTIAL)]],  // splits x elements.x
    device const float* second_partial [[buffer(SUM_SECOND_PARTIAL)]],
    device T* first [[buffer(SUM_FIRST)]],
    device T* second [[buffer(SUM_SECOND)]],
    constant Pair& elements [[buffer(SUM_ELEMENTS)]],  // of the first result, of the second
    constant Pair& splits [[buffer(SUM_SPLITS)]],
    uint index [[thread_position_in_grid]]) {
  const bool is_first = index < elements.x;
  const uint i = is_first ? index : index - elements.x, count = is_first ? elements.x : elements.y;
  device const float* const partial = is_first ? first_partial : second_partial;
  device T* const out = is_first ? first : second;
  if (i < count) {
    device const float* source = partial + i;
    float sum = 0.0f;
    for (uint split = 0; split < splits.x; ++split, source += count) {
      sum += *source;
    }
    out[i] = static_cast<T>(sum);
  }
}

}  // namespace tfl
