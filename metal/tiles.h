// Blocks of operands in threadgroup memory, as float, for 8x8 simdgroup matrices.
//
// Everything is converted to float on the way in: A and B may be wider than x, one tile format serves every mix, and
// public measurements say that Apple GPUs multiply float and half at one rate. Rows are padded by four floats,
// which keeps them 16-byte aligned and is meant to spread a column over the memory banks (not measured).
#pragma once

#include <metal_simdgroup_matrix>

#include "dropout.h"

namespace tfl {

constant constexpr short PADDING = 4;

/// A tile of ROWS x COLS floats inside the kernel's threadgroup array.
template <short ROWS, short COLS>
struct Tile {
  static constant constexpr short stride = COLS + PADDING;
  static constant constexpr short size = ROWS * stride;

  threadgroup float* data;

  METAL_FUNC threadgroup float* at(short row, short col) const thread { return data + row * stride + col; }

  METAL_FUNC void read(thread simdgroup_float8x8& block, short row, short col) const thread {
    simdgroup_load(block, at(row, col), stride);
  }

  METAL_FUNC void read_transposed(thread simdgroup_float8x8& block, short row, short col) const thread {
    simdgroup_load(block, at(row, col), stride, ulong2(0), true);
  }

  METAL_FUNC Run run(short row, short col) const thread {
    threadgroup const float4* const quads = reinterpret_cast<threadgroup const float4*>(at(row, col));
    return {quads[0], quads[1]};
  }

  METAL_FUNC void set_run(short row, short col, Run run) const thread {
    threadgroup float4* const quads = reinterpret_cast<threadgroup float4*>(at(row, col));
    quads[0] = run.low;
    quads[1] = run.high;
  }
};

/// Fills tiles with one block of `source` after the other, zero past the edges; DROPPED: through `dropout`.
/// THREADS threads move runs of eight elements along the dimension that has unit stride in memory, so that a simdgroup
/// reads whole lines. (A dropped operand with unit stride down its columns pays a Philox call an element.) A thread has
/// the same runs of every block; for each block it calls `fetch`, `store` and what leads to the next one, in this
/// order.
template <typename T, short ROWS, short COLS, short THREADS, bool DROPPED = false>
struct Loader {
  static constant constexpr short RUNS = ROWS * COLS / RUN, TURNS = (RUNS + THREADS - 1) / THREADS;
  static_assert(ROWS % RUN == 0 && COLS % RUN == 0, "a tile holds whole runs");

  Matrix<T> source;
  uint row, col;  // the block's corner
  short thread_index;
  Dropout dropout;
  bool along_rows;
  RunOf<T> fetched[TURNS];
  Cursor<T> places[TURNS];  // where the thread's runs start
  ulong elements[TURNS];  // and as which elements of the matrix, counted row by row: what the mask goes by

  METAL_FUNC Loader(Matrix<T> matrix, uint first_row, uint first_col, short index, Dropout mask = Dropout())
      : source(matrix), row(first_row), col(first_col), thread_index(index), dropout(mask),
        along_rows(matrix.col_stride == 1 || matrix.row_stride != 1) {
    TFL_UNROLL
    for (short turn = 0; turn < TURNS; ++turn) {
      const short2 inside = run_of(turn, index, along_rows);
      places[turn] = cursor_at(matrix, first_row + inside.x, first_col + inside.y);
      elements[turn] = ulong(first_row + inside.x) * matrix.cols + first_col + inside.y;
    }
  }

  /// The row and column of a run inside the tile.
  static METAL_FUNC short2 run_of(short turn, short thread_index, bool along_rows) {
    const short i = thread_index + turn * THREADS;
    return along_rows ? short2(i / (COLS / RUN), i % (COLS / RUN) * RUN)
                      : short2(i % (ROWS / RUN) * RUN, i / (ROWS / RUN));
  }

  /// Starts loading the block: what uses its elements comes later, so that other work hides the way from memory.
  METAL_FUNC void fetch() thread {
    TFL_UNROLL
    for (short turn = 0; turn < TURNS; ++turn) {
      if (RUNS % THREADS == 0 || thread_index + turn * THREADS < RUNS) {
        const short2 inside = run_of(turn, thread_index, along_rows);
        const uint r = row + inside.x, c = col + inside.y;
        fetched[turn] = along_rows ? source.fetch(places[turn].data, r < source.rows ? left(c, source.cols) : 0)
                                   : places[turn].fetch_column(source, c < source.cols ? left(r, source.rows) : 0);
      }
    }
  }

  /// What was fetched, into a tile.
  METAL_FUNC void store(Tile<ROWS, COLS> tile) const thread {
    TFL_UNROLL
    for (short turn = 0; turn < TURNS; ++turn) {
      if (RUNS % THREADS == 0 || thread_index + turn * THREADS < RUNS) {
        const short2 inside = run_of(turn, thread_index, along_rows);
        const short r = inside.x, c = inside.y;
        Run run = widened(fetched[turn]);
        if (along_rows) {
          if (DROPPED) {
            run = dropout.apply(run, elements[turn]);
          }
          tile.set_run(r, c, run);
        } else {
          threadgroup float* place = tile.at(r, c);
          TFL_UNROLL
          for (short j = 0; j < RUN; ++j) {
            const float value = run.get(j);
            *place = DROPPED ? dropout.apply(value, elements[turn] + ulong(j) * source.cols) : value;
            place += tile.stride;
          }
        }
      }
    }
  }

  /// On to the block at the right.
  METAL_FUNC void next_columns() thread {
    TFL_UNROLL
    for (short turn = 0; turn < TURNS; ++turn) {
      places[turn].data += source.across(COLS);
      elements[turn] += COLS;
    }
    col += COLS;
  }

  /// Back by so many columns.
  METAL_FUNC void back(uint columns) thread {
    TFL_UNROLL
    for (short turn = 0; turn < TURNS; ++turn) {
      places[turn].data -= source.across(columns);
      elements[turn] -= columns;
    }
    col -= columns;
  }

  /// On to the block below.
  METAL_FUNC void next_rows() thread {
    TFL_UNROLL
    for (short turn = 0; turn < TURNS; ++turn) {
      places[turn].down(source, ROWS);
      elements[turn] += ulong(ROWS) * source.cols;
    }
    row += ROWS;
  }
};

}  // namespace tfl
