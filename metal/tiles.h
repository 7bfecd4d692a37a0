// Blocks of operands in threadgroup memory, for 8x8 simdgroup matrices.
//
// A tile may keep half elements as they are: half the bytes, and a product of two is exact in float. All others are
// float: GPUs before M3 emulate bfloat (public sources say), and a dropped element is rounded once, at the end. Rows
// are padded by 16 bytes, which keeps them aligned and is meant to spread a column over the memory banks (not
// measured).
#pragma once

#include <metal_simdgroup_matrix>

#include "dropout.h"

namespace tfl {

/// What a tile holds of an operand's elements.
template <typename T, bool DROPPED = false>
struct Kept {
  using Element = float;
};
template <>
struct Kept<half, false> {
  using Element = half;
};

/// A tile of ROWS x COLS elements inside the kernel's threadgroup array, of which it takes `size` floats.
template <short ROWS, short COLS, typename E = float>
struct Tile {
  static constant constexpr short stride = COLS + 16 / sizeof(E);
  static constant constexpr short size = ROWS * stride * sizeof(E) / sizeof(float);
  using Block = simdgroup_matrix<E, BLOCK, BLOCK>;

  threadgroup E* data;

  static METAL_FUNC Tile in(threadgroup float* memory) { return {reinterpret_cast<threadgroup E*>(memory)}; }

  METAL_FUNC threadgroup E* at(short row, short col) const thread { return data + row * stride + col; }

  METAL_FUNC void read(thread Block& block, short row, short col) const thread {
    simdgroup_load(block, at(row, col), stride);
  }

  METAL_FUNC void read_transposed(thread Block& block, short row, short col) const thread {
    simdgroup_load(block, at(row, col), stride, ulong2(0), true);
  }

  METAL_FUNC Run run(short row, short col) const thread {
    threadgroup const float4* const quads = reinterpret_cast<threadgroup const float4*>(at(row, col));
    return {quads[0], quads[1]};
  }

  METAL_FUNC void set_run(short row, short col, Run run) const thread {
    threadgroup vec<E, 4>* const quads = reinterpret_cast<threadgroup vec<E, 4>*>(at(row, col));
    quads[0] = vec<E, 4>(run.low);
    quads[1] = vec<E, 4>(run.high);
  }
};

/// Fills tiles with one block of `source` after the other, zero past the edges; DROPPED: through `dropout`.
/// THREADS threads move runs of eight elements along the dimension that has unit stride in memory, so that a simdgroup
/// reads whole lines. (A dropped operand with unit stride down its columns pays a Philox call an element.) A thread has
/// the same runs of every block; for each block it calls `fetch`, `store` and what leads to the next one, in this
/// order. LAYOUT: how `source` lies; where that is known, no other way takes registers.
template <typename T, short ROWS, short COLS, short THREADS, bool DROPPED = false, Layout LAYOUT = Layout::any>
struct Loader {
  static constant constexpr short RUNS = ROWS * COLS / RUN, TURNS = (RUNS + THREADS - 1) / THREADS;
  static constant constexpr bool WHOLE = LAYOUT != Layout::any;
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
        along_rows(WHOLE ? LAYOUT == Layout::rows : matrix.col_stride == 1 || matrix.row_stride != 1) {
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
        const uint count =
            along_rows ? (r < source.rows ? left(c, source.cols) : 0) : (c < source.cols ? left(r, source.rows) : 0);
        fetched[turn] = WHOLE || along_rows
            ? fetch_run<T, WHOLE>(places[turn].data, source.col_stride, count, source.wide)
            : places[turn].fetch_column(source, count);
      }
    }
  }

  /// What was fetched, into a tile.
  template <typename E>
  METAL_FUNC void store(Tile<ROWS, COLS, E> tile) const thread {
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
          threadgroup E* place = tile.at(r, c);
          TFL_UNROLL
          for (short j = 0; j < RUN; ++j) {
            const float value = run.get(j);
            *place = static_cast<E>(DROPPED ? dropout.apply(value, elements[turn] + ulong(j) * source.cols) : value);
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
      if (WHOLE) {
        places[turn].data += ulong(ROWS) * source.row_stride;
      } else {
        places[turn].down(source, ROWS);
      }
      elements[turn] += ulong(ROWS) * source.cols;
    }
    row += ROWS;
  }
};

}  // namespace tfl
