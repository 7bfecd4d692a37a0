// sum_splits: a sum over all rows, from the partial sums of several threadgroups; of two results in one dispatch.
//
// Algorithm. One thread an element of a result, which adds the element's partial sums in order. Where they are many,
//   several threads, each of which adds every `slices`-th, eight loads at once in flight; the first adds up the
//   threads' sums, from 1 KiB of threadgroup memory, in order. Deterministic.
// Threads. 256. Bytes. Every partial sum is read once, every element written once: the least possible.
// Rounding. Sums are float32; a result is rounded once to its type.
#include "operands.h"
#include "sum_splits.h"

namespace tfl {

template <typename T>
[[kernel]] [[max_total_threads_per_threadgroup(SUM_THREADS)]]
void sum_splits(
    device const float* first_partial [[buffer(SUM_FIRST_PARTIAL)]],  // splits x elements.x
    device const float* second_partial [[buffer(SUM_SECOND_PARTIAL)]],
    device T* first [[buffer(SUM_FIRST)]],
    device T* second [[buffer(SUM_SECOND)]],
    constant Pair& elements [[buffer(SUM_ELEMENTS)]],  // of the first result, of the second
    constant Pair& splits_slices [[buffer(SUM_SPLITS)]],
    uint group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  threadgroup float sums[SUM_THREADS];
  const uint splits = splits_slices.x, slices = splits_slices.y, places = SUM_THREADS / slices;
  const uint slice = thread_index / places, index = group * places + thread_index % places;
  const bool is_first = index < elements.x;
  const uint i = is_first ? index : index - elements.x, count = is_first ? elements.x : elements.y;
  device const float* const partial = is_first ? first_partial : second_partial;
  device T* const out = is_first ? first : second;
  float sum = 0.0f;
  if (i < count) {
    const uint share = (left(slice, splits) + slices - 1) / slices;
    sum = sum_of_splits(partial + ulong(slice) * count + i, ulong(slices) * count, share);
  }
  sums[thread_index] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (slice == 0 && i < count) {
    for (uint other = thread_index + places; other < SUM_THREADS; other += places) {
      sum += sums[other];
    }
    out[i] = static_cast<T>(sum);
  }
}

}  // namespace tfl
