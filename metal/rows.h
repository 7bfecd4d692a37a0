// What the kernels on rows share: which thread has which part of a row, and sums over a row.
//
// WIDE, an argument of all of them: every row of every operand is made of whole runs, contiguous and aligned to 16
// bytes, so that nothing but loads and stores of 16 bytes is compiled. Without it elements are read one by one.
#pragma once

#include "operands.h"

namespace tfl {

/// A thread's place in its threadgroup, which takes its rows in blocks of ROWS, SIMDGROUPS simdgroups each. Of its row
/// the thread has the runs at `column()` and every STEP elements on.
template <short SIMDGROUPS, short ROWS>
struct Place {
  static constant constexpr short ROW_THREADS = LANES * SIMDGROUPS;
  static constant constexpr uint STEP = row_step(SIMDGROUPS);

  ushort thread_index, simdgroup_index, lane;

  METAL_FUNC uint row(uint block) const thread { return block * ROWS + simdgroup_index / SIMDGROUPS; }
  METAL_FUNC uint column() const thread { return thread_index % ROW_THREADS * RUN; }

  /// The sum over the row's threads, the same bits in each of them. `shared` has a float a simdgroup of the group; two
  /// that take turns need no barrier between one sum and the next.
  METAL_FUNC float sum(float value, threadgroup float* shared) const thread {
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

/// Whether a thread whose first column is `first` has more of a row at column c. HELD: it has the row at once, and a
/// compiler sees that a loop with this condition runs once.
template <bool HELD>
METAL_FUNC bool has_more(uint c, uint first, uint end) {
  return HELD ? c == first : c < end;
}

/// How many elements there are in the run at a column of a row that ends at `end`; WIDE: all or none.
template <bool WIDE>
METAL_FUNC uint run_count(uint column, uint end) {
  return column < end ? (WIDE ? RUN : end - column) : 0;
}

/// What a thread has of a row at a time: COUNT runs, STEP elements apart.
template <typename T, short COUNT, uint STEP>
struct Runs {
  RunOf<T> runs[COUNT];

  /// From a column on, which lies at `place`; zeros from `end` on.
  template <bool WIDE>
  METAL_FUNC void fetch(Matrix<T> matrix, device const T* place, uint column, uint end) thread {
    TFL_UNROLL
    for (short i = 0; i < COUNT; ++i) {
      runs[i] = matrix.fetch(place, run_count<WIDE>(column + i * STEP, end));
      place += matrix.across(STEP);
    }
  }
};

/// A place in a matrix that goes down by the same number of rows again and again.
template <typename T>
struct Walk {
  device const T* place;
  uint level_row, level_step;  // the row within its level, and by how much it grows
  long step, next_level;  // what a step adds, and what one into the next level adds to that

  METAL_FUNC void down(thread const Matrix<T>& matrix) thread {
    place += step;
    const uint left_of_level = matrix.inner - level_row;
    level_row += level_step;
    if (level_step >= left_of_level) {
      level_row -= matrix.inner;
      place += next_level;
    }
  }
};

template <typename T>
METAL_FUNC Walk<T> walk_from(thread const Matrix<T>& matrix, uint row, uint column, uint rows) {
  const uint rest = rows % matrix.inner;
  const ulong step = ulong(rows / matrix.inner) * matrix.outer_stride + ulong(rest) * matrix.row_stride;
  const long next_level = long(matrix.outer_stride) - long(ulong(matrix.inner) * matrix.row_stride);
  return {matrix.at(row, column), row % matrix.inner, rest, long(step), next_level};
}

METAL_FUNC Run filled(float value) { return {float4(value), float4(value)}; }

METAL_FUNC Run operator+(Run a, Run b) { return {a.low + b.low, a.high + b.high}; }

METAL_FUNC Run operator-(Run a, Run b) { return {a.low - b.low, a.high - b.high}; }

METAL_FUNC Run operator*(Run a, Run b) { return {a.low * b.low, a.high * b.high}; }

METAL_FUNC Run operator*(Run a, float b) { return {a.low * b, a.high * b}; }

METAL_FUNC float total(Run a) {
  const float4 sums = a.low + a.high;
  return (sums.x + sums.y) + (sums.z + sums.w);
}

}  // namespace tfl
