// lora_grad: dA = s z^T x~ and dB = s dY^T h, both in one dispatch, where z = dY B and h = x~ A^T are M x r.
//
// Deterministic: no atomics. Where too few threadgroups would run, the rows are split over several, which write
// partial sums; sum_splits adds them in order, in one more dispatch.
//
// Algorithm. A gradient is C x r = (M x C)^T (M x r), with C = K for dA and N for dB. A threadgroup owns COLS of the C
//   columns, all ranks of its slice and all rows of its split; it walks over the rows in tiles, and each of the eight
//   simdgroups accumulates its columns in registers with simdgroup matrices. While one tile is multiplied, the next one
//   is on its way into registers, as raw elements.
// Tile. DEPTH x COLS of x or dY (COLS 128 up to rank 64, else 64), DEPTH x RANKS of z or h; at most 26 KiB, half of it
//   where they are half.
// Threads. 256.
// Bytes. x and dY are read once: the least possible. z and h are read once a column tile: r / 128 of the elements of
//   x and dY (twice the bytes where the adapters are float32 over half). Partial sums: (K + N) r floats a split.
// Rounding. Sums are float32; a gradient is rounded once to its type.
#include "lora_grad.h"
#include "tiles.h"

namespace tfl {

/// One group's C x r block: columns from `column`, rows [row, big.rows), summed in `sums`.
template <short RANK_BLOCKS, bool DROPPED, Layout LAYOUT, typename T, typename TA>
METAL_FUNC void accumulate_columns(
    thread simdgroup_float8x8 (&sums)[grad_column_blocks(RANK_BLOCKS)][RANK_BLOCKS],
    threadgroup float* big_floats,
    threadgroup float* small_floats,
    Matrix<T> big,
    Matrix<TA> small,
    uint row,
    uint column,
    Dropout dropout,
    ushort thread_index,
    ushort simdgroup_index) {
  constexpr short BLOCKS = grad_column_blocks(RANK_BLOCKS), DEPTH = grad_depth(RANK_BLOCKS);
  constexpr short THREADS = LANES * GRAD_SIMDGROUPS;
  constexpr short COLS = grad_columns(RANK_BLOCKS), RANKS = BLOCK * RANK_BLOCKS;
  using Big = Tile<DEPTH, COLS, typename Kept<T, DROPPED>::Element>;
  using Small = Tile<DEPTH, RANKS, typename Kept<TA>::Element>;
  const Big big_tile = Big::in(big_floats);
  const Small small_tile = Small::in(small_floats);
  Loader<T, DEPTH, COLS, THREADS, DROPPED, LAYOUT> big_loader(big, row, column, thread_index, dropout);
  Loader<TA, DEPTH, RANKS, THREADS, false, LAYOUT> small_loader(small, row, 0, thread_index);
  if (row < big.rows) {
    big_loader.fetch();
    small_loader.fetch();
  }
  for (; row < big.rows; row += DEPTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    big_loader.store(big_tile);
    small_loader.store(small_tile);
    big_loader.next_rows();
    small_loader.next_rows();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (row + DEPTH < big.rows) {
      big_loader.fetch();
      small_loader.fetch();
    }
    for (short m = 0; m < DEPTH; m += BLOCK) {
      typename Big::Block big_blocks[BLOCKS];
      typename Small::Block small_block;
      TFL_UNROLL
      for (short c = 0; c < BLOCKS; ++c) {
        big_tile.read_transposed(big_blocks[c], m, (simdgroup_index * BLOCKS + c) * BLOCK);
      }
      TFL_UNROLL
      for (short i = 0; i < RANK_BLOCKS; ++i) {
        small_tile.read(small_block, m, BLOCK * i);
        TFL_UNROLL
        for (short c = 0; c < BLOCKS; ++c) {
          simdgroup_multiply_accumulate(sums[c][i], big_blocks[c], small_block, sums[c][i]);
        }
      }
    }
  }
}

/// OUT is TA, or float for partial sums: then `dA` and `dB` have one more leading dimension, the split. LAYOUT: of all
/// operands.
template <typename T, typename TA, typename OUT, short RANK_BLOCKS, bool DROPPED, Layout LAYOUT>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * GRAD_SIMDGROUPS)]]
void lora_grad(
    device const T* x [[buffer(GRAD_X)]],
    device const TA* z [[buffer(GRAD_Z)]],
    device const T* dy [[buffer(GRAD_DY)]],
    device const TA* h [[buffer(GRAD_H)]],
    device OUT* dA [[buffer(GRAD_DA)]],
    device OUT* dB [[buffer(GRAD_DB)]],
    constant float& scaling [[buffer(GRAD_SCALING)]],
    constant uint2& seed [[buffer(GRAD_SEED)]],
    constant Pair& rows [[buffer(GRAD_ROWS)]],  // M, and how many rows a split has
    constant Pair& k_n [[buffer(GRAD_K_N)]],
    constant Pair& ranks [[buffer(GRAD_RANKS)]],  // the slice [begin, end) of the ranks that this launch covers
    constant Pair& x_levels [[buffer(GRAD_X_LEVELS)]],
    constant Pair& x_strides [[buffer(GRAD_X_STRIDES)]],
    constant Pair& dy_levels [[buffer(GRAD_DY_LEVELS)]],
    constant Pair& dy_strides [[buffer(GRAD_DY_STRIDES)]],
    constant Pair& flags_stream [[buffer(GRAD_FLAGS_STREAM)]],
    constant Pair& dropout_words [[buffer(GRAD_DROPOUT_WORDS)]],  // threshold, bits of 1 / (1 - p)
    constant Pair& r_tiles [[buffer(GRAD_R_TILES)]],  // all ranks, and how many column tiles belong to dA
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr short RANKS = BLOCK * RANK_BLOCKS, BLOCKS = grad_column_blocks(RANK_BLOCKS);
  constexpr short DEPTH = grad_depth(RANK_BLOCKS), COLS = grad_columns(RANK_BLOCKS);
  threadgroup float4 big_memory[Tile<DEPTH, COLS, typename Kept<T, DROPPED>::Element>::size / 4];
  threadgroup float4 small_memory[Tile<DEPTH, RANKS, typename Kept<TA>::Element>::size / 4];
  threadgroup float* const big_floats = reinterpret_cast<threadgroup float*>(big_memory);
  threadgroup float* const small_floats = reinterpret_cast<threadgroup float*>(small_memory);

  const bool is_dA = group.x < r_tiles.y;
  const uint column = (is_dA ? group.x : group.x - r_tiles.y) * COLS, columns = is_dA ? k_n.x : k_n.y;
  const uint row = group.y * rows.y, row_end = min(rows.x, row + rows.y);
  const uint rank = ranks.x + group.z * RANKS, rank_count = min(uint(RANKS), ranks.y - rank);
  const bool wide_small = (flags_stream.x & GRAD_WIDE_SMALL) != 0;
  const Pair small_strides = Pair(r_tiles.x, 1);
  simdgroup_float8x8 sums[BLOCKS][RANK_BLOCKS];
  TFL_UNROLL
  for (short c = 0; c < BLOCKS; ++c) {
    TFL_UNROLL
    for (short i = 0; i < RANK_BLOCKS; ++i) {
      sums[c][i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  if (is_dA) {
    const Dropout dropout = {seed, flags_stream.y, dropout_words.x, as_type<float>(dropout_words.y)};
    accumulate_columns<RANK_BLOCKS, DROPPED, LAYOUT>(
        sums, big_floats, small_floats,
        matrix_of(x, row_end, columns, x_levels, x_strides, (flags_stream.x & GRAD_WIDE_X) != 0),
        matrix_of(z + rank, row_end, rank_count, small_strides, wide_small), row, column, dropout, thread_index,
        simdgroup_index);
  } else {
    accumulate_columns<RANK_BLOCKS, false, LAYOUT>(
        sums, big_floats, small_floats,
        matrix_of(dy, row_end, columns, dy_levels, dy_strides, (flags_stream.x & GRAD_WIDE_DY) != 0),
        matrix_of(h + rank, row_end, rank_count, small_strides, wide_small), row, column, Dropout(), thread_index,
        simdgroup_index);
  }

  // Out through threadgroup memory, an 8x8 block of a simdgroup at a time, so that the edges cost nothing above.
  // Neighbouring lanes write neighbouring elements: along the columns for dA, along the ranks for dB.
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* const block = big_floats + simdgroup_index * BLOCK * BLOCK;
  const ulong column_stride = is_dA ? 1 : r_tiles.x, rank_stride = is_dA ? columns : 1;
  const short slow = lane / BLOCK, fast = lane % BLOCK;  // of the lane's first element
  const short block_column = is_dA ? fast : slow, block_rank = is_dA ? slow : fast;
  constexpr short STEP = LANES / BLOCK;  // along `slow`, to its second
  const short column_step = is_dA ? 0 : STEP, rank_step = STEP - column_step;
  const uint first_column = column + simdgroup_index * BLOCKS * BLOCK + block_column, first_rank = rank + block_rank;
  device OUT* const out = (is_dA ? dA : dB) + ulong(group.y) * r_tiles.x * columns + first_column * column_stride +
      first_rank * rank_stride;
  const ulong second = column_step * column_stride + rank_step * rank_stride;
  TFL_UNROLL
  for (short c = 0; c < BLOCKS; ++c) {
    TFL_UNROLL
    for (short i = 0; i < RANK_BLOCKS; ++i) {
      simdgroup_store(sums[c][i], block, BLOCK);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      TFL_UNROLL
      for (short e = 0; e < 2; ++e) {
        const uint n = first_column + BLOCK * c + e * column_step, j = first_rank + BLOCK * i + e * rank_step;
        if (n < columns && j < ranks.y) {
          const short element = (block_column + e * column_step) * BLOCK + block_rank + e * rank_step;
          const ulong place = BLOCK * c * column_stride + BLOCK * i * rank_stride + e * second;
          out[place] = static_cast<OUT>(scaling * block[element]);
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}

}  // namespace tfl
