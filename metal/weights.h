// How a weight lies in device memory: as elements, or packed in MLX's affine format. A format is a type, the functor
// that a kernel is instantiated with: what its buffers hold, and how a block of the weight gets into a tile.
#pragma once

#include "tiles.h"

namespace tfl {

/// Elements, with any strides: `layout`.
template <typename T>
struct Plain {
  using Element = T;
  using Word = T;
  using Scale = T;  // of which there are none
  static constant constexpr bool PACKED = false;

  template <short ROWS, short COLS, short THREADS>
  using BlockLoader = Loader<T, ROWS, COLS, THREADS>;

  static METAL_FUNC Matrix<T> of(
      device const T* weight, device const T*, device const T*, uint rows, uint cols, Pair layout, bool wide) {
    return matrix_of(weight, rows, cols, layout, wide);
  }
};

/// Neighbouring runs of packed elements of one group: w = scale q + bias, q unsigned, of BITS bits, the first in a
/// word's lowest.
template <short BITS, typename S, short RUNS = 1>
struct PackedRuns {
  static constant constexpr short WORDS = RUNS * BITS * RUN / 32;

  uint words[WORDS];
  S scale, bias;

  METAL_FUNC Run decode(short index) const thread {
    Run run;
    TFL_UNROLL
    for (short i = 0; i < RUN; ++i) {
      const short bit = (index * RUN + i) * BITS;
      const uint q = words[bit / 32] >> (bit % 32) & ((1u << BITS) - 1);
      run.set(i, fma(float(q), float(scale), float(bias)));
    }
    return run;
  }
};

template <short BITS, typename S, short ROWS, short COLS, short THREADS>
struct PackedLoader;

/// Scale and bias are those of a group of neighbouring elements of a row, 2^shift of them, 32 at least, of which a row
/// has a whole number: a run, or two or four from a multiple of their length on, are whole, and of one group.
template <short BITS, typename S>
struct Affine {
  using Element = Affine;
  using Word = uint;
  using Scale = S;
  static constant constexpr bool PACKED = true;

  device const uint* words;
  device const S* scales;
  device const S* biases;
  uint rows, cols, row_words, shift;

  template <short ROWS, short COLS, short THREADS>
  using BlockLoader = PackedLoader<BITS, S, ROWS, COLS, THREADS>;

  static METAL_FUNC Affine
  of(device const uint* weight,
     device const S* scales,
     device const S* biases,
     uint rows,
     uint cols,
     Pair layout,
     bool) {
    return {weight, scales, biases, rows, cols, layout.x, layout.y};
  }

  METAL_FUNC Affine from_row(uint row) const thread {
    const ulong groups = ulong(row) * (cols >> shift);
    return {words + ulong(row) * row_words, scales + groups, biases + groups, left(row, rows), cols, row_words, shift};
  }

  /// The runs of the first row that start at this column.
  template <short RUNS>
  METAL_FUNC PackedRuns<BITS, S, RUNS> fetch(uint col) const thread {
    PackedRuns<BITS, S, RUNS> runs = {{}, scales[col >> shift], biases[col >> shift]};
    TFL_UNROLL
    for (short i = 0; i < runs.WORDS; ++i) {
      runs.words[i] = words[col / RUN * (runs.WORDS / RUNS) + i];
    }
    return runs;
  }
};

/// A Loader of packed elements, a run a thread, decoded on the way into the tile.
template <short BITS, typename S, short ROWS, short COLS, short THREADS>
struct PackedLoader {
  static_assert(ROWS * COLS == THREADS * RUN, "a run a thread");

  short row;  // of the thread's run, in the tile
  uint first_col, col;
  Affine<BITS, S> place;  // from the run's row on
  PackedRuns<BITS, S> fetched;

  METAL_FUNC PackedLoader(Affine<BITS, S> weight, uint first_row, uint first, short thread_index)
      : row(thread_index / (COLS / RUN)), first_col(first), col(first + thread_index % (COLS / RUN) * RUN),
        place(weight.from_row(first_row + row)) {}

  METAL_FUNC void fetch() thread {
    fetched = {};
    if (place.rows > 0 && col < place.cols) {
      fetched = place.template fetch<1>(col);
    }
  }

  METAL_FUNC void store(Tile<ROWS, COLS> tile) const thread { tile.set_run(row, col - first_col, fetched.decode(0)); }

  METAL_FUNC void next_columns() thread {
    col += COLS;
    first_col += COLS;
  }

  METAL_FUNC void next_rows() thread { place = place.from_row(ROWS); }
};

}  // namespace tfl
