// lora_decode: y = x W^T + b + s (x A^T) B^T for one to eight rows of x, in one pass over W.
//
// Algorithm. Both products with x are alike: W_ROWS rows of A, or of W, are multiplied with all rows of x by as many
//   simdgroups as share their columns, from registers; x is read from device memory, by 16 bytes like W, and each piece
//   of it is used for W_ROWS rows. The simdgroups' sums meet in threadgroup memory, once, and are added in order.
//   The low-rank term costs no reduction of its own: before it, every thread adds s B[n, j] h[j] for its ranks j.
//   In two dispatches: the first computes h, W_ROWS ranks a threadgroup, the second y. Or, where h and A are so small
//   that computing all of h in each threadgroup takes less than a launch, in one.
// Tile. None: of x, W and A nothing is staged. Threadgroup memory holds sums: 32 floats a simdgroup, and h, as many.
// Threads. 256, 8 simdgroups; a lane reads a run of eight elements of each of four rows at a time: of half ones 16
//   bytes, 512 contiguous bytes a simdgroup. Of packed ones it reads two or four runs, with one scale and bias.
//   A threadgroup owns 4 rows of W (all its simdgroups share the columns) to 32 (each has its own).
// Bytes. W, A, B and y are touched once: the least possible. x and h are read once every four rows of W, for x M / 4 of
//   a half W's requests, from the cache, as is b for every row of x. In one dispatch A once a threadgroup (all counted
//   by the executor).
// Rounding. Once: base, bias and low-rank term are summed in float32.
#include "lora_decode.h"
#include "weights.h"

namespace tfl {

/// COUNT rows of a matrix, the last one again where it has fewer, of which a lane reads RUNS neighbouring runs at a
/// time.
template <typename T, short COUNT, short RUNS = 1>
struct Rows {
  static_assert(RUNS == 1, "elements");
  using Held = RunOf<T>;

  device const T* begin[COUNT];
  uint stride;

  METAL_FUNC Rows(Matrix<T> matrix, uint first) : stride(matrix.col_stride) {
    TFL_UNROLL
    for (short i = 0; i < COUNT; ++i) {
      begin[i] = matrix.at(min(first + i, matrix.rows - 1), 0);
    }
  }

  /// From a column to the one `columns` further on.
  template <bool WIDE>
  METAL_FUNC ulong across(uint columns) const thread {
    return WIDE ? columns : ulong(columns) * stride;
  }

  /// The run of row i that starts at `place`, of which `count` elements exist; WIDE: all, contiguous and aligned to 16
  /// bytes.
  template <bool WIDE>
  METAL_FUNC Held fetch(short i, ulong place, uint count) const thread {
    return WIDE ? fetch_eight(begin[i] + place) : fetch_run(begin[i] + place, stride, count, false);
  }

  METAL_FUNC Run decode(thread const Held& held, short) const thread { return widened(held); }
};

/// The same of packed rows, decoded on the way into registers.
template <typename CODES, short COUNT, short RUNS>
struct Rows<Packed<CODES>, COUNT, RUNS> {
  using Held = PackedRuns<CODES, RUNS>;

  Packed<CODES> begin[COUNT];

  METAL_FUNC Rows(Packed<CODES> matrix, uint first) {
    TFL_UNROLL
    for (short i = 0; i < COUNT; ++i) {
      begin[i] = matrix.from_row(min(first + i, matrix.rows - 1));
    }
  }

  template <bool WIDE>
  METAL_FUNC ulong across(uint columns) const thread {
    return columns;
  }

  template <bool WIDE>
  METAL_FUNC Held fetch(short i, ulong column, uint) const thread {
    return begin[i].template fetch<RUNS>(uint(column));
  }

  METAL_FUNC Run decode(thread const Held& held, short run) const thread { return held.decode(begin[0].codes, run); }
};

/// A 64-bit offset that a loop steps, in halves: one in whole compilers step for each of the elements that are read
/// from it on, which took three times the registers and a quarter of the speed on an NVIDIA GPU.
struct Place {
  uint low, high;

  METAL_FUNC Place(ulong start) : low(uint(start)), high(uint(start >> 32)) {}

  METAL_FUNC void add(ulong step) thread {
    low += uint(step);
    high += uint(step >> 32) + (low < uint(step) ? 1 : 0);
  }

  METAL_FUNC ulong offset() const thread { return as_type<ulong>(uint2(low, high)); }
};

/// What a lane has of the dot products of W_ROWS rows with M rows of x.
template <short M>
struct Sums {
  float of[DECODE_W_ROWS][M];

  /// Adds those over the RUNS runs that start at column k and every `step` further on, up to `end`. The next k.
  template <short RUNS, bool WIDE, typename R, typename X>
  METAL_FUNC uint add_runs(thread const R& rows, thread const X& x, uint k, uint end, uint step) thread {
    Place place(rows.template across<WIDE>(k)), x_place(x.template across<WIDE>(k));
    const ulong next = rows.template across<WIDE>(step), x_next = x.template across<WIDE>(step);
    for (; k < end; k += step, place.add(next), x_place.add(x_next)) {
      typename R::Held held[DECODE_W_ROWS];
      TFL_UNROLL
      for (short j = 0; j < DECODE_W_ROWS; ++j) {
        held[j] = rows.template fetch<WIDE>(j, WIDE ? k : place.offset(), end - k);
      }
      TFL_UNROLL
      for (short run = 0; run < RUNS; ++run) {
        Run w[DECODE_W_ROWS];
        TFL_UNROLL
        for (short j = 0; j < DECODE_W_ROWS; ++j) {
          w[j] = rows.decode(held[j], run);
        }
        TFL_UNROLL
        for (short m = 0; m < M; ++m) {
          const ulong at = (WIDE ? k : x_place.offset()) + x.template across<WIDE>(run * RUN);
          const Run v = widened(x.template fetch<WIDE>(m, at, end - k - run * RUN));
          TFL_UNROLL
          for (short j = 0; j < DECODE_W_ROWS; ++j) {
            TFL_UNROLL
            for (short i = 0; i < RUN; ++i) {
              of[j][m] = fma(w[j].get(i), v.get(i), of[j][m]);
            }
          }
        }
      }
    }
    return k;
  }

  /// Adds this simdgroup's share of the K columns, the `slice`-th of `slices`. `wide`: rows and x are.
  template <short RUNS, typename R, typename X>
  METAL_FUNC void add(thread const R& rows, thread const X& x, uint K, bool wide, ushort2 slice, ushort lane) thread {
    const uint first = (slice.x * LANES + lane) * RUNS * RUN, step = slice.y * LANES * RUNS * RUN;
    const uint next = add_runs<RUNS, true>(rows, x, first, wide ? K / RUN * RUN : 0, step);
    add_runs<RUNS, false>(rows, x, next, K, step);
  }

  /// The simdgroup's sums, those of a row of W together.
  METAL_FUNC void store(threadgroup float* sums, ushort lane) const thread {
    TFL_UNROLL
    for (short j = 0; j < DECODE_W_ROWS; ++j) {
      TFL_UNROLL
      for (short m = 0; m < M; ++m) {
        const float sum = simd_sum(of[j][m]);
        if (lane == 0) {
          sums[j * M + m] = sum;
        }
      }
    }
  }
};

/// M: the rows of x, or a few more, of which the last ones are not stored.
template <typename T, typename TA, typename FORMAT, short M>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * DECODE_SIMDGROUPS)]]
void lora_decode(
    device const T* x [[buffer(DECODE_X)]],
    device const typename FORMAT::Word* weight [[buffer(DECODE_WEIGHT)]],
    device const typename FORMAT::Scale* scales [[buffer(DECODE_SCALES)]],
    device const typename FORMAT::Scale* biases [[buffer(DECODE_BIASES)]],
    device const T* bias [[buffer(DECODE_BIAS)]],
    device const TA* lora_A [[buffer(DECODE_LORA_A)]],
    device const TA* lora_B [[buffer(DECODE_LORA_B)]],
    device T* y [[buffer(DECODE_Y)]],
    device TA* h [[buffer(DECODE_H)]],
    device float* h_sums [[buffer(DECODE_H_SUMS)]],  // from the first dispatch to the second: r x M
    constant float& scaling [[buffer(DECODE_SCALING)]],
    constant Pair& k_n [[buffer(DECODE_K_N)]],
    constant Pair& rank_rows [[buffer(DECODE_RANK_ROWS)]],  // r, and how many rows x has
    constant Pair& x_levels [[buffer(DECODE_X_LEVELS)]],
    constant Pair& x_strides [[buffer(DECODE_X_STRIDES)]],
    constant Pair& W_layout [[buffer(DECODE_W_LAYOUT)]],
    constant Pair& A_strides [[buffer(DECODE_A_STRIDES)]],
    constant Pair& B_strides [[buffer(DECODE_B_STRIDES)]],
    constant Pair& flags_bias_stride [[buffer(DECODE_FLAGS_BIAS_STRIDE)]],
    constant uint& slices [[buffer(DECODE_SLICES)]],  // simdgroups that share rows of W
    uint group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[DECODE_SIMDGROUPS][DECODE_MOST_H];
  threadgroup float h_own[DECODE_MOST_H];
  threadgroup typename FORMAT::Scale table[FORMAT::ENTRIES];

  const uint K = k_n.x, N = k_n.y, r = rank_rows.x, rows = rank_rows.y, flags = flags_bias_stride.x;
  const bool down = (flags & DECODE_DOWN) != 0, up = (flags & DECODE_UP) != 0;
  const Rows<T, M> x_rows(matrix_of(x, rows, K, x_levels, x_strides, false), 0);

  if (down) {
    const uint first = up ? 0 : group * DECODE_W_ROWS, last = up ? r : min(r, first + DECODE_W_ROWS);
    const Matrix<TA> A_matrix = matrix_of(lora_A, r, K, A_strides, false);
    for (uint rank = first; rank < last; rank += DECODE_W_ROWS) {
      Sums<M> own = {};
      const Rows<TA, DECODE_W_ROWS> A_rows(A_matrix, rank);
      const ushort2 slice = ushort2(simdgroup_index, ushort(DECODE_SIMDGROUPS));
      own.template add<1>(A_rows, x_rows, K, (flags & DECODE_WIDE_A) != 0, slice, lane);
      own.store(sums[simdgroup_index] + (rank - first) * M, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < (last - first) * M) {
      float sum = 0.0f;
      TFL_UNROLL
      for (short s = 0; s < DECODE_SIMDGROUPS; ++s) {
        sum += sums[s][thread_index];
      }
      const uint m = thread_index % M, rank = first + thread_index / M;
      if (up) {
        h_own[thread_index] = sum;
      } else {
        h_sums[rank * M + m] = sum;
      }
      if ((flags & DECODE_SAVE_H) != 0 && m < rows && (!up || group == 0)) {
        h[m * r + rank] = static_cast<TA>(sum);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  if (up) {
    FORMAT::load_table(table, biases, thread_index);
    const ushort slice = simdgroup_index % slices;
    const uint group_rows = DECODE_SIMDGROUPS / slices * DECODE_W_ROWS, first_row = group * group_rows;
    const uint first = first_row + simdgroup_index / slices * DECODE_W_ROWS;
    if (first < N) {
      Sums<M> own = {};
      constexpr short RUNS = FORMAT::PACKED ? decode_packed_runs(M) : 1;
      const Rows<typename FORMAT::Element, DECODE_W_ROWS, RUNS> W_rows(
          FORMAT::of(weight, scales, biases, table, N, K, W_layout, false), first);
      own.template add<RUNS>(W_rows, x_rows, K, (flags & DECODE_WIDE_W) != 0, ushort2(slice, ushort(slices)), lane);
      const Rows<TA, DECODE_W_ROWS> B_rows(matrix_of(lora_B, N, r, B_strides, false), first);
      uint rank = slice * LANES + lane;
      ulong place = B_rows.template across<false>(rank);
      const ulong next = B_rows.template across<false>(slices * LANES);
      for (; rank < r; rank += slices * LANES, place += next) {
        float h_rank[M];
        TFL_UNROLL
        for (short m = 0; m < M; ++m) {
          if (down) {
            h_rank[m] = h_own[rank * M + m];
          } else {
            h_rank[m] = h_sums[rank * M + m];
          }
        }
        TFL_UNROLL
        for (short j = 0; j < DECODE_W_ROWS; ++j) {
          const float b = scaling * float(B_rows.begin[j][place]);
          TFL_UNROLL
          for (short m = 0; m < M; ++m) {
            own.of[j][m] = fma(b, h_rank[m], own.of[j][m]);
          }
        }
      }
      own.store(sums[simdgroup_index], lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint m = thread_index / group_rows, place = thread_index % group_rows, n = first_row + place;
    if (m < rows && n < N) {
      float sum = (flags & DECODE_HAS_BIAS) != 0 ? float(bias[ulong(n) * flags_bias_stride.y]) : 0.0f;
      for (ushort s = 0; s < slices; ++s) {
        sum += sums[place / DECODE_W_ROWS * slices + s][place % DECODE_W_ROWS * M + m];
      }
      y[ulong(m) * N + n] = static_cast<T>(sum);
    }
  }
}

}  // namespace tfl
