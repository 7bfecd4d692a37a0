// How the kernels reach device memory: strided operands, read and written in runs of eight elements, as float.
#pragma once

#include <metal_stdlib>

using namespace metal;

constant constexpr short RUN = 8;

/// An operand with any strides, counted in elements. Rows come in two levels, so that the flattened leading
/// dimensions of a permuted or sliced 3-D tensor need no copy: row i starts at
/// (i / inner) * outer_stride + (i % inner) * row_stride. Offsets are 64-bit: a tensor may pass 4 GiB.
template <typename T>
struct Matrix {
  device const T* data;
  uint rows, cols;
  uint inner, outer_stride, row_stride, col_stride;
  bool wide;  // every run that starts at a multiple of RUN is contiguous and aligned to four elements

  device const T* at(uint row, uint col) const thread {
    const ulong level = ulong(row / inner) * outer_stride + ulong(row % inner) * row_stride;
    return data + level + ulong(col) * col_stride;
  }
};

template <typename T>
Matrix<T> matrix(device const T* data, uint rows, uint cols, uint2 levels, uint2 strides, bool wide) {
  return {data, rows, cols, levels.x, levels.y, strides.x, strides.y, wide};
}

/// A matrix whose rows are one stride apart.
template <typename T>
Matrix<T> matrix(device const T* data, uint rows, uint cols, uint2 strides, bool wide) {
  return {data, rows, cols, max(rows, 1u), 0, strides.x, strides.y, wide};
}

/// Eight consecutive elements of a row or of a column, in registers.
struct Run {
  float4 low, high;

  float get(short i) const thread { return i < 4 ? low[i] : high[i - 4]; }

  void set(short i, float value) thread {
    if (i < 4) {
      low[i] = value;
    } else {
      high[i - 4] = value;
    }
  }
};

/// The `count` first elements of a run (all of them when count >= RUN), zero beyond.
template <typename T>
Run load_run(device const T* source, uint stride, uint count, bool wide) {
  Run run = {float4(0), float4(0)};
  if (wide && count >= uint(RUN)) {
    device const vec<T, 4>* quads = reinterpret_cast<device const vec<T, 4>*>(source);
    run.low = float4(quads[0]);
    run.high = float4(quads[1]);
  } else {
    for (short i = 0; i < RUN; ++i) {
      if (uint(i) < count) {
        run.set(i, float(source[ulong(i) * stride]));
      }
    }
  }
  return run;
}

/// The same down a column of `source`; where the rows come in two levels, element by element.
template <typename T>
Run load_column(Matrix<T> source, uint row, uint col, uint count) {
  if (source.inner >= source.rows) {
    return load_run(source.at(row, col), source.row_stride, count, source.wide);
  }
  Run run = {float4(0), float4(0)};
  for (short i = 0; i < RUN; ++i) {
    if (uint(i) < count) {
      run.set(i, float(*source.at(row + i, col)));
    }
  }
  return run;
}

/// Rounds the `count` first elements of a run to T, once, into a contiguous row.
template <typename T>
void store_run(device T* target, Run run, uint count, bool wide) {
  if (wide && count >= uint(RUN)) {
    device vec<T, 4>* quads = reinterpret_cast<device vec<T, 4>*>(target);
    quads[0] = vec<T, 4>(run.low);
    quads[1] = vec<T, 4>(run.high);
  } else {
    for (short i = 0; i < RUN; ++i) {
      if (uint(i) < count) {
        target[i] = static_cast<T>(run.get(i));
      }
    }
  }
}

/// Elements from `begin` up to `end`, none when it lies beyond.
inline uint left(uint begin, uint end) {
  return begin < end ? end - begin : 0;
}
