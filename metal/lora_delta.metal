// lora_delta: y += s (x A^T) B^T in place, after the base product.
//
// With A and B in swapped roles (and x = dY) the same kernel is the dx side of backward: dx += mask * s (dY B) A.
//
// Algorithm. A threadgroup owns ROWS rows (8, 16 or 32). Stage 1 walks over K in tiles and accumulates h = x A^T in
//   simdgroup matrices: a simdgroup has sixteen of the rows (eight where there are no more, and above rank 128, whose h
//   takes as many registers), all ranks, and every K_SLICES-th block of eight columns. The slices are summed through
//   threadgroup memory, in a fixed order. Stage 2 takes h back into registers and walks over N in tiles: delta = h B^T,
//   then y is read, added to, rounded once and written. While one tile is multiplied, the next one, and y, are on their
//   way from device memory into registers, as the raw elements.
//   Where the rows fill the GPU, one dispatch does both stages. Where they do not, the launch plan makes two of them:
//   stage 1 with K split over threadgroups, each of which leaves a partial h; then stage 2 with N split, where each
//   threadgroup adds up the partial h of its rows, in a fixed order. A chain of (K + N) / WIDTH tiles that wait for
//   each other becomes one of (K / splits + N / splits) / WIDTH.
// Tile. x: ROWS x WIDTH, A: RANKS x WIDTH, B: WIDTH x RANKS; WIDTH is 64, 32 or 16 as the rank grows, so that both
//   tiles fit 32 KiB up to rank 256 (at rank 16 they take 14 KB, at rank 64 26 KB).
// Threads. 256 as planned: 8 simdgroups, ROWS / 16 or ROWS / 8 of them beside each other, K_SLICES that share rows. At
//   rank 64 and below and 32 rows, one run of eight elements of x and of y a thread and tile.
// Bytes. x is read once, y read and written once: the least possible. A and B are read once per ROWS rows, which
//   for 32 rows and rank r adds r / 32 of the bytes of x and y (all counted by the executor), from the GPU's cache as
//   far as it holds A and B. In two dispatches the partial h besides: M r floats a split of K, written once and read
//   once a split of N, from the cache. (In one dispatch with N split, x and A once a split.)
// Rounding. Sums are float32; y + delta is rounded once to y's type. With `save_h`, h is stored, rounded to A's type.
#include "lora_delta.h"
#include "tiles.h"

namespace tfl {

template <typename T, typename TA, short RANK_BLOCKS, short ROW_BLOCKS, short SIMDGROUPS, Mask MASK>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * SIMDGROUPS)]]
void lora_delta(
    device const T* x [[buffer(DELTA_X)]],
    device const TA* lora_A [[buffer(DELTA_LORA_A)]],
    device const TA* lora_B [[buffer(DELTA_LORA_B)]],
    device T* y [[buffer(DELTA_Y)]],
    device TA* h [[buffer(DELTA_H)]],
    device float* partial [[buffer(DELTA_PARTIAL)]],  // by split, tile of rows, block of ranks, row, rank; padded
    constant float& scaling [[buffer(DELTA_SCALING)]],
    constant uint2& seed [[buffer(DELTA_SEED)]],
    constant Pair& m_k [[buffer(DELTA_M_K)]],
    constant Pair& n_columns [[buffer(DELTA_N_COLUMNS)]],  // N, and how many columns of y a threadgroup owns
    constant Pair& ranks [[buffer(DELTA_RANKS)]],  // the slice [begin, end) of the ranks that this launch covers
    constant Pair& x_levels [[buffer(DELTA_X_LEVELS)]],
    constant Pair& x_strides [[buffer(DELTA_X_STRIDES)]],
    constant Pair& A_strides [[buffer(DELTA_A_STRIDES)]],  // of a (rank, k) element
    constant Pair& B_strides [[buffer(DELTA_B_STRIDES)]],  // of an (n, rank) element
    constant Pair& y_stride_flags [[buffer(DELTA_Y_STRIDE_FLAGS)]],
    constant Pair& dropout_words [[buffer(DELTA_DROPOUT_WORDS)]],  // threshold, bits of 1 / (1 - p)
    constant Pair& stream_h_stride [[buffer(DELTA_STREAM_H_STRIDE)]],
    constant Pair& k_splits [[buffer(DELTA_K_SPLITS)]],  // columns of x in a split, and how many splits
    uint2 group [[threadgroup_position_in_grid]],
    uint2 groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  constexpr short RANKS = BLOCK * RANK_BLOCKS, ROWS = BLOCK * ROW_BLOCKS, WIDTH = delta_width(RANK_BLOCKS);
  constexpr short THREADS = LANES * SIMDGROUPS, BLOCKS = delta_blocks(RANK_BLOCKS, ROW_BLOCKS);
  constexpr short K_SLICES = SIMDGROUPS * BLOCKS / ROW_BLOCKS;  // simdgroups that share rows, and the columns of a tile
  static_assert(K_SLICES <= WIDTH / BLOCK, "every slice has a block of a tile");
  using RowTile = Tile<ROWS, WIDTH>;
  using ATile = Tile<RANKS, WIDTH>;
  using BTile = Tile<WIDTH, RANKS>;
  constexpr short RUNS = ROWS * WIDTH / RUN;
  static_assert(RUNS <= THREADS, "a thread has at most one run of a tile of y");
  constexpr short RANK_TILE_SIZE = ATile::size > BTile::size ? short(ATile::size) : short(BTile::size);
  constexpr short SIZE = RowTile::size + RANK_TILE_SIZE;
  threadgroup float4 memory[SIZE / 4];
  threadgroup float* const floats = reinterpret_cast<threadgroup float*>(memory);
  threadgroup float* const rank_floats = floats + RowTile::size;
  const RowTile rows = {floats};

  const uint M = m_k.x, K = m_k.y, N = n_columns.x, flags = y_stride_flags.y, rank_count = ranks.y - ranks.x;
  const uint row = group.y * ROWS;
  const bool down = (flags & DELTA_DOWN) != 0, up = (flags & DELTA_UP) != 0;
  const uint k_begin = up ? 0 : group.x * k_splits.x, k_end = down ? min(K, k_begin + k_splits.x) : k_begin;
  const uint column_begin = group.x * n_columns.y, column_end = up ? min(N, column_begin + n_columns.y) : column_begin;
  const short first_row = simdgroup_index / K_SLICES * (BLOCKS * BLOCK), slice = simdgroup_index % K_SLICES;
  const Dropout dropout = {seed, stream_h_stride.x, dropout_words.x, as_type<float>(dropout_words.y)};

  // Stage 1: h = x A^T.
  simdgroup_float8x8 h_blocks[BLOCKS][RANK_BLOCKS];
  TFL_UNROLL
  for (short b = 0; b < BLOCKS; ++b) {
    TFL_UNROLL
    for (short i = 0; i < RANK_BLOCKS; ++i) {
      h_blocks[b][i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  const Matrix<T> x_matrix = matrix_of(x, M, K, x_levels, x_strides, (flags & DELTA_WIDE_X) != 0);
  device const TA* const A_slice = lora_A + ulong(ranks.x) * A_strides.x;
  const Matrix<TA> A_matrix = matrix_of(A_slice, rank_count, K, A_strides, (flags & DELTA_WIDE_A) != 0);
  const ATile A_tile = {rank_floats};
  Loader<T, ROWS, WIDTH, THREADS, MASK == Mask::input> x_loader(x_matrix, row, k_begin, thread_index, dropout);
  Loader<TA, RANKS, WIDTH, THREADS> A_loader(A_matrix, 0, k_begin, thread_index);
  if (k_begin < k_end) {
    x_loader.fetch();
    A_loader.fetch();
  }
  for (uint k = k_begin; k < k_end; k += WIDTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x_loader.store(rows);
    A_loader.store(A_tile);
    x_loader.next_columns();
    A_loader.next_columns();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (k + WIDTH < k_end) {
      x_loader.fetch();
      A_loader.fetch();
    }
    for (short block = slice * BLOCK; block < WIDTH; block += BLOCK * K_SLICES) {
      simdgroup_float8x8 x_blocks[BLOCKS], A_block;
      TFL_UNROLL
      for (short b = 0; b < BLOCKS; ++b) {
        rows.read(x_blocks[b], first_row + BLOCK * b, block);
      }
      TFL_UNROLL
      for (short i = 0; i < RANK_BLOCKS; ++i) {
        A_tile.read_transposed(A_block, BLOCK * i, block);
        TFL_UNROLL
        for (short b = 0; b < BLOCKS; ++b) {
          simdgroup_multiply_accumulate(h_blocks[b][i], x_blocks[b], A_block, h_blocks[b][i]);
        }
      }
    }
  }

  device const TA* const B_slice = lora_B + ulong(ranks.x) * B_strides.y;
  const Matrix<TA> B_matrix = matrix_of(B_slice, N, rank_count, B_strides, (flags & DELTA_WIDE_B) != 0);
  const BTile B_tile = {rank_floats};
  Loader<TA, WIDTH, RANKS, THREADS> B_loader(B_matrix, column_begin, 0, thread_index);
  if (column_begin < column_end) {
    B_loader.fetch();
  }

  // The sums over the slices, or over the splits: four neighbouring ranks a thread, all of them or an even share of the
  // rank blocks at a time, as threadgroup memory holds them.
  constexpr short PART = ROWS * BLOCK;  // floats of one slice and rank block
  constexpr short FITTING = SIZE / (K_SLICES * PART);
  static_assert(FITTING > 0, "one rank block of every slice fits");
  constexpr short TIMES = (RANK_BLOCKS + FITTING - 1) / FITTING, CHUNK = (RANK_BLOCKS + TIMES - 1) / TIMES;
  device TA* const h_tile = h + ulong(row) * stream_h_stride.y + ranks.x;
  device float4* const partial_tile =
      reinterpret_cast<device float4*>(partial) + (ulong(up ? 0 : group.x) * groups.y + group.y) * (RANKS * ROWS / 4);
  const ulong split_stride = ulong(groups.y) * (RANKS * ROWS / 4);
  TFL_UNROLL
  for (short first = 0; first < RANK_BLOCKS; first += CHUNK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (down) {
      TFL_UNROLL
      for (short i = 0; i < CHUNK; ++i) {
        TFL_UNROLL
        for (short b = 0; b < BLOCKS; ++b) {
          if (first + i < RANK_BLOCKS) {
            threadgroup float* const part = floats + (slice * CHUNK + i) * PART + (first_row + BLOCK * b) * BLOCK;
            simdgroup_store(h_blocks[b][first + i], part, BLOCK);
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const short parts = min(CHUNK, short(RANK_BLOCKS - first));
    for (short i = thread_index; i < parts * PART / 4; i += THREADS) {
      device float4* const place = partial_tile + first * PART / 4 + i;
      float4 sum;
      if (down) {
        sum = memory[i];
        TFL_UNROLL
        for (short s = 1; s < K_SLICES; ++s) {
          sum += memory[s * CHUNK * PART / 4 + i];
        }
      } else {
        sum = sum_of_splits(place, split_stride, k_splits.y);
      }
      if (up) {
        memory[i] = sum;
      } else {
        *place = sum;
      }
      const uint m = 4 * i % PART / BLOCK, rank = (first + 4 * i / PART) * BLOCK + 4 * i % BLOCK;
      if (up && (flags & DELTA_SAVE_H) != 0 && group.x == 0 && row + m < M) {
        TFL_UNROLL
        for (short j = 0; j < 4; ++j) {
          if (rank + j < rank_count) {
            h_tile[m * stream_h_stride.y + rank + j] = static_cast<TA>(sum[j]);
          }
        }
      }
    }
    if (up) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      TFL_UNROLL
      for (short i = 0; i < CHUNK; ++i) {
        TFL_UNROLL
        for (short b = 0; b < BLOCKS; ++b) {
          if (first + i < RANK_BLOCKS) {
            simdgroup_load(h_blocks[b][first + i], floats + i * PART + (first_row + BLOCK * b) * BLOCK, BLOCK);
          }
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Stage 2: y += s h B^T.
  const short r = thread_index / (WIDTH / RUN), c = thread_index % (WIDTH / RUN) * RUN;
  const uint m = row + r, run_end = thread_index < RUNS && m < M ? column_end : 0;
  const bool wide_y = (flags & DELTA_WIDE_Y) != 0;
  device T* target = y + ulong(m) * y_stride_flags.x + column_begin + c;
  ulong element = ulong(m) * N + column_begin + c;
  for (uint column = column_begin; column < column_end; column += WIDTH) {
    B_loader.store(B_tile);
    B_loader.next_rows();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (column + WIDTH < column_end) {
      B_loader.fetch();
    }
    const uint n = column + c, count = n < run_end ? N - n : 0;  // a split ends at a multiple of a run, or at N
    const RunOf<T> before = fetch_run<T>(target, 1, count, wide_y);
    for (short block = slice * BLOCK; block < WIDTH; block += BLOCK * K_SLICES) {
      simdgroup_float8x8 B_block, deltas[BLOCKS];
      TFL_UNROLL
      for (short b = 0; b < BLOCKS; ++b) {
        deltas[b] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      }
      TFL_UNROLL
      for (short i = 0; i < RANK_BLOCKS; ++i) {
        B_tile.read_transposed(B_block, block, BLOCK * i);
        TFL_UNROLL
        for (short b = 0; b < BLOCKS; ++b) {
          simdgroup_multiply_accumulate(deltas[b], h_blocks[b][i], B_block, deltas[b]);
        }
      }
      TFL_UNROLL
      for (short b = 0; b < BLOCKS; ++b) {
        simdgroup_store(deltas[b], rows.at(first_row + BLOCK * b, block), RowTile::stride);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (count > 0) {
      Run delta = rows.run(r, c);
      if (MASK == Mask::output) {
        delta = dropout.apply(delta, element);
      }
      Run sum = widened(before);
      sum.low = fma(delta.low, float4(scaling), sum.low);
      sum.high = fma(delta.high, float4(scaling), sum.high);
      store_run(target, sum, count, wide_y);
    }
    target += WIDTH;
    element += WIDTH;
  }
}

}  // namespace tfl
