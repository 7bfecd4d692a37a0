// lora_gemm: y = x W^T + b + s h B^T, with h = x A^T at hand: the base product with the rank inside, W packed or not.
//
// BACKWARD is its mirror over the same W: dx = dY W + mask * s z A, with z = dY B.
//
// Algorithm. A threadgroup owns ROWS x 64 of the result, and each of its four simdgroups a quarter, in float32
// simdgroup
//   matrices. First these sum up the low-rank term, over tiles of the ranks; then, once, they are scaled, dropped and
//   given the bias through threadgroup memory; then the base product is summed up on top, over tiles of K (of N
//   backward). A tile of W is decoded on its way from registers into threadgroup memory; W exists nowhere else. While
//   one tile is multiplied, the next is on its way from device memory, as raw elements and words.
// Tile. x: ROWS x 16, W: 64 x 16 (16 x 64 backward), as float: 10 KiB where ROWS is 64. ROWS is 32 where the rows are
//   few. A run of eight elements of x and of W a thread and tile, so one scale and bias as well.
// Threads. 128.
// Bytes. y is written once: the least possible. W is read once a tile of rows, x once a tile of 64 columns, h and B so,
//   too; two runs of a row at a time, which the GPU's cache has to make whole lines of.
// Rounding. Once: base, bias and low-rank term are summed in float32. (h was rounded to its type.)
#include "lora_gemm.h"
#include "weights.h"

namespace tfl {

/// sums += left right^T, or left right where BACKWARD; `row` and `col` are the simdgroup's corner.
template <bool BACKWARD, short ROW_BLOCKS, short COL_BLOCKS, typename LEFT, typename RIGHT>
METAL_FUNC void multiply_tiles(
    thread simdgroup_float8x8 (&sums)[ROW_BLOCKS][COL_BLOCKS], LEFT left, RIGHT right, short row, short col) {
  TFL_UNROLL
  for (short k = 0; k < GEMM_DEPTH; k += BLOCK) {
    simdgroup_float8x8 left_blocks[ROW_BLOCKS], right_block;
    TFL_UNROLL
    for (short i = 0; i < ROW_BLOCKS; ++i) {
      left.read(left_blocks[i], row + BLOCK * i, k);
    }
    TFL_UNROLL
    for (short j = 0; j < COL_BLOCKS; ++j) {
      if (BACKWARD) {
        right.read(right_block, k, col + BLOCK * j);
      } else {
        right.read_transposed(right_block, col + BLOCK * j, k);
      }
      TFL_UNROLL
      for (short i = 0; i < ROW_BLOCKS; ++i) {
        simdgroup_multiply_accumulate(sums[i][j], left_blocks[i], right_block, sums[i][j]);
      }
    }
  }
}

/// A row of a simdgroup's blocks, through threadgroup memory of its own: a run of it a lane.
template <short COL_BLOCKS>
struct Strip {
  using Blocks = Tile<BLOCK, BLOCK * COL_BLOCKS>;
  static_assert(COL_BLOCKS * BLOCK == LANES, "a run a lane");

  Blocks blocks;
  short row, col;  // of the lane's run

  METAL_FUNC Run put(thread simdgroup_float8x8 (&sums)[COL_BLOCKS]) const thread {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    TFL_UNROLL
    for (short j = 0; j < COL_BLOCKS; ++j) {
      simdgroup_store(sums[j], blocks.at(0, BLOCK * j), Blocks::stride);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    return blocks.run(row, col);
  }

  METAL_FUNC void take(thread simdgroup_float8x8 (&sums)[COL_BLOCKS], Run run) const thread {
    blocks.set_run(row, col, run);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    TFL_UNROLL
    for (short j = 0; j < COL_BLOCKS; ++j) {
      blocks.read(sums[j], 0, BLOCK * j);
    }
  }
};

template <typename T, typename TA, typename FORMAT, short ROWS, bool BACKWARD, bool DROPPED>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * GEMM_SIMDGROUPS)]]
void lora_gemm(
    device const T* x [[buffer(GEMM_X)]],
    device const typename FORMAT::Word* weight [[buffer(GEMM_WEIGHT)]],
    device const typename FORMAT::Scale* scales [[buffer(GEMM_SCALES)]],
    device const typename FORMAT::Scale* biases [[buffer(GEMM_BIASES)]],
    device const T* bias [[buffer(GEMM_BIAS)]],
    device const TA* h [[buffer(GEMM_H)]],  // z backward; contiguous
    device const TA* factor [[buffer(GEMM_FACTOR)]],  // B, N x r, or A, r x K, backward
    device T* y [[buffer(GEMM_Y)]],
    constant float& scaling [[buffer(GEMM_SCALING)]],
    constant uint2& seed [[buffer(GEMM_SEED)]],
    constant Pair& rows_terms [[buffer(GEMM_ROWS_TERMS)]],  // M, and the length of the base product's sums
    constant Pair& columns_ranks [[buffer(GEMM_COLUMNS_RANKS)]],  // columns of y, and r
    constant Pair& x_levels [[buffer(GEMM_X_LEVELS)]],
    constant Pair& x_strides [[buffer(GEMM_X_STRIDES)]],
    constant Pair& W_layout [[buffer(GEMM_W_LAYOUT)]],
    constant Pair& factor_strides [[buffer(GEMM_FACTOR_STRIDES)]],
    constant Pair& flags_bias_stride [[buffer(GEMM_FLAGS_BIAS_STRIDE)]],
    constant Pair& dropout_words [[buffer(GEMM_DROPOUT_WORDS)]],  // threshold, bits of 1 / (1 - p)
    uint2 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr short THREADS = LANES * GEMM_SIMDGROUPS, COLS = GEMM_COLUMNS, DEPTH = GEMM_DEPTH;
  constexpr short RIGHT_ROWS = BACKWARD ? DEPTH : COLS, RIGHT_COLS = BACKWARD ? COLS : DEPTH;
  constexpr short ROW_BLOCKS = ROWS / BLOCK / 2, COL_BLOCKS = COLS / BLOCK / 2;
  using LeftTile = Tile<ROWS, DEPTH>;
  using RightTile = Tile<RIGHT_ROWS, RIGHT_COLS>;
  threadgroup float4 memory[(LeftTile::size + RightTile::size) / 4];
  threadgroup float* const floats = reinterpret_cast<threadgroup float*>(memory);
  const LeftTile left_tile = {floats};
  const RightTile right_tile = {floats + LeftTile::size};
  static_assert(
      GEMM_SIMDGROUPS * Strip<COL_BLOCKS>::Blocks::size <= LeftTile::size + RightTile::size,
      "the strips fit the tiles");

  const uint M = rows_terms.x, terms = rows_terms.y, columns = columns_ranks.x, ranks = columns_ranks.y;
  const uint row = group.y * ROWS, column = group.x * COLS, flags = flags_bias_stride.x;
  const uint right_row = BACKWARD ? 0 : column, right_col = BACKWARD ? column : 0;
  const short simd_row = simdgroup_index / 2 * (ROWS / 2), simd_col = simdgroup_index % 2 * (COLS / 2);
  simdgroup_float8x8 sums[ROW_BLOCKS][COL_BLOCKS];
  TFL_UNROLL
  for (short i = 0; i < ROW_BLOCKS; ++i) {
    TFL_UNROLL
    for (short j = 0; j < COL_BLOCKS; ++j) {
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }

  // The low-rank term.
  const Matrix<TA> h_matrix = matrix_of(h, M, ranks, Pair(ranks, 1), (flags & GEMM_WIDE_H) != 0);
  const Matrix<TA> factor_matrix = matrix_of(
      factor, BACKWARD ? ranks : columns, BACKWARD ? columns : ranks, factor_strides, (flags & GEMM_WIDE_FACTOR) != 0);
  Loader<TA, ROWS, DEPTH, THREADS> h_loader(h_matrix, row, 0, thread_index);
  Loader<TA, RIGHT_ROWS, RIGHT_COLS, THREADS> factor_loader(factor_matrix, right_row, right_col, thread_index);
  for (uint rank = 0; rank < ranks; rank += DEPTH) {
    h_loader.fetch();
    factor_loader.fetch();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    h_loader.store(left_tile);
    factor_loader.store(right_tile);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply_tiles<BACKWARD, ROW_BLOCKS, COL_BLOCKS>(sums, left_tile, right_tile, simd_row, simd_col);
    h_loader.next_columns();
    if (BACKWARD) {
      factor_loader.next_rows();
    } else {
      factor_loader.next_columns();
    }
  }

  // The first tiles of the base product are on their way meanwhile.
  const Matrix<T> x_matrix = matrix_of(x, M, terms, x_levels, x_strides, (flags & GEMM_WIDE_X) != 0);
  Loader<T, ROWS, DEPTH, THREADS> x_loader(x_matrix, row, 0, thread_index);
  typename FORMAT::template BlockLoader<RIGHT_ROWS, RIGHT_COLS, THREADS> W_loader(
      FORMAT::of(
          weight, scales, biases, BACKWARD ? terms : columns, BACKWARD ? columns : terms, W_layout,
          (flags & GEMM_WIDE_W) != 0),
      right_row, right_col, thread_index);
  x_loader.fetch();
  W_loader.fetch();

  // What stands in the sums, scaled, dropped, and with the bias.
  const Strip<COL_BLOCKS> strip = {
      {floats + simdgroup_index * Strip<COL_BLOCKS>::Blocks::size},
      short(lane / (LANES / RUN)),
      short(lane % (LANES / RUN) * RUN)};
  const uint m = row + simd_row + strip.row, n = column + simd_col + strip.col, count = left(n, columns);
  Run added = {float4(0), float4(0)};
  if ((flags & GEMM_HAS_BIAS) != 0) {
    added = load_run(bias + ulong(n) * flags_bias_stride.y, flags_bias_stride.y, count, false);
  }
  const Dropout dropout = {seed, 0, dropout_words.x, as_type<float>(dropout_words.y)};
  ulong element = ulong(m) * columns + n;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TFL_UNROLL
  for (short i = 0; i < ROW_BLOCKS; ++i) {
    Run delta = strip.put(sums[i]);
    if (DROPPED) {
      delta = dropout.apply(delta, element);
      element += ulong(BLOCK) * columns;
    }
    delta.low = fma(delta.low, float4(scaling), added.low);
    delta.high = fma(delta.high, float4(scaling), added.high);
    strip.take(sums[i], delta);
  }

  // The base product.
  for (uint k = 0; k < terms; k += DEPTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x_loader.store(left_tile);
    W_loader.store(right_tile);
    x_loader.next_columns();
    if (BACKWARD) {
      W_loader.next_rows();
    } else {
      W_loader.next_columns();
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (k + DEPTH < terms) {
      x_loader.fetch();
      W_loader.fetch();
    }
    multiply_tiles<BACKWARD, ROW_BLOCKS, COL_BLOCKS>(sums, left_tile, right_tile, simd_row, simd_col);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  device T* target = y + ulong(m) * columns + n;
  TFL_UNROLL
  for (short i = 0; i < ROW_BLOCKS; ++i) {
    const Run run = strip.put(sums[i]);
    if (m + BLOCK * i < M) {
      store_run(target, run, count, (flags & GEMM_WIDE_Y) != 0);
    }
    target += ulong(BLOCK) * columns;
  }
}

}  // namespace tfl
