// lora_decode: y = x W^T + b + s (x A^T) B^T for one to eight rows of x, in one pass over W; one dispatch, no scratch.
//
// Algorithm. A threadgroup owns a range of W's rows, as many as give every core one threadgroup (or up to four, where
//   that is nearly free). It first computes all of h = x A^T, a simdgroup a rank, then takes its rows of W, W_ROWS a
//   simdgroup at a time. The low-rank term costs no reduction of its own: each lane adds s h[j] B[n, j], for every
//   32nd j, to its share of the dot product with W[n], and one simd_sum finishes both.
// Tile. A chunk of x (4096 / M columns or a little less), as float, in 16 KiB of threadgroup memory; h in 8 KiB more.
// Threads. 512, 16 simdgroups. A lane reads 16 bytes of a row of W at a time: 512 contiguous bytes a simdgroup, W_ROWS
//   rows at once.
// Bytes. W, B, b and y are touched exactly once: the least possible. Every threadgroup reads x and A again, (M + r) K
//   elements: with one a core on 40 cores, 0.17 of a 4096 x 4096 W at rank 16 (counted by the executor). At rank 64
//   it would be 0.63 (the same formula): from about there two dispatches, x A^T once and then W, request fewer bytes;
//   one still saves a launch. How much of it a cache serves is not modelled, and nothing was timed.
// Rounding. Once: base, bias and low-rank term are summed in float32.
#include "lora_decode.h"
#include "operands.h"

namespace tfl {

/// What a lane has of the dot products of ROWS rows with M rows of x.
template <short ROWS, short M>
struct Sums {
  float of[ROWS][M];
};

/// VECTOR neighbouring elements, zeros beyond: 1, or 16 bytes of them where rows are contiguous and aligned.
template <short VECTOR, typename U>
METAL_FUNC Run load_vector(device const U* source) {
  if (VECTOR == 1) {
    return {float4(float(*source), 0, 0, 0), float4(0)};
  }
  if (VECTOR == 4) {
    device const vec<U, 4>* const quad = reinterpret_cast<device const vec<U, 4>*>(source);
    return {float4(quad[0]), float4(0)};
  }
  return widened(fetch_eight(source));
}

/// sums.of[j][m] += dot(row j of `rows`, row m of the staged x) over `count` columns, a lane's share.
template <short VECTOR, short ROWS, short M, typename U>
METAL_FUNC void accumulate(
    thread Sums<ROWS, M>& sums,
    device const U* rows,
    uint row_stride,
    uint col_stride,
    short row_count,
    threadgroup const float* x,
    uint count,
    ushort lane) {
  constexpr short CHUNK = decode_chunk_columns(M);
  const ulong step = ulong(LANES * VECTOR) * col_stride;
  device const U* source = rows + ulong(lane * VECTOR) * col_stride;
  for (uint k = lane * VECTOR; k < count; k += LANES * VECTOR, source += step) {
    TFL_UNROLL
    for (short j = 0; j < ROWS; ++j) {
      if (j < row_count) {
        const Run w = load_vector<VECTOR>(source + ulong(j) * row_stride);
        TFL_UNROLL
        for (short m = 0; m < M; ++m) {
          threadgroup const float* const row = x + m * CHUNK + k;
          if (VECTOR == 1) {
            sums.of[j][m] = fma(w.low.x, row[0], sums.of[j][m]);
          } else {
            threadgroup const float4* const quads = reinterpret_cast<threadgroup const float4*>(row);
            sums.of[j][m] += dot(w.low, quads[0]);
            if (VECTOR == RUN) {
              sums.of[j][m] += dot(w.high, quads[1]);
            }
          }
        }
      }
    }
  }
}

/// Stages columns [first, first + count) of x as float.
template <short M, typename T>
METAL_FUNC void stage_x(threadgroup float* staged, Matrix<T> x, uint first, uint count, ushort thread_index) {
  constexpr short CHUNK = decode_chunk_columns(M);
  constexpr uint STEP = LANES * DECODE_SIMDGROUPS;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TFL_UNROLL
  for (short m = 0; m < M; ++m) {
    device const T* source = x.at(m, first + thread_index);
    const ulong step = x.across(STEP);
    for (uint k = thread_index; k < count; k += STEP, source += step) {
      staged[m * CHUNK + k] = float(*source);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <typename T, typename TA, short M, short W_ROWS, short W_VECTOR, short A_VECTOR>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * DECODE_SIMDGROUPS)]]
void lora_decode(
    device const T* x [[buffer(DECODE_X)]],
    device const T* weight [[buffer(DECODE_WEIGHT)]],
    device const T* bias [[buffer(DECODE_BIAS)]],
    device const TA* lora_A [[buffer(DECODE_LORA_A)]],
    device const TA* lora_B [[buffer(DECODE_LORA_B)]],
    device T* y [[buffer(DECODE_Y)]],
    device TA* h [[buffer(DECODE_H)]],
    constant float& scaling [[buffer(DECODE_SCALING)]],
    constant Pair& k_n [[buffer(DECODE_K_N)]],
    constant Pair& rank_rows [[buffer(DECODE_RANK_ROWS)]],  // r, and how many rows of W a threadgroup owns
    constant Pair& x_levels [[buffer(DECODE_X_LEVELS)]],
    constant Pair& x_strides [[buffer(DECODE_X_STRIDES)]],
    constant Pair& W_strides [[buffer(DECODE_W_STRIDES)]],
    constant Pair& A_strides [[buffer(DECODE_A_STRIDES)]],
    constant Pair& B_strides [[buffer(DECODE_B_STRIDES)]],
    constant Pair& flags_bias_stride [[buffer(DECODE_FLAGS_BIAS_STRIDE)]],
    uint group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr short CHUNK = decode_chunk_columns(M);
  threadgroup float4 x_memory[DECODE_X_FLOATS / 4];
  threadgroup float h_sums[DECODE_H_FLOATS];
  threadgroup float* const staged = reinterpret_cast<threadgroup float*>(x_memory);

  const uint K = k_n.x, N = k_n.y, r = rank_rows.x, flags = flags_bias_stride.x;
  const Matrix<T> x_matrix = matrix_of(x, M, K, x_levels, x_strides, false);

  // h = x A^T: a simdgroup a rank. Its first lane keeps the sum over the chunks, which nobody else touches yet.
  for (uint first = 0; first < K || first == 0; first += CHUNK) {
    const uint count = min(uint(CHUNK), K - first);
    stage_x<M>(staged, x_matrix, first, count, thread_index);
    for (uint rank = simdgroup_index; rank < r; rank += DECODE_SIMDGROUPS) {
      Sums<1, M> sums = {};
      device const TA* const row = lora_A + ulong(rank) * A_strides.x + ulong(first) * A_strides.y;
      accumulate<A_VECTOR>(sums, row, 0, A_strides.y, 1, staged, count, lane);
      TFL_UNROLL
      for (short m = 0; m < M; ++m) {
        const float sum = simd_sum(sums.of[0][m]);
        if (lane == 0) {
          threadgroup float& total = h_sums[m * r + rank];
          total = first == 0 ? sum : total + sum;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if ((flags & DECODE_SAVE_H) != 0 && group == 0) {
    for (uint i = thread_index; i < M * r; i += LANES * DECODE_SIMDGROUPS) {
      h[i] = static_cast<TA>(h_sums[i]);
    }
  }

  const uint row_end = min(N, (group + 1) * rank_rows.y);
  for (uint row = group * rank_rows.y; row < row_end; row += DECODE_SIMDGROUPS * W_ROWS) {
    const uint n = row + simdgroup_index * W_ROWS;
    const short row_count = min(uint(W_ROWS), left(n, row_end));
    Sums<W_ROWS, M> sums = {};
    for (uint first = 0; first < K; first += CHUNK) {
      const uint count = min(uint(CHUNK), K - first);
      if (K > CHUNK) {
        stage_x<M>(staged, x_matrix, first, count, thread_index);
      }
      device const T* const rows = weight + ulong(n) * W_strides.x + ulong(first) * W_strides.y;
      accumulate<W_VECTOR>(sums, rows, W_strides.x, W_strides.y, row_count, staged, count, lane);
    }
    TFL_UNROLL
    for (short j = 0; j < W_ROWS; ++j) {
      if (j < row_count) {
        device const TA* source = lora_B + ulong(n + j) * B_strides.x + ulong(lane) * B_strides.y;
        const ulong step = ulong(LANES) * B_strides.y;
        for (uint rank = lane; rank < r; rank += LANES, source += step) {
          const float b = scaling * float(*source);
          TFL_UNROLL
          for (short m = 0; m < M; ++m) {
            sums.of[j][m] = fma(b, h_sums[m * r + rank], sums.of[j][m]);
          }
        }
        const float offset =
            (flags & DECODE_HAS_BIAS) != 0 && lane == 0 ? float(bias[ulong(n + j) * flags_bias_stride.y]) : 0.0f;
        TFL_UNROLL
        for (short m = 0; m < M; ++m) {
          const float sum = simd_sum(sums.of[j][m] + offset);
          if (lane == 0) {
            y[ulong(m) * N + n + j] = static_cast<T>(sum);
          }
        }
      }
    }
  }
}

}  // namespace tfl
