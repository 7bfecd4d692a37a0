// How a weight lies in device memory: as elements, or packed in MLX's affine format. A format is a type, the functor
// that a kernel is instantiated with: what its buffers hold, and how a block of the weight gets into a tile.
#pragma once

#include "tiles.h"

namespace tfl {

/// Elements, with any strides: `layout`.
template <typename T>
struct Plain {
  using Word = T;
  using Scale = T;  // of which there are none
  using Element = T;

  template <short ROWS, short COLS, short THREADS>
  using BlockLoader = Loader<T, ROWS, COLS, THREADS>;

  static METAL_FUNC Matrix<T> of(
      device const T* weight, device const T*, device const T*, uint rows, uint cols, Pair layout, bool wide) {
    return matrix_of(weight, rows, cols, layout, wide);
  }
};

template <short BITS, typename S, short ROWS, short COLS, short THREADS>
struct PackedLoader;

/// w = scale q + bias: q unsigned, of BITS bits, the first in a word's lowest; scale and bias are those of a group of
/// neighbouring elements of a row, 2^layout.y of them. A row has layout.x words, and a multiple of 32 elements, as a
/// group has: so a run is whole, and of one group.
template <short BITS, typename S>
struct Affine {
  using Word = uint;
  using Scale = S;
  using Element = Affine;

  static constant constexpr short WORDS = BITS * RUN / 32;  // of a run

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
    return {words + ulong(row) * row_words, scales + groups, biases + groups, rows - row, cols, row_words, shift};
  }

  /// The run that starts with this word, of this group.
  METAL_FUNC Run load(uint word, uint group) const thread {
    uint run[WORDS];
    TFL_UNROLL
    for (short i = 0; i < WORDS; ++i) {
      run[i] = words[word + i];
    }
    return decode(run, float(scales[group]), float(biases[group]));
  }

  static METAL_FUNC Run decode(thread const uint (&words)[WORDS], float scale, float bias) {
    Run run;
    TFL_UNROLL
    for (short i = 0; i < RUN; ++i) {
      const uint q = words[i * BITS / 32] >> (i * BITS % 32) & ((1u << BITS) - 1);
      run.set(i, fma(float(q), scale, bias));
    }
    return run;
  }
};

/// A Loader of packed elements, a run a thread: decoded on the way into the tile.
template <short BITS, typename S, short ROWS, short COLS, short THREADS>
struct PackedLoader {
  static constant constexpr short WORDS = Affine<BITS, S>::WORDS;
  static_assert(ROWS * COLS == THREADS * RUN, "a run a thread");

  Affine<BITS, S> source;
  uint row, col;  // of the thread's run
  short tile_row, tile_col;
  device const uint* place;
  device const S* scales;  // of the run's row
  device const S* biases;
  uint fetched[WORDS];
  S scale, bias;

  METAL_FUNC PackedLoader(Affine<BITS, S> weight, uint first_row, uint first_col, short thread_index) : source(weight) {
    tile_row = thread_index / (COLS / RUN);
    tile_col = thread_index % (COLS / RUN) * RUN;
    row = first_row + tile_row;
    col = first_col + tile_col;
    place = weight.words + ulong(row) * weight.row_words + col / RUN * WORDS;
    const ulong groups = ulong(row) * (weight.cols >> weight.shift);
    scales = weight.scales + groups;
    biases = weight.biases + groups;
  }

  METAL_FUNC void fetch() thread {
    const bool inside = row < source.rows && col < source.cols;
    const uint group = col >> source.shift;
    TFL_UNROLL
    for (short i = 0; i < WORDS; ++i) {
      fetched[i] = inside ? place[i] : 0;
    }
    scale = inside ? scales[group] : static_cast<S>(0.0f);
    bias = inside ? biases[group] : static_cast<S>(0.0f);
  }

  METAL_FUNC void store(Tile<ROWS, COLS> tile) const thread {
    tile.set_run(tile_row, tile_col, Affine<BITS, S>::decode(fetched, float(scale), float(bias)));
  }

  METAL_FUNC void next_columns() thread {
    place += COLS / RUN * WORDS;
    col += COLS;
  }

  METAL_FUNC void next_rows() thread {
    const uint groups = ROWS * (source.cols >> source.shift);
    place += ROWS * source.row_words;
    scales += groups;
    biases += groups;
    row += ROWS;
  }
};

}  // namespace tfl
