// Blocks of operands in threadgroup memory, as float, for 8x8 simdgroup matrices.
//
// Everything is converted to float on the way in: A and B may be wider than x, one tile format serves every mix, and
// public measurements say that Apple GPUs multiply float and half at one rate. Rows are padded by four floats,
// which keeps them 16-byte aligned and is meant to spread a column over the memory banks (not measured).
#pragma once

#include <metal_simdgroup_matrix>

#include "dropout.h"

constant constexpr short PADDING = 4;

/// A tile of ROWS x COLS floats inside the kernel's threadgroup array.
template <short ROWS, short COLS>
struct Tile {
  static constant constexpr short stride = COLS + PADDING;
  static constant constexpr short size = ROWS * stride;

  threadgroup float* data;

  threadgroup float* at(short row, short col) const thread { return data + row * stride + col; }

  simdgroup_float8x8 block(short row, short col) const thread {
    simdgroup_float8x8 found;
    simdgroup_load(found, at(row, col), stride);
    return found;
  }

  simdgroup_float8x8 transposed_block(short row, short col) const thread {
    simdgroup_float8x8 found;
    simdgroup_load(found, at(row, col), stride, ulong2(0), true);
    return found;
  }

  Run run(short row, short col) const thread {
    threadgroup const float4* quads = reinterpret_cast<threadgroup const float4*>(at(row, col));
    return {quads[0], quads[1]};
  }

  /// Fills the tile from `source`, its corner at (row, col), zero past the edges; DROPPED: through `dropout`.
  /// THREADS threads move runs of eight elements along the dimension that has unit stride in memory, so that a
  /// simdgroup reads whole lines. (A dropped operand with unit stride down its columns pays a Philox call an element.)
  template <short THREADS, bool DROPPED = false, typename T>
  void load(Matrix<T> source, uint row, uint col, short thread_index, Dropout dropout = Dropout()) const thread {
    static_assert(ROWS % RUN == 0 && COLS % RUN == 0, "a tile holds whole runs");
    constexpr short RUNS = ROWS * COLS / RUN;
    if (source.col_stride == 1 || source.row_stride != 1) {
      for (short i = thread_index; i < RUNS; i += THREADS) {
        const short r = i / (COLS / RUN), c = i % (COLS / RUN) * RUN;
        const uint count = row + r < source.rows ? left(col + c, source.cols) : 0;
        Run found = load_run(source.at(row + r, col + c), source.col_stride, count, source.wide);
        if (DROPPED) {
          found = dropout.apply(found, ulong(row + r) * source.cols + col + c);
        }
        threadgroup float4* quads = reinterpret_cast<threadgroup float4*>(at(r, c));
        quads[0] = found.low;
        quads[1] = found.high;
      }
    } else {
      for (short i = thread_index; i < RUNS; i += THREADS) {
        const short c = i / (ROWS / RUN), r = i % (ROWS / RUN) * RUN;
        const uint count = col + c < source.cols ? left(row + r, source.rows) : 0;
        const Run found = load_column(source, row + r, col + c, count);
        for (short j = 0; j < RUN; ++j) {
          const float value = found.get(j);
          const ulong element = ulong(row + r + j) * source.cols + col + c;
          *at(r + j, c) = DROPPED ? dropout.apply(value, element) : value;
        }
      }
    }
  }
};
