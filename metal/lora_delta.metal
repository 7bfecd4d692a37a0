// lora_delta: y += s (x A^T) B^T in place, after the base product; one dispatch, no scratch.
//
// With A and B in swapped roles (and x = dY) the same kernel is the dx side of backward: dx += mask * s (dY B) A.
//
// Algorithm. A threadgroup owns ROWS rows (8, 16 or 32). Stage 1 walks over K in tiles and accumulates h = x A^T in
//   simdgroup matrices: each simdgroup has eight of the rows, all ranks, and every K_SLICES-th block of eight columns.
//   The slices are summed through threadgroup memory, in a fixed order; h stays in registers from then on.
//   Stage 2 walks over N in tiles: delta = h B^T, then y is read, added to, rounded once and written.
// Tile. x: ROWS x WIDTH, A: RANKS x WIDTH, B: WIDTH x RANKS; WIDTH is 64, 32 or 16 as the rank grows, so that both
//   tiles fit 32 KiB up to rank 256 (at rank 16 they take 14 KB).
// Threads. 256: 32 lanes * ROWS / 8 * K_SLICES. Fewer where few rows meet a rank above 64, whose narrower tiles have
//   fewer slices. At rank 64 and below and 32 rows, one run of eight elements of x and of y a thread and tile.
// Bytes. x is read once, y read and written once: the least possible. A and B are read once per ROWS rows, which
//   for 32 rows and rank r adds r / 32 of the bytes of x and y (all counted by the executor). With few
//   rows the launch plan splits N over threadgroups to fill the GPU; each of them reads x and A again, within a bound.
// Rounding. Sums are float32; y + delta is rounded once to y's type. With `save_h`, h is stored, rounded to A's type.
#include "lora_delta.h"
#include "tiles.h"

namespace tfl {

template <typename T, typename TA, short RANK_BLOCKS, short ROW_BLOCKS, short K_SLICES, Mask MASK>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * ROW_BLOCKS * K_SLICES)]]
void lora_delta(
    device const T* x [[buffer(DELTA_X)]],
    device const TA* lora_A [[buffer(DELTA_LORA_A)]],
    device const TA* lora_B [[buffer(DELTA_LORA_B)]],
    device T* y [[buffer(DELTA_Y)]],
    device TA* h [[buffer(DELTA_H)]],
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
    uint2 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  constexpr short RANKS = BLOCK * RANK_BLOCKS, ROWS = BLOCK * ROW_BLOCKS, WIDTH = delta_width(RANK_BLOCKS);
  constexpr short THREADS = LANES * ROW_BLOCKS * K_SLICES;
  static_assert(K_SLICES <= WIDTH / BLOCK, "every slice has a block of a tile");
  using RowTile = Tile<ROWS, WIDTH>;
  using ATile = Tile<RANKS, WIDTH>;
  using BTile = Tile<WIDTH, RANKS>;
  constexpr short RUNS = ROWS * WIDTH / RUN;
  static_assert(RUNS <= THREADS, "a thread has at most one run of a tile of y");
  constexpr short RANK_TILE_SIZE = ATile::size > BTile::size ? short(ATile::size) : short(BTile::size);
  threadgroup float4 row_memory[RowTile::size / 4];
  threadgroup float4 rank_memory[RANK_TILE_SIZE / 4];
  threadgroup float* const rank_floats = reinterpret_cast<threadgroup float*>(rank_memory);
  const RowTile rows = {reinterpret_cast<threadgroup float*>(row_memory)};

  const uint M = m_k.x, K = m_k.y, N = n_columns.x, flags = y_stride_flags.y, rank_count = ranks.y - ranks.x;
  const uint row = group.y * ROWS;
  const uint column_begin = group.x * n_columns.y, column_end = min(N, column_begin + n_columns.y);
  const short row_block = simdgroup_index / K_SLICES * BLOCK, slice = simdgroup_index % K_SLICES;
  const Dropout dropout = {seed, stream_h_stride.x, dropout_words.x, as_type<float>(dropout_words.y)};

  // Stage 1: h = x A^T.
  simdgroup_float8x8 h_blocks[RANK_BLOCKS];
  TFL_UNROLL
  for (short i = 0; i < RANK_BLOCKS; ++i) {
    h_blocks[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  const Matrix<T> x_matrix = matrix_of(x, M, K, x_levels, x_strides, (flags & DELTA_WIDE_X) != 0);
  device const TA* const A_slice = lora_A + ulong(ranks.x) * A_strides.x;
  const Matrix<TA> A_matrix = matrix_of(A_slice, rank_count, K, A_strides, (flags & DELTA_WIDE_A) != 0);
  const ATile A_tile = {rank_floats};
  Loader<T, ROWS, WIDTH, THREADS, MASK == Mask::input> x_loader(x_matrix, row, 0, thread_index, dropout);
  Loader<TA, RANKS, WIDTH, THREADS> A_loader(A_matrix, 0, 0, thread_index);
  for (uint k = 0; k < K; k += WIDTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x_loader.load(rows);
    A_loader.load(A_tile);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (short block = slice * BLOCK; block < WIDTH; block += BLOCK * K_SLICES) {
      simdgroup_float8x8 x_block, A_block;
      rows.read(x_block, row_block, block);
      TFL_UNROLL
      for (short i = 0; i < RANK_BLOCKS; ++i) {
        A_tile.read_transposed(A_block, BLOCK * i, block);
        simdgroup_multiply_accumulate(h_blocks[i], x_block, A_block, h_blocks[i]);
      }
    }
    x_loader.next_columns();
    A_loader.next_columns();
  }

  // The slices' sums, as many rank blocks at a time as the rank tile's memory holds; every simdgroup takes them back.
  constexpr short PART = ROWS * BLOCK;  // floats of one slice and rank block
  constexpr short FITTING = RANK_TILE_SIZE / (K_SLICES * PART);
  constexpr short CHUNK = FITTING < RANK_BLOCKS ? FITTING : RANK_BLOCKS;
  static_assert(CHUNK > 0, "one rank block of every slice fits the rank tile");
  device TA* const h_tile = h + ulong(row) * stream_h_stride.y + ranks.x;
  TFL_UNROLL
  for (short first = 0; first < RANK_BLOCKS; first += CHUNK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    TFL_UNROLL
    for (short i = 0; i < CHUNK; ++i) {
      if (first + i < RANK_BLOCKS) {
        simdgroup_store(h_blocks[first + i], rank_floats + (slice * CHUNK + i) * PART + row_block * BLOCK, BLOCK);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const short parts = min(CHUNK, short(RANK_BLOCKS - first));
    for (short i = thread_index; i < parts * PART; i += THREADS) {
      float sum = rank_floats[i];
      TFL_UNROLL
      for (short s = 1; s < K_SLICES; ++s) {
        sum += rank_floats[s * CHUNK * PART + i];
      }
      rank_floats[i] = sum;
      const uint m = i % PART / BLOCK, rank = (first + i / PART) * BLOCK + i % BLOCK;
      if ((flags & DELTA_SAVE_H) != 0 && group.x == 0 && row + m < M && rank < rank_count) {
        h_tile[m * stream_h_stride.y + rank] = static_cast<TA>(sum);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    TFL_UNROLL
    for (short i = 0; i < CHUNK; ++i) {
      if (first + i < RANK_BLOCKS) {
        simdgroup_load(h_blocks[first + i], rank_floats + i * PART + row_block * BLOCK, BLOCK);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Stage 2: y += s h B^T.
  device const TA* const B_slice = lora_B + ulong(ranks.x) * B_strides.y;
  const Matrix<TA> B_matrix = matrix_of(B_slice, N, rank_count, B_strides, (flags & DELTA_WIDE_B) != 0);
  const BTile B_tile = {rank_floats};
  Loader<TA, WIDTH, RANKS, THREADS> B_loader(B_matrix, column_begin, 0, thread_index);
  const short r = thread_index / (WIDTH / RUN), c = thread_index % (WIDTH / RUN) * RUN;
  const uint m = row + r, run_end = thread_index < RUNS && m < M ? column_end : 0;
  const bool wide_y = (flags & DELTA_WIDE_Y) != 0;
  device T* target = y + ulong(m) * y_stride_flags.x + column_begin + c;
  ulong element = ulong(m) * N + column_begin + c;
  for (uint column = column_begin; column < column_end; column += WIDTH) {
    B_loader.load(B_tile);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (short block = slice * BLOCK; block < WIDTH; block += BLOCK * K_SLICES) {
      simdgroup_float8x8 B_block, delta = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      TFL_UNROLL
      for (short i = 0; i < RANK_BLOCKS; ++i) {
        B_tile.read_transposed(B_block, block, BLOCK * i);
        simdgroup_multiply_accumulate(delta, h_blocks[i], B_block, delta);
      }
      simdgroup_store(delta, rows.at(row_block, block), RowTile::stride);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint n = column + c;
    if (n < run_end) {
      const uint count = N - n;  // a split of the columns ends at a multiple of a run, or at N
      Run delta = rows.run(r, c);
      if (MASK == Mask::output) {
        delta = dropout.apply(delta, element);
      }
      Run sum = load_run<T>(target, 1, count, wide_y);
      sum.low = fma(delta.low, float4(scaling), sum.low);
      sum.high = fma(delta.high, float4(scaling), sum.high);
      store_run(target, sum, count, wide_y);
    }
    B_loader.next_rows();
    target += WIDTH;
    element += WIDTH;
  }
}

}  // namespace tfl
