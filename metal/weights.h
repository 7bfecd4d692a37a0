// How a weight lies in device memory: as elements, or packed, as codes of a few bits. A format is a type, the functor
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
  static constant constexpr short ENTRIES = 1;  // of a table, of which there is none

  template <short ROWS, short COLS, short THREADS>
  using BlockLoader = Loader<T, ROWS, COLS, THREADS>;

  static METAL_FUNC void load_table(threadgroup T*, device const T*, ushort) {}

  static METAL_FUNC Matrix<T> of(
      device const T* weight,
      device const T*,
      device const T*,
      threadgroup const T*,
      uint rows,
      uint cols,
      Pair layout,
      bool wide) {
    return matrix_of(weight, rows, cols, layout, wide);
  }
};

/// Codes of MLX's affine format, unsigned, the first of a word in its lowest bits: w = scale code + bias, with a bias
/// for each scale.
template <short CODE_BITS, typename S>
struct Affine {
  using Scale = S;
  static constant constexpr short BITS = CODE_BITS, ENTRIES = 1;

  device const S* biases;

  static METAL_FUNC Affine of(device const S* biases, threadgroup const S*) { return {biases}; }

  static METAL_FUNC void load_table(threadgroup S*, device const S*, ushort) {}

  METAL_FUNC Affine from_group(ulong group) const thread { return {biases + group}; }

  METAL_FUNC S bias(uint group) const thread { return biases[group]; }

  METAL_FUNC float value(uint code) const thread { return float(code); }

  /// Where a word has its i-th code, counted from its lowest bits.
  static METAL_FUNC short place(short i) { return i; }
};

/// Codes of bitsandbytes' 4-bit formats, the first of a byte in its high bits: w = scale table[code]. The table, in the
/// biases' place, is copied into threadgroup memory: its entries are in as many banks, so that none wait for another.
struct Table {
  using Scale = float;
  static constant constexpr short BITS = 4, ENTRIES = 1 << BITS;

  threadgroup const float* table;

  static METAL_FUNC Table of(device const float*, threadgroup const float* table) { return {table}; }

  static METAL_FUNC void load_table(threadgroup float* table, device const float* source, ushort thread_index) {
    if (thread_index < ENTRIES) {
      table[thread_index] = source[thread_index];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  METAL_FUNC Table from_group(ulong) const thread { return *this; }

  METAL_FUNC float bias(uint) const thread { return 0.0f; }

  METAL_FUNC float value(uint code) const thread { return table[code]; }

  static METAL_FUNC short place(short i) { return i ^ 1; }
};

/// Neighbouring runs of packed elements of one group.
template <typename CODES, short RUNS = 1>
struct PackedRuns {
  static constant constexpr short BITS = CODES::BITS, WORDS = RUNS * BITS * RUN / 32;

  uint words[WORDS];
  typename CODES::Scale scale, bias;

  METAL_FUNC Run decode(thread const CODES& codes, short index) const thread {
    Run run;
    TFL_UNROLL
    for (short i = 0; i < RUN; ++i) {
      const short bit = (index * RUN + CODES::place(i)) * BITS;
      const uint code = words[bit / 32] >> (bit % 32) & ((1u << BITS) - 1);
      run.set(i, fma(codes.value(code), float(scale), float(bias)));
    }
    return run;
  }
};

template <typename CODES, short ROWS, short COLS, short THREADS>
struct PackedLoader;

/// Words of codes. Scale and bias are those of a group of neighbouring elements of a row, 2^shift of them, 32 at least,
/// of which a row has a whole number: a run, or two or four from a multiple of their length on, are whole, and of one
/// group.
template <typename CODES>
struct Packed {
  using Element = Packed;
  using Word = uint;
  using Scale = typename CODES::Scale;
  static constant constexpr bool PACKED = true;
  static constant constexpr short ENTRIES = CODES::ENTRIES;

  device const uint* words;
  device const Scale* scales;
  CODES codes;
  uint rows, cols, row_words, shift;

  template <short ROWS, short COLS, short THREADS>
  using BlockLoader = PackedLoader<CODES, ROWS, COLS, THREADS>;

  static METAL_FUNC void load_table(threadgroup Scale* table, device const Scale* source, ushort thread_index) {
    CODES::load_table(table, source, thread_index);
  }

  static METAL_FUNC Packed
  of(device const uint* weight,
     device const Scale* scales,
     device const Scale* biases,
     threadgroup const Scale* table,
     uint rows,
     uint cols,
     Pair layout,
     bool) {
    return {weight, scales, CODES::of(biases, table), rows, cols, layout.x, layout.y};
  }

  METAL_FUNC Packed from_row(uint row) const thread {
    const ulong groups = ulong(row) * (cols >> shift);
    return {words + ulong(row) * row_words,
            scales + groups,
            codes.from_group(groups),
            left(row, rows),
            cols,
            row_words,
            shift};
  }

  /// The runs of the first row that start at this column.
  template <short RUNS>
  METAL_FUNC PackedRuns<CODES, RUNS> fetch(uint col) const thread {
    PackedRuns<CODES, RUNS> runs = {{}, scales[col >> shift], codes.bias(col >> shift)};
    TFL_UNROLL
    for (short i = 0; i < runs.WORDS; ++i) {
      runs.words[i] = words[col / RUN * (runs.WORDS / RUNS) + i];
    }
    return runs;
  }
};

/// A Loader of packed elements, a run a thread, decoded on the way into the tile.
template <typename CODES, short ROWS, short COLS, short THREADS>
struct PackedLoader {
  static_assert(ROWS * COLS == THREADS * RUN, "a run a thread");

  short row;  // of the thread's run, in the tile
  uint first_col, col;
  Packed<CODES> place;  // from the run's row on
  PackedRuns<CODES> fetched;

  METAL_FUNC PackedLoader(Packed<CODES> weight, uint first_row, uint first, short thread_index)
      : row(thread_index / (COLS / RUN)), first_col(first), col(first + thread_index % (COLS / RUN) * RUN),
        place(weight.from_row(first_row + row)) {}

  METAL_FUNC void fetch() thread {
    fetched = {};
    if (place.rows > 0 && col < place.cols) {
      fetched = place.template fetch<1>(col);
    }
  }

  METAL_FUNC void store(Tile<ROWS, COLS> tile) const thread {
    tile.set_run(row, col - first_col, fetched.decode(place.codes, 0));
  }

  METAL_FUNC void next_columns() thread {
    col += COLS;
    first_col += COLS;
  }

  METAL_FUNC void next_rows() thread { place = place.from_row(ROWS); }
};

}  // namespace tfl
