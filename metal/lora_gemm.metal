// lora_gemm: y = x W^T + b + s h B^T, with h = x A^T at hand: the base product with the rank inside, W packed or not.
//
// BACKWARD is its mirror over the same W: dx = dY W + mask * s z A, with z = dY B.
//
// Algorithm. A threadgroup owns ROWS x 64 of the result, and each of its four simdgroups a quarter, in float32
//   simdgroup matrices. First these sum up the low-rank term, over tiles of the ranks; then, once, they are scaled,
//   dropped and given the bias through threadgroup memory; then the base product is summed up on top, over tiles of K
//   (of N backward). A tile of W is decoded on its way from registers into threadgroup memory; W exists nowhere else.
//   While one tile is multiplied, the next is on its way from device memory, as raw elements and words.
//   Where that leaves cores idle, threadgroups share the terms of the base product, and the first of them has the
//   low-rank term and the bias: each writes float32 sums (Y), which sum_splits adds up in order.
// Tile. x: ROWS x 16, W: 64 x 16 (16 x 64 backward), as float: 10 KiB where ROWS is 64. ROWS is 32 where the rows are
//   few. A run of eight elements of x and of W a thread and tile, so one scale and bias as well.
// Threads. 128.
// Bytes. y is written once: the least possible. W is read once a tile of rows, x once a tile of 64 columns, h and B so,
//   too; two runs of a row at a time, which the GPU's cache has to make whole lines of. Split sums besides: at most a
//   tile of them for each threadgroup that the GPU has room for, written and read once.
// Rounding. Once: base, bias and low-rank term are summed in float32. (h was rounded to its type.)
#include "lora_gemm.h"
#include "weights.h"

namespace tfl {

/// A simdgroup's quarter of a threadgroup's ROWS x GEMM_COLUMNS, and the tiles that it is summed up from.
template <short ROWS, bool BACKWARD>
struct Quarter {
  static constant constexpr short RIGHT_ROWS = BACKWARD ? GEMM_DEPTH : GEMM_COLUMNS;
  static constant constexpr short RIGHT_COLS = BACKWARD ? GEMM_COLUMNS : GEMM_DEPTH;
  static constant constexpr short ROW_BLOCKS = ROWS / BLOCK / 2, COL_BLOCKS = GEMM_COLUMNS / BLOCK / 2;
  using Left = Tile<ROWS, GEMM_DEPTH>;
  using Right = Tile<RIGHT_ROWS, RIGHT_COLS>;
  using Strip = Tile<BLOCK, BLOCK * COL_BLOCKS>;  // a row of the quarter's blocks
  static constant constexpr short SIZE = Left::size + Right::size;
  static_assert(
      COL_BLOCKS * BLOCK == LANES && GEMM_SIMDGROUPS * Strip::size <= SIZE, "a strip a simdgroup, a run a lane");

  Left left;
  Right right;
  Strip strip;
  short row, col, strip_row, strip_col;  // of the quarter in the threadgroup's, and of the lane's run of a strip
  simdgroup_float8x8 sums[ROW_BLOCKS][COL_BLOCKS];

  METAL_FUNC Quarter(threadgroup float* floats, short simdgroup_index, short lane)
      : left{floats}, right{floats + Left::size}, strip{floats + simdgroup_index * Strip::size},
        row(simdgroup_index / 2 * (ROWS / 2)), col(simdgroup_index % 2 * (GEMM_COLUMNS / 2)),
        strip_row(lane / (LANES / RUN)), strip_col(lane % (LANES / RUN) * RUN) {
    TFL_UNROLL
    for (short i = 0; i < ROW_BLOCKS; ++i) {
      TFL_UNROLL
      for (short j = 0; j < COL_BLOCKS; ++j) {
        sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      }
    }
  }

  /// Adds a product of matrices, the right one transposed but BACKWARD, over so many terms.
  template <typename L, typename R>
  METAL_FUNC void add_product(thread L& left_loader, thread R& right_loader, uint terms) thread {
    if (terms > 0) {
      left_loader.fetch();
      right_loader.fetch();
    }
    for (uint k = 0; k < terms; k += GEMM_DEPTH) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      left_loader.store(left);
      right_loader.store(right);
      left_loader.next_columns();
      if (BACKWARD) {
        right_loader.next_rows();
      } else {
        right_loader.next_columns();
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (k + GEMM_DEPTH < terms) {
        left_loader.fetch();
        right_loader.fetch();
      }
      TFL_UNROLL
      for (short d = 0; d < GEMM_DEPTH; d += BLOCK) {
        simdgroup_float8x8 left_blocks[ROW_BLOCKS], right_block;
        TFL_UNROLL
        for (short i = 0; i < ROW_BLOCKS; ++i) {
          left.read(left_blocks[i], row + BLOCK * i, d);
        }
        TFL_UNROLL
        for (short j = 0; j < COL_BLOCKS; ++j) {
          if (BACKWARD) {
            right.read(right_block, d, col + BLOCK * j);
          } else {
            right.read_transposed(right_block, col + BLOCK * j, d);
          }
          TFL_UNROLL
          for (short i = 0; i < ROW_BLOCKS; ++i) {
            simdgroup_multiply_accumulate(sums[i][j], left_blocks[i], right_block, sums[i][j]);
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  /// The lane's run of a row of blocks.
  METAL_FUNC Run get(short i) thread {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    TFL_UNROLL
    for (short j = 0; j < COL_BLOCKS; ++j) {
      simdgroup_store(sums[i][j], strip.at(0, BLOCK * j), Strip::stride);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    return strip.run(strip_row, strip_col);
  }

  METAL_FUNC void set(short i, Run run) thread {
    strip.set_run(strip_row, strip_col, run);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    TFL_UNROLL
    for (short j = 0; j < COL_BLOCKS; ++j) {
      strip.read(sums[i][j], 0, BLOCK * j);
    }
  }
};

template <typename T, typename TA, typename Y, typename FORMAT, short ROWS, bool BACKWARD, bool DROPPED>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * GEMM_SIMDGROUPS)]]
void lora_gemm(
    device const T* x [[buffer(GEMM_X)]],
    device const typename FORMAT::Word* weight [[buffer(GEMM_WEIGHT)]],
    device const typename FORMAT::Scale* scales [[buffer(GEMM_SCALES)]],
    device const typename FORMAT::Scale* biases [[buffer(GEMM_BIASES)]],
    device const T* bias [[buffer(GEMM_BIAS)]],
    device const TA* h [[buffer(GEMM_H)]],  // z backward; contiguous
    device const TA* factor [[buffer(GEMM_FACTOR)]],  // B, N x r, or A, r x K, backward
    device Y* y [[buffer(GEMM_Y)]],  // by split
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
    constant Pair& split_terms [[buffer(GEMM_SPLIT_TERMS)]],  // of the base product, in a split: whole tiles
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  using Sums = Quarter<ROWS, BACKWARD>;
  constexpr short THREADS = LANES * GEMM_SIMDGROUPS;
  threadgroup float4 memory[Sums::SIZE / 4];
  threadgroup typename FORMAT::Scale table[FORMAT::ENTRIES];
  FORMAT::load_table(table, biases, thread_index);
  Sums sums(reinterpret_cast<threadgroup float*>(memory), simdgroup_index, lane);
  const uint M = rows_terms.x, terms = rows_terms.y, columns = columns_ranks.x, ranks = columns_ranks.y;
  const uint row = group.y * ROWS, column = group.x * GEMM_COLUMNS, flags = flags_bias_stride.x;
  const uint split = group.z, right_row = BACKWARD ? 0 : column, right_col = BACKWARD ? column : 0;
  const uint m = row + sums.row + sums.strip_row, n = column + sums.col + sums.strip_col, count = left(n, columns);

  if (split == 0) {  // The low-rank term, scaled, dropped, and with the bias.
    const Matrix<TA> h_matrix = matrix_of(h, M, ranks, Pair(ranks, 1), (flags & GEMM_WIDE_H) != 0);
    const Matrix<TA> factor_matrix = matrix_of(
        factor, BACKWARD ? ranks : columns, BACKWARD ? columns : ranks, factor_strides,
        (flags & GEMM_WIDE_FACTOR) != 0);
    Loader<TA, ROWS, GEMM_DEPTH, THREADS> h_loader(h_matrix, row, 0, thread_index);
    Loader<TA, Sums::RIGHT_ROWS, Sums::RIGHT_COLS, THREADS> factor_loader(
        factor_matrix, right_row, right_col, thread_index);
    sums.add_product(h_loader, factor_loader, ranks);
    Run added = {float4(0), float4(0)};
    if ((flags & GEMM_HAS_BIAS) != 0) {
      added = load_run(bias + ulong(n) * flags_bias_stride.y, flags_bias_stride.y, count, false);
    }
    const Dropout dropout = {seed, 0, dropout_words.x, as_type<float>(dropout_words.y)};
    ulong element = ulong(m) * columns + n;
    TFL_UNROLL
    for (short i = 0; i < Sums::ROW_BLOCKS; ++i) {
      Run delta = sums.get(i);
      if (DROPPED) {
        delta = dropout.apply(delta, element);
        element += ulong(BLOCK) * columns;
      }
      delta.low = fma(delta.low, float4(scaling), added.low);
      delta.high = fma(delta.high, float4(scaling), added.high);
      sums.set(i, delta);
    }
  }

  // The base product on top, or a split of it.
  const uint first = split * split_terms.x;
  const Matrix<T> x_matrix = matrix_of(x, M, terms, x_levels, x_strides, (flags & GEMM_WIDE_X) != 0);
  Loader<T, ROWS, GEMM_DEPTH, THREADS> x_loader(x_matrix, row, first, thread_index);
  typename FORMAT::template BlockLoader<Sums::RIGHT_ROWS, Sums::RIGHT_COLS, THREADS> W_loader(
      FORMAT::of(
          weight, scales, biases, table, BACKWARD ? terms : columns, BACKWARD ? columns : terms, W_layout,
          (flags & GEMM_WIDE_W) != 0),
      BACKWARD ? first : right_row, BACKWARD ? right_col : first, thread_index);
  sums.add_product(x_loader, W_loader, min(split_terms.x, left(first, terms)));
  device Y* target = y + ulong(split) * M * columns + ulong(m) * columns + n;
  TFL_UNROLL
  for (short i = 0; i < Sums::ROW_BLOCKS; ++i) {
    const Run run = sums.get(i);
    if (m + BLOCK * i < M) {
      store_run(target, run, count, (flags & GEMM_WIDE_Y) != 0);
    }
    target += ulong(BLOCK) * columns;
  }
}

}  // namespace tfl
