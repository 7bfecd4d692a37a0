// lora_delta: y += s (x A^T) B^T in place, after the base product.
//
// With A and B in swapped roles (and x = dY) the same kernel is the dx side of backward: dx += mask * s (dY B) A.
//
// Two dispatches, h = x A^T and y += s h B^T: a threadgroup that did both would have the registers of both, and so few
//   of them on a core that they could not hide each other's waiting. Either fills the GPU however few the rows are, as
//   threadgroups share the columns of x, then those of y.
//
// Algorithm, down. A threadgroup has ROWS rows (8, 16 or 32) and a split of K, and walks over it in tiles. A simdgroup
//   has sixteen of the rows (eight where there are no more), at most 64 of the ranks, and every K_SLICES-th block of
//   eight columns. The slices are added up through threadgroup memory, the splits by the second dispatch, both in a
//   fixed order.
// Algorithm, up. A threadgroup has ROWS rows (at most 16 above rank 64) and a split of N. It adds up the partial h of
//   its rows, then walks over its columns in tiles of 64 or 128. Up to rank 64 a simdgroup has the h of its rows in
//   registers; above, h stays in threadgroup memory, and a tile takes a step for every 32 ranks. In both, while one
//   tile is multiplied, the next one is on its way into registers, as raw elements.
// Tile. Down: x ROWS x WIDTH, A RANKS x WIDTH, WIDTH 128 up to rank 16, then 64, 32 and 16; at most 14 KB where both
//   are half, else 26. Up: B WIDTH x 64 at most, sums ROWS x WIDTH, WIDTH 128 for 32 rows up to rank 16, else 64, and h
//   ROWS x RANKS above rank 64; with half B 23 KB at rank 16, 18 KB at 64, at most 26; with float B at most 30.
// Threads. 256. A thread has one or two runs of eight elements of a tile of x, of A, of y and of B.
// Registers. A kernel for any strides and edges keeps a third more values than one whose operands are known to lie in
//   whole aligned runs (LAYOUT): that decides how many threadgroups a core has room for.
// Bytes. x is read once, y read and written once: the least possible. A is read once per ROWS rows, and so is B, which
//   for 32 rows and rank r adds r / 32 of the bytes of x and y (all counted by the executor), from the GPU's cache as
//   far as it holds A and B. The partial h besides: M r floats a split of K, written once and read once a split of N,
//   from the cache.
// Rounding. Sums are float32; y + delta is rounded once to y's type. With `save_h`, h is stored, rounded to A's type.
#include "lora_delta.h"
#include "tiles.h"

namespace tfl {

/// The sizes of the first stage.
template <short RANK_BLOCKS, short ROW_BLOCKS, typename X, typename A>
struct Down {
  static constant constexpr short RANKS = BLOCK * RANK_BLOCKS, ROWS = BLOCK * ROW_BLOCKS;
  static constant constexpr short WIDTH = delta_width(RANK_BLOCKS), BLOCKS = delta_blocks(ROW_BLOCKS);
  static constant constexpr short RANK_GROUPS = delta_rank_groups(RANK_BLOCKS);
  static constant constexpr short OWN = RANK_BLOCKS / RANK_GROUPS;  // blocks of ranks that a simdgroup has
  static constant constexpr short K_SLICES = DELTA_SIMDGROUPS * BLOCKS / (ROW_BLOCKS * RANK_GROUPS);
  using XTile = Tile<ROWS, WIDTH, X>;
  using ATile = Tile<RANKS, WIDTH, A>;
  static constant constexpr short SIZE = XTile::size + ATile::size;
  static_assert(OWN * RANK_GROUPS == RANK_BLOCKS, "the simdgroups have equal shares of the ranks");
  static_assert(K_SLICES <= WIDTH / BLOCK, "every slice has a block of a tile");
};

/// One threadgroup's share of h: rows from `row`, columns [k, k_end) of x. `h` is the split's, M x RANKS.
template <short RANK_BLOCKS, short ROW_BLOCKS, bool DROPPED, Layout LAYOUT, typename T, typename TA>
METAL_FUNC void sum_down(
    threadgroup float4* memory,
    Matrix<T> x,
    Matrix<TA> A,
    device float* h,
    uint row,
    uint k,
    uint k_end,
    Dropout dropout,
    ushort thread_index,
    ushort simdgroup_index) {
  using Sizes = Down<RANK_BLOCKS, ROW_BLOCKS, typename Kept<T, DROPPED>::Element, typename Kept<TA>::Element>;
  constexpr short RANKS = Sizes::RANKS, ROWS = Sizes::ROWS, WIDTH = Sizes::WIDTH, THREADS = LANES * DELTA_SIMDGROUPS;
  constexpr short BLOCKS = Sizes::BLOCKS, OWN = Sizes::OWN;
  constexpr short RANK_GROUPS = Sizes::RANK_GROUPS, K_SLICES = Sizes::K_SLICES;
  threadgroup float* const floats = reinterpret_cast<threadgroup float*>(memory);
  const typename Sizes::XTile x_tile = Sizes::XTile::in(floats);
  const typename Sizes::ATile A_tile = Sizes::ATile::in(floats + Sizes::XTile::size);
  const short slice = simdgroup_index % K_SLICES, rank_group = simdgroup_index / K_SLICES % RANK_GROUPS;
  const short first_row = simdgroup_index / (K_SLICES * RANK_GROUPS) * (BLOCKS * BLOCK);

  simdgroup_float8x8 sums[BLOCKS][OWN];
  TFL_UNROLL
  for (short b = 0; b < BLOCKS; ++b) {
    TFL_UNROLL
    for (short i = 0; i < OWN; ++i) {
      sums[b][i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  constexpr Layout X_LAYOUT = LAYOUT == Layout::any ? Layout::any : Layout::rows;
  Loader<T, ROWS, WIDTH, THREADS, DROPPED, X_LAYOUT> x_loader(x, row, k, thread_index, dropout);
  Loader<TA, RANKS, WIDTH, THREADS, false, LAYOUT> A_loader(A, 0, k, thread_index);
  if (k < k_end) {
    x_loader.fetch();
    A_loader.fetch();
  }
  for (; k < k_end; k += WIDTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x_loader.store(x_tile);
    A_loader.store(A_tile);
    x_loader.next_columns();
    A_loader.next_columns();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (k + WIDTH < k_end) {
      x_loader.fetch();
      A_loader.fetch();
    }
    for (short block = slice * BLOCK; block < WIDTH; block += BLOCK * K_SLICES) {
      typename Sizes::XTile::Block x_blocks[BLOCKS];
      typename Sizes::ATile::Block A_block;
      TFL_UNROLL
      for (short b = 0; b < BLOCKS; ++b) {
        x_tile.read(x_blocks[b], first_row + BLOCK * b, block);
      }
      TFL_UNROLL
      for (short i = 0; i < OWN; ++i) {
        A_tile.read_transposed(A_block, (rank_group * OWN + i) * BLOCK, block);
        TFL_UNROLL
        for (short b = 0; b < BLOCKS; ++b) {
          simdgroup_multiply_accumulate(sums[b][i], x_blocks[b], A_block, sums[b][i]);
        }
      }
    }
  }

  // The sums over the slices: four neighbouring ranks a thread, of an even share of every simdgroup's blocks at a time,
  // as threadgroup memory holds them: by slice, row, simdgroup's share, rank.
  constexpr short FITTING = Sizes::SIZE / (K_SLICES * RANK_GROUPS * ROWS * BLOCK);
  static_assert(FITTING > 0, "one block of every simdgroup fits");
  constexpr short TIMES = (OWN + FITTING - 1) / FITTING, SHARE = (OWN + TIMES - 1) / TIMES * BLOCK;  // ranks
  constexpr short ACROSS = RANK_GROUPS * SHARE, PART = ROWS * ACROSS;
  TFL_UNROLL
  for (short first = 0; first < OWN; first += SHARE / BLOCK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    TFL_UNROLL
    for (short i = 0; i < SHARE / BLOCK; ++i) {
      TFL_UNROLL
      for (short b = 0; b < BLOCKS; ++b) {
        if (first + i < OWN) {
          const short place = (first_row + BLOCK * b) * ACROSS + rank_group * SHARE + BLOCK * i;
          simdgroup_store(sums[b][first + i], floats + slice * PART + place, ACROSS);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (short i = thread_index; i < PART / 4; i += THREADS) {
      float4 sum = memory[i];
      TFL_UNROLL
      for (short s = 1; s < K_SLICES; ++s) {
        sum += memory[s * PART / 4 + i];
      }
      const short m = 4 * i / ACROSS, share = 4 * i % ACROSS / SHARE, rank = first * BLOCK + 4 * i % SHARE;
      if (row + m < x.rows && rank < OWN * BLOCK) {
        device float4* const target = reinterpret_cast<device float4*>(h + ulong(row + m) * RANKS);
        target[(share * OWN * BLOCK + rank) / 4] = sum;
      }
    }
  }
}

/// The sizes of the second stage.
template <short RANK_BLOCKS, short ROW_BLOCKS, typename B>
struct Up {
  static constant constexpr short RANKS = BLOCK * RANK_BLOCKS, ROWS = BLOCK * delta_up_rows(ROW_BLOCKS, RANK_BLOCKS);
  static constant constexpr short BLOCKS = delta_blocks(ROW_BLOCKS), ROW_GROUPS = ROWS / (BLOCK * BLOCKS);
  static constant constexpr bool HELD = RANK_BLOCKS <= DELTA_HELD;
  static constant constexpr short CHUNK = BLOCK * (HELD ? RANK_BLOCKS : short(DELTA_CHUNK));
  static constant constexpr short COLUMN_SLICES = DELTA_SIMDGROUPS / ROW_GROUPS;
  static constant constexpr short COLUMNS = delta_columns(ROW_BLOCKS, RANK_BLOCKS);
  static constant constexpr short COLUMN_BLOCKS = COLUMNS / (BLOCK * COLUMN_SLICES);  // of a simdgroup
  using BTile = Tile<COLUMNS, CHUNK, B>;
  using SumTile = Tile<ROWS, COLUMNS>;
  using HTile = Tile<ROWS, RANKS>;  // where it is held, it lies where the sums will
  static constant constexpr short H_PLACE = BTile::size + (HELD ? 0 : SumTile::size);
  static constant constexpr short SIZE = BTile::size + SumTile::size + (HELD ? 0 : HTile::size);
  static_assert(!HELD || HTile::size <= SumTile::size, "h fits where the sums will be");
  static_assert(RANKS % CHUNK == 0, "the chunks have equal shares of the ranks");
};

/// A simdgroup's rows of h, so many blocks of ranks from `rank`.
template <short BLOCKS, short RANK_BLOCKS, typename HTile>
METAL_FUNC void read_h(
    thread simdgroup_float8x8 (&blocks)[BLOCKS][RANK_BLOCKS], HTile h_tile, short first_row, short rank) {
  TFL_UNROLL
  for (short b = 0; b < BLOCKS; ++b) {
    TFL_UNROLL
    for (short i = 0; i < RANK_BLOCKS; ++i) {
      h_tile.read(blocks[b][i], first_row + BLOCK * b, rank + BLOCK * i);
    }
  }
}

/// Adds one threadgroup's share of s h B^T to y: rows from `row`, columns [column, column_end).
template <short RANK_BLOCKS, short ROW_BLOCKS, bool DROPPED, Layout LAYOUT, typename T, typename TA>
METAL_FUNC void add_up(
    threadgroup float4* memory,
    device const float* partial,
    uint splits,
    Matrix<TA> B,
    device T* y,
    bool wide_y,
    device TA* h,
    uint h_stride,
    bool save_h,
    uint M,
    uint row,
    uint column,
    uint column_end,
    float scaling,
    Dropout dropout,
    ushort thread_index,
    ushort simdgroup_index) {
  using Sizes = Up<RANK_BLOCKS, ROW_BLOCKS, typename Kept<TA>::Element>;
  constexpr short RANKS = Sizes::RANKS, ROWS = Sizes::ROWS, BLOCKS = Sizes::BLOCKS, CHUNK = Sizes::CHUNK;
  constexpr bool WHOLE = LAYOUT != Layout::any;
  constexpr short WIDTH = Sizes::COLUMNS, THREADS = LANES * DELTA_SIMDGROUPS, COLUMN_BLOCKS = Sizes::COLUMN_BLOCKS;
  threadgroup float* const floats = reinterpret_cast<threadgroup float*>(memory);
  const typename Sizes::BTile B_tile = Sizes::BTile::in(floats);
  const typename Sizes::SumTile sum_tile = Sizes::SumTile::in(floats + Sizes::BTile::size);
  const typename Sizes::HTile h_tile = Sizes::HTile::in(floats + Sizes::H_PLACE);
  const short first_row = simdgroup_index / Sizes::COLUMN_SLICES * (BLOCKS * BLOCK);
  const short first_column = simdgroup_index % Sizes::COLUMN_SLICES * (COLUMN_BLOCKS * BLOCK);

  // h: four neighbouring ranks a thread.
  for (short i = thread_index; i < ROWS * RANKS / 4; i += THREADS) {
    const short h_row = 4 * i / RANKS, rank = 4 * i % RANKS;
    float4 sum = float4(0);
    if (row + h_row < M) {
      device const float4* const first = reinterpret_cast<device const float4*>(partial + ulong(row) * RANKS) + i;
      sum = sum_of_splits(first, ulong(M) * (RANKS / 4), splits);
      TFL_UNROLL
      for (short j = 0; j < 4; ++j) {
        if (save_h && uint(rank + j) < B.cols) {
          h[ulong(row + h_row) * h_stride + rank + j] = static_cast<TA>(sum[j]);
        }
      }
    }
    *reinterpret_cast<threadgroup float4*>(h_tile.at(h_row, rank)) = sum;
  }

  // The thread's runs of a tile of y, STEP rows apart. A split ends at a multiple of a run, or at N.
  constexpr short STEP = THREADS / (WIDTH / RUN), TURNS = (ROWS + STEP - 1) / STEP;
  const short r = thread_index / (WIDTH / RUN), c = thread_index % (WIDTH / RUN) * RUN;
  const uint N = B.rows, m = row + r;
  uint n = column + c;
  ulong element = ulong(m) * N + n;
  const ulong step = ulong(STEP) * N;
  device T* target = y + element;
  RunOf<T> next_y[TURNS];
  bool exists[TURNS];
  TFL_UNROLL
  for (short turn = 0; turn < TURNS; ++turn) {
    exists[turn] = r + STEP * turn < ROWS && m + STEP * turn < M;
    const uint count = exists[turn] && n < column_end ? N - n : 0;
    next_y[turn] = fetch_run<T, WHOLE>(target + turn * step, 1, count, wide_y);
  }
  Loader<TA, WIDTH, CHUNK, THREADS, false, LAYOUT> B_loader(B, column, 0, thread_index);
  if (column < column_end) {
    B_loader.fetch();
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_float8x8 h_blocks[BLOCKS][CHUNK / BLOCK];
  if (Sizes::HELD) {
    read_h<BLOCKS, CHUNK / BLOCK>(h_blocks, h_tile, first_row, 0);
  }

  for (; column < column_end; column += WIDTH) {
    RunOf<T> before[TURNS];
    TFL_UNROLL
    for (short turn = 0; turn < TURNS; ++turn) {
      before[turn] = next_y[turn];
    }
    const uint count = n < column_end ? N - n : 0;
    n += WIDTH;
    simdgroup_float8x8 sums[BLOCKS][COLUMN_BLOCKS];
    TFL_UNROLL
    for (short b = 0; b < BLOCKS; ++b) {
      TFL_UNROLL
      for (short j = 0; j < COLUMN_BLOCKS; ++j) {
        sums[b][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      }
    }
    for (short chunk = 0; chunk < RANKS; chunk += CHUNK) {
      const bool is_last = chunk + CHUNK == RANKS;
      B_loader.store(B_tile);
      B_loader.next_columns();
      if (is_last) {
        B_loader.next_rows();
        B_loader.back(RANKS);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (is_last) {
        TFL_UNROLL
        for (short turn = 0; turn < TURNS; ++turn) {
          const uint next_count = exists[turn] && n < column_end ? N - n : 0;
          next_y[turn] = fetch_run<T, WHOLE>(target + WIDTH + turn * step, 1, next_count, wide_y);
        }
      }
      if (!is_last || column + WIDTH < column_end) {
        B_loader.fetch();
      }
      if (!Sizes::HELD) {
        read_h<BLOCKS, CHUNK / BLOCK>(h_blocks, h_tile, first_row, chunk);
      }
      TFL_UNROLL
      for (short j = 0; j < COLUMN_BLOCKS; ++j) {
        typename Sizes::BTile::Block B_block;
        TFL_UNROLL
        for (short i = 0; i < CHUNK / BLOCK; ++i) {
          B_tile.read_transposed(B_block, first_column + BLOCK * j, BLOCK * i);
          TFL_UNROLL
          for (short b = 0; b < BLOCKS; ++b) {
            simdgroup_multiply_accumulate(sums[b][j], h_blocks[b][i], B_block, sums[b][j]);
          }
        }
      }
      if (is_last) {
        TFL_UNROLL
        for (short b = 0; b < BLOCKS; ++b) {
          TFL_UNROLL
          for (short j = 0; j < COLUMN_BLOCKS; ++j) {
            threadgroup float* const place = sum_tile.at(first_row + BLOCK * b, first_column + BLOCK * j);
            simdgroup_store(sums[b][j], place, Sizes::SumTile::stride);
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    TFL_UNROLL
    for (short turn = 0; turn < TURNS; ++turn) {
      if (exists[turn] && count > 0) {
        Run delta = sum_tile.run(r + STEP * turn, c);
        if (DROPPED) {
          delta = dropout.apply(delta, element + turn * step);
        }
        Run sum = widened(before[turn]);
        sum.low = fma(delta.low, float4(scaling), sum.low);
        sum.high = fma(delta.high, float4(scaling), sum.high);
        store_run<WHOLE>(target + turn * step, sum, count, wide_y);
      }
    }
    target += WIDTH;
    element += WIDTH;
  }
}

/// LAYOUT: of A or B; x or y are read by the row where it is not `any`.
template <typename T, typename TA, Stage STAGE, short RANK_BLOCKS, short ROW_BLOCKS, bool DROPPED, Layout LAYOUT>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * DELTA_SIMDGROUPS)]]
void lora_delta(
    device const T* x [[buffer(DELTA_X)]],
    device const TA* lora_A [[buffer(DELTA_LORA_A)]],
    device const TA* lora_B [[buffer(DELTA_LORA_B)]],
    device T* y [[buffer(DELTA_Y)]],
    device TA* h [[buffer(DELTA_H)]],
    device float* partial [[buffer(DELTA_PARTIAL)]],  // by split, row, rank; the ranks are whole blocks
    constant float& scaling [[buffer(DELTA_SCALING)]],
    constant uint2& seed [[buffer(DELTA_SEED)]],
    constant Pair& m_k [[buffer(DELTA_M_K)]],
    constant Pair& n_columns [[buffer(DELTA_N_COLUMNS)]],  // N, and how many columns of y a threadgroup owns
    constant Pair& ranks [[buffer(DELTA_RANKS)]],  // the slice [begin, end) of the ranks that this launch covers
    constant Pair& x_levels [[buffer(DELTA_X_LEVELS)]],
    constant Pair& x_strides [[buffer(DELTA_X_STRIDES)]],
    constant Pair& A_strides [[buffer(DELTA_A_STRIDES)]],  // of a (rank, k) element
    constant Pair& B_strides [[buffer(DELTA_B_STRIDES)]],  // of an (n, rank) element
    constant Pair& flags_stream [[buffer(DELTA_FLAGS_STREAM)]],
    constant Pair& dropout_words [[buffer(DELTA_DROPOUT_WORDS)]],  // threshold, bits of 1 / (1 - p)
    constant Pair& k_splits [[buffer(DELTA_K_SPLITS)]],  // columns of x in a split, and how many splits
    constant Pair& h_stride [[buffer(DELTA_H_STRIDE)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  using DownSizes = Down<RANK_BLOCKS, ROW_BLOCKS, typename Kept<T, DROPPED>::Element, typename Kept<TA>::Element>;
  using UpSizes = Up<RANK_BLOCKS, ROW_BLOCKS, typename Kept<TA>::Element>;
  constexpr short SIZE = STAGE == Stage::down ? short(DownSizes::SIZE) : short(UpSizes::SIZE);
  threadgroup float4 memory[SIZE / 4];
  const uint M = m_k.x, K = m_k.y, N = n_columns.x, rank_count = ranks.y - ranks.x, flags = flags_stream.x;
  const Dropout dropout = {seed, flags_stream.y, dropout_words.x, as_type<float>(dropout_words.y)};
  if (STAGE == Stage::down) {
    device const TA* const A_slice = lora_A + ulong(ranks.x) * A_strides.x;
    const uint k = group.x * k_splits.x;
    sum_down<RANK_BLOCKS, ROW_BLOCKS, DROPPED, LAYOUT>(
        memory, matrix_of(x, M, K, x_levels, x_strides, (flags & DELTA_WIDE_X) != 0),
        matrix_of(A_slice, rank_count, K, A_strides, (flags & DELTA_WIDE_A) != 0),
        partial + ulong(group.x) * M * DownSizes::RANKS, group.y * DownSizes::ROWS, k, min(K, k + k_splits.x), dropout,
        thread_index, simdgroup_index);
  } else {
    device const TA* const B_slice = lora_B + ulong(ranks.x) * B_strides.y;
    const uint column = group.x * n_columns.y;
    add_up<RANK_BLOCKS, ROW_BLOCKS, DROPPED, LAYOUT>(
        memory, partial, k_splits.y, matrix_of(B_slice, N, rank_count, B_strides, (flags & DELTA_WIDE_B) != 0), y,
        (flags & DELTA_WIDE_Y) != 0, h + ranks.x, h_stride.x, (flags & DELTA_SAVE_H) != 0 && group.x == 0, M,
        group.y * UpSizes::ROWS, column, min(N, column + n_columns.y), scaling, dropout, thread_index, simdgroup_index);
  }
}

}  // namespace tfl
