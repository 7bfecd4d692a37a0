// How the kernels reach device memory: strided operands, read and written in runs of eight elements, as float.
//
// Inside a loop an address is stepped, never computed again: public measurements quote about 13 cycles for a 64-bit
// multiplication on Apple GPUs.
#pragma once

#include <metal_stdlib>

#include "sizes.h"

/// In front of a loop of constant length: unrolled whole, whatever a compiler thinks it is worth. A loop that indexes a
/// private array or the components of a vector needs it, and so does every loop around it that takes part in the index:
/// what is indexed by a variable leaves the registers.
#define TFL_UNROLL _Pragma("clang loop unroll(full)")

namespace tfl {

using namespace metal;

/// Elements from `begin` up to `end`, none when it lies beyond.
METAL_FUNC uint left(uint begin, uint end) { return begin < end ? end - begin : 0; }

/// Eight consecutive elements of a row or of a column, in registers.
template <typename T>
struct RunOf {
  vec<T, 4> low, high;

  METAL_FUNC T get(short i) const thread { return i < 4 ? low[i] : high[i - 4]; }

  METAL_FUNC void set(short i, T value) thread {
    if (i < 4) {
      low[i] = value;
    } else {
      high[i - 4] = value;
    }
  }
};

using Run = RunOf<float>;

template <typename T>
METAL_FUNC Run widened(RunOf<T> run) {
  return {float4(run.low), float4(run.high)};
}

/// Eight contiguous elements by loads of 16 bytes, to which `source` is aligned. They stay as they are in memory:
/// converting them would wait for the load.
template <typename T>
METAL_FUNC RunOf<T> fetch_eight(device const T* source) {
  const uint4 raw = *reinterpret_cast<device const uint4*>(source);
  return {as_type<vec<T, 4>>(raw.xy), as_type<vec<T, 4>>(raw.zw)};
}

METAL_FUNC Run fetch_eight(device const float* source) {
  device const float4* const quads = reinterpret_cast<device const float4*>(source);
  return {quads[0], quads[1]};
}

/// The same the other way: each element is rounded to T, once.
template <typename T>
METAL_FUNC void store_eight(device T* target, Run run) {
  const uint2 low = as_type<uint2>(vec<T, 4>(run.low)), high = as_type<uint2>(vec<T, 4>(run.high));
  *reinterpret_cast<device uint4*>(target) = uint4(low, high);
}

METAL_FUNC void store_eight(device float* target, Run run) {
  device float4* const quads = reinterpret_cast<device float4*>(target);
  quads[0] = run.low;
  quads[1] = run.high;
}

/// The `count` first elements of a run (all of them when count >= RUN), zero beyond. `wide`: contiguous and aligned to
/// 16 bytes. WHOLE: it is, and has all elements or none; what else there may be takes no registers.
template <typename T, bool WHOLE = false>
METAL_FUNC RunOf<T> fetch_run(device const T* source, uint stride, uint count, bool wide) {
  RunOf<T> run = {vec<T, 4>(static_cast<T>(0.0f)), vec<T, 4>(static_cast<T>(0.0f))};
  if (WHOLE) {
    if (count > 0) {
      run = fetch_eight(source);
    }
    return run;
  }
  if (wide && count >= uint(RUN)) {
    return fetch_eight(source);
  }
  TFL_UNROLL
  for (short i = 0; i < RUN; ++i) {
    if (uint(i) < count) {
      run.set(i, *source);
    }
    source += stride;  // not eight offsets, which would stay in registers from one call to the next
  }
  return run;
}

template <typename T>
METAL_FUNC Run load_run(device const T* source, uint stride, uint count, bool wide) {
  return widened(fetch_run(source, stride, count, wide));
}

/// Rounds the `count` first elements of a run to T, once, into a contiguous row. WHOLE: all, `wide`.
template <bool WHOLE = false, typename T>
METAL_FUNC void store_run(device T* target, Run run, uint count, bool wide) {
  if (WHOLE || (wide && count >= uint(RUN))) {
    store_eight(target, run);
    return;
  }
  TFL_UNROLL
  for (short i = 0; i < RUN; ++i) {
    if (uint(i) < count) {
      target[i] = static_cast<T>(run.get(i));
    }
  }
}

/// An operand with any strides, counted in elements. Rows come in two levels, so that the flattened leading
/// dimensions of a permuted or sliced 3-D tensor need no copy: row i starts at
/// (i / inner) * outer_stride + (i % inner) * row_stride. Offsets are 64-bit: a tensor may pass 4 GiB.
template <typename T>
struct Matrix {
  device const T* data;
  uint rows, cols;
  uint inner, outer_stride, row_stride, col_stride;
  bool wide;  // every run that starts at a multiple of RUN is contiguous and aligned to 16 bytes

  METAL_FUNC device const T* at(uint row, uint col) const thread {
    ulong level = ulong(row) * row_stride;
    if (row >= inner) {  // a branch: dividing is slow
      level = ulong(row / inner) * outer_stride + ulong(row % inner) * row_stride;
    }
    return data + level + ulong(col) * col_stride;
  }

  /// The run of a row that starts at `place` and of which `count` elements exist.
  METAL_FUNC RunOf<T> fetch(device const T* place, uint count) const thread {
    return fetch_run(place, col_stride, count, wide);
  }

  METAL_FUNC Run load(device const T* place, uint count) const thread { return widened(fetch(place, count)); }

  /// From a column to the one `columns` further on.
  METAL_FUNC ulong across(uint columns) const thread { return ulong(columns) * col_stride; }
};

template <typename T>
METAL_FUNC Matrix<T> matrix_of(device const T* data, uint rows, uint cols, Pair levels, Pair strides, bool wide) {
  return {data, rows, cols, levels.x, levels.y, strides.x, strides.y, wide};
}

/// A matrix whose rows are one stride apart.
template <typename T>
METAL_FUNC Matrix<T> matrix_of(device const T* data, uint rows, uint cols, Pair strides, bool wide) {
  return {data, rows, cols, max(rows, 1u), 0, strides.x, strides.y, wide};
}

/// A place in a matrix that walks down its rows.
template <typename T>
struct Cursor {
  device const T* data;
  uint level_row;  // the row within its level
  long next_level;  // what the step into the next level adds

  METAL_FUNC void down(thread const Matrix<T>& matrix, uint rows) thread {
    data += ulong(rows) * matrix.row_stride;
    level_row += rows;
    while (level_row >= matrix.inner) {
      level_row -= matrix.inner;
      data += next_level;
    }
  }

  /// The `count` first elements of the run down the column from here.
  METAL_FUNC RunOf<T> fetch_column(thread const Matrix<T>& matrix, uint count) const thread {
    if (matrix.inner >= matrix.rows) {
      return fetch_run(data, matrix.row_stride, count, matrix.wide);
    }
    RunOf<T> run = {vec<T, 4>(static_cast<T>(0.0f)), vec<T, 4>(static_cast<T>(0.0f))};
    Cursor<T> place = {data, level_row, next_level};
    TFL_UNROLL
    for (short i = 0; i < RUN; ++i) {
      if (uint(i) < count) {
        run.set(i, *place.data);
        place.down(matrix, 1);
      }
    }
    return run;
  }
};

template <typename T>
METAL_FUNC Cursor<T> cursor_at(thread const Matrix<T>& matrix, uint row, uint col) {
  const long next_level = long(matrix.outer_stride) - long(ulong(matrix.inner) * matrix.row_stride);
  return {matrix.at(row, col), row % matrix.inner, next_level};
}

/// The sum of what stands `stride` apart, in order. Eight loads are in flight at once.
template <typename V>
METAL_FUNC V sum_of_splits(device const V* source, ulong stride, uint splits) {
  constexpr uint TOGETHER = 8;
  V sum = V(0);
  for (uint first = 0; first < splits; first += TOGETHER) {
    V parts[TOGETHER];
    TFL_UNROLL
    for (uint i = 0; i < TOGETHER; ++i) {
      parts[i] = first + i < splits ? source[i * stride] : V(0);
    }
    TFL_UNROLL
    for (uint i = 0; i < TOGETHER; ++i) {
      sum += parts[i];
    }
    source += TOGETHER * stride;
  }
  return sum;
}

}  // namespace tfl
