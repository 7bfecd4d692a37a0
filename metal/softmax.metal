// softmax: y = exp(x - maximum) / sum of exp(x - maximum) along rows.
// softmax_backward: dx = y * (grad - sum of y * grad).
//
// Algorithm. Each thread takes exp of its elements against a maximum of its own, which rises as it goes (online: one
//   loop finds maximum and sum); the threads' sums are then brought to the row's maximum and added. HELD: a thread has
//   one run of the row and keeps it in registers; longer rows are looped over once more.
//   A maximum starts at the lowest finite number, so that no exp(-inf - -inf) arises while all that was seen is -inf.
//   A row that is -inf throughout has the sum 0, and 0 * (1 / 0) is NaN; one with a NaN or +inf has the sum NaN: as
//   torch's.
// Tile. None: two floats a simdgroup in threadgroup memory, twice.
// Threads. A run of eight elements each: 1 to 16 simdgroups a row, 8 to 16 a group.
// Bytes (counted by the executor). HELD: every operand is touched once, the least possible. Looped rows: what is read is read twice.
// Rounding. Once: sums and products are float32.
#include "rows.h"

constant constexpr uint SOFTMAX_WIDE_X = 1, SOFTMAX_WIDE_GRAD = 2, SOFTMAX_WIDE_OUT = 4;
constant constexpr float LOWEST = -FLT_MAX;

/// Of some elements: a number that none exceeds, and the sum of exp(element - maximum).
struct Part {
  float maximum, sum;
};

/// The simdgroup's parts as one.
Part joined(Part part) {
  const float maximum = simd_max(part.maximum);
  return {maximum, simd_sum(part.sum * precise::exp(part.maximum - maximum))};
}

/// A run of the row, -inf beyond its end.
template <typename T>
Run load_logits(Matrix<T> x, uint row, uint column) {
  Run run = load_row(x, row, column);
  for (short i = 0; i < RUN; ++i) {
    if (uint(i) >= x.cols - column) {
      run.set(i, -INFINITY);
    }
  }
  return run;
}

inline float largest(Run run) {
  const float4 maxima = max(run.low, run.high);
  return max(max(maxima.x, maxima.y), max(maxima.z, maxima.w));
}

inline Run exponentials(Run run, float maximum) {
  return {precise::exp(run.low - maximum), precise::exp(run.high - maximum)};
}

template <typename T, short SIMDGROUPS, bool HELD>
[[kernel, max_total_threads_per_threadgroup(32 * group_simdgroups(SIMDGROUPS))]]
void softmax(
    device const T* x [[buffer(0)]],
    device T* y [[buffer(1)]],
    constant uint2& m_h [[buffer(2)]],
    constant uint2& blocks_flags [[buffer(3)]],
    constant uint2& x_levels [[buffer(4)]],
    constant uint2& x_strides [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr uint STEP = Place<SIMDGROUPS>::STEP;
  threadgroup Part shared[2][group_simdgroups(SIMDGROUPS)];
  const Place<SIMDGROUPS> place = {thread_index, simdgroup_index, lane};
  const uint M = m_h.x, H = m_h.y, flags = blocks_flags.y;
  const bool wide_y = (flags & SOFTMAX_WIDE_OUT) != 0;
  const Matrix<T> x_rows = matrix(x, M, H, x_levels, x_strides, (flags & SOFTMAX_WIDE_X) != 0);

  short turn = 0;
  for (uint block = group; block < blocks_flags.x; block += groups, turn ^= 1) {
    const uint row = place.row(block), end = row < M ? H : 0;
    Run run = filled(0.0f);
    Part own = {LOWEST, 0.0f};
    for (uint c = place.column(); c < end; c += STEP) {
      run = load_logits(x_rows, row, c);
      const float maximum = max(own.maximum, largest(run));
      run = exponentials(run, maximum);
      own = {maximum, own.sum * precise::exp(own.maximum - maximum) + total(run)};
    }
    Part all = joined(own);
    if (SIMDGROUPS > 1) {
      if (lane == 0) {
        shared[turn][simdgroup_index] = all;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      all = {LOWEST, 0.0f};
      if (lane < SIMDGROUPS) {
        all = shared[turn][simdgroup_index / SIMDGROUPS * SIMDGROUPS + lane];
      }
      all = joined(all);
    }
    const float scale = precise::exp(own.maximum - all.maximum) * (1.0f / all.sum);
    for (uint c = place.column(); c < end; c += STEP) {
      if (!HELD) {
        run = exponentials(load_logits(x_rows, row, c), own.maximum);
      }
      store_run(y + ulong(row) * H + c, run * scale, H - c, wide_y);
    }
  }
}

template <typename T, short SIMDGROUPS, bool HELD>
[[kernel, max_total_threads_per_threadgroup(32 * group_simdgroups(SIMDGROUPS))]]
void softmax_backward(
    device const T* grad [[buffer(0)]],
    device const T* y [[buffer(1)]],
    device T* dx [[buffer(2)]],
    constant uint2& m_h [[buffer(3)]],
    constant uint2& blocks_flags [[buffer(4)]],
    constant uint2& grad_levels [[buffer(5)]],
    constant uint2& grad_strides [[buffer(6)]],
    constant uint2& y_levels [[buffer(7)]],
    constant uint2& y_strides [[buffer(8)]],
    uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr uint STEP = Place<SIMDGROUPS>::STEP;
  threadgroup float shared[2][group_simdgroups(SIMDGROUPS)];
  const Place<SIMDGROUPS> place = {thread_index, simdgroup_index, lane};
  const uint M = m_h.x, H = m_h.y, flags = blocks_flags.y;
  const bool wide_dx = (flags & SOFTMAX_WIDE_OUT) != 0;
  const Matrix<T> grads = matrix(grad, M, H, grad_levels, grad_strides, (flags & SOFTMAX_WIDE_GRAD) != 0);
  const Matrix<T> y_rows = matrix(y, M, H, y_levels, y_strides, (flags & SOFTMAX_WIDE_X) != 0);

  Run grad_run = filled(0.0f), y_run = filled(0.0f);
  short turn = 0;
  for (uint block = group; block < blocks_flags.x; block += groups, turn ^= 1) {
    const uint row = place.row(block), end = row < M ? H : 0;
    float products = 0.0f;
    for (uint c = place.column(); c < end; c += STEP) {
      grad_run = load_row(grads, row, c);
      y_run = load_row(y_rows, row, c);
      products += total(grad_run * y_run);
    }
    const float sum = place.sum(products, shared[turn]);
    for (uint c = place.column(); c < end; c += STEP) {
      if (!HELD) {
        grad_run = load_row(grads, row, c);
        y_run = load_row(y_rows, row, c);
      }
      store_run(dx + ulong(row) * H + c, y_run * (grad_run - filled(sum)), H - c, wide_dx);
    }
  }
}
