// What the kernels on rows share: which thread has which part of a row, and sums over a row.
#pragma once

#include "operands.h"

/// Simdgroups of a threadgroup. A row has SIMDGROUPS of them; where that is less, the group has several rows at once.
constexpr short group_simdgroups(short row_simdgroups) {
  return row_simdgroups < 8 ? 8 : row_simdgroups;
}

/// A thread's place in its threadgroup, which takes its rows in blocks of ROWS. Of its row the thread has the runs at
/// `column()` and every STEP elements on.
template <short SIMDGROUPS>
struct Place {
  static constant constexpr short ROWS = group_simdgroups(SIMDGROUPS) / SIMDGROUPS;
  static constant constexpr short ROW_THREADS = 32 * SIMDGROUPS;
  static constant constexpr uint STEP = ROW_THREADS * RUN;

  ushort thread_index, simdgroup_index, lane;

  uint row(uint block) const thread { return block * ROWS + simdgroup_index / SIMDGROUPS; }
  uint column() const thread { return thread_index % ROW_THREADS * RUN; }

  /// The sum over the row's threads, the same bits in each of them. `shared` has a float a simdgroup of the group; two
  /// that take turns need no barrier between one sum and the next.
  float sum(float value, threadgroup float* shared) const thread {
    const float part = simd_sum(value);
    if (SIMDGROUPS == 1) {
      return part;
    }
    if (lane == 0) {
      shared[simdgroup_index] = part;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const short first = simdgroup_index / SIMDGROUPS * SIMDGROUPS;
    return simd_sum(lane < SIMDGROUPS ? shared[first + lane] : 0.0f);
  }
};

template <typename T>
Run load_row(Matrix<T> matrix, uint row, uint column) {
  return load_run(matrix.at(row, column), matrix.col_stride, left(column, matrix.cols), matrix.wide);
}

inline Run filled(float value) {
  return {float4(value), float4(value)};
}

inline Run operator+(Run a, Run b) {
  return {a.low + b.low, a.high + b.high};
}

inline Run operator-(Run a, Run b) {
  return {a.low - b.low, a.high - b.high};
}

inline Run operator*(Run a, Run b) {
  return {a.low * b.low, a.high * b.high};
}

inline Run operator*(Run a, float b) {
  return {a.low * b, a.high * b};
}

inline float total(Run a) {
  const float4 sums = a.low + a.high;
  return (sums.x + sums.y) + (sums.z + sums.w);
}
