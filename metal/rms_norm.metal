// rms_norm: y = x * rstd * weight with rstd = (mean of x^2 + eps)^(-1/2) of the row; rms_norm_backward: dx and dweight.
//
// Algorithm. A threadgroup walks over blocks of rows. HELD: a thread keeps its two runs of the row in registers, and
//   those of the weight for all rows; while it works on a row, its runs of the next one are on the way from memory, as
//   the raw elements. Longer rows are looped over, once for the sum and once for the result. Backward, with
//   n = x * rstd and c = mean of grad * weight * n: dx = rstd * (grad * weight - n * c), dweight = sum of grad * n over
//   the rows. A thread adds up its columns of dweight over its rows: in registers or, where rows are looped over, in
//   the group's row of partial sums. Deterministic: no atomics; sum_splits adds the groups' sums in order.
// Tile. None: a float a simdgroup in threadgroup memory, twice; 8 KiB to add the sums of a block's rows in backward.
// Threads. Two runs of eight elements each: 1 to 8 simdgroups a row, 4 to 8 a group, 8 in backward.
// Bytes (counted by the executor). HELD: x, grad, y, dx and rstd are touched once, the least possible, the weight once
//   by each row that a group has at once. Looped rows: x and grad twice, the weight once a row (twice in backward), the
//   group's row of partial sums is read and written once a row.
// Rounding. Once: sums and products are float32.
#include "rms_norm.h"
#include "rows.h"

namespace tfl {

/// 1 x H, or 0 x H where there is no weight.
template <bool WIDE, typename TW>
METAL_FUNC Matrix<TW> weight_matrix(device const TW* weight, uint H, uint stride, uint flags) {
  return matrix_of(weight, (flags & NORM_HAS_WEIGHT) != 0 ? 1 : 0, H, Pair(0, stride), WIDE);
}

/// The weight's runs from a column on, which lies at `place`; ones where there is no weight.
template <bool WIDE, typename TW, short COUNT, uint STEP>
METAL_FUNC void fetch_weight(
    thread Runs<TW, COUNT, STEP>& found, Matrix<TW> weight, device const TW* place, uint column) {
  found.template fetch<WIDE>(weight, place, column, weight.rows == 0 ? 0 : weight.cols);
  if (weight.rows == 0) {
    const vec<TW, 4> ones = vec<TW, 4>(static_cast<TW>(1.0f));
    TFL_UNROLL
    for (short i = 0; i < COUNT; ++i) {
      found.runs[i] = {ones, ones};
    }
  }
}

template <typename T, typename TW, short SIMDGROUPS, short ROWS, bool HELD, bool WIDE>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * SIMDGROUPS * ROWS)]]
void rms_norm(
    device const T* x [[buffer(NORM_X)]],
    device const TW* weight [[buffer(NORM_WEIGHT)]],
    device T* y [[buffer(NORM_Y)]],
    device float* rstd [[buffer(NORM_RSTD)]],
    constant Pair& m_h [[buffer(NORM_M_H)]],
    constant Pair& blocks_flags [[buffer(NORM_BLOCKS_FLAGS)]],
    constant Pair& x_levels [[buffer(NORM_X_LEVELS)]],
    constant Pair& x_strides [[buffer(NORM_X_STRIDES)]],
    constant Pair& weight_stride_eps [[buffer(NORM_WEIGHT_STRIDE_EPS)]],  // and the bits of eps
    uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[2][SIMDGROUPS * ROWS];
  constexpr uint STEP = Place<SIMDGROUPS, ROWS>::STEP, PASS = NORM_RUNS * STEP;
  const Place<SIMDGROUPS, ROWS> place = {thread_index, simdgroup_index, lane};
  const uint M = m_h.x, H = m_h.y, flags = blocks_flags.y, column = place.column();
  const Matrix<T> x_rows = matrix_of(x, M, H, x_levels, x_strides, WIDE);
  const Matrix<TW> weights = weight_matrix<WIDE>(weight, H, weight_stride_eps.x, flags);

  device const TW* const first_weight = weights.at(0, column);
  const ulong x_pass = x_rows.across(PASS), weight_pass = weights.across(PASS);

  Walk<T> walk = walk_from(x_rows, place.row(group), column, groups * ROWS);
  device T* first_y = y + ulong(place.row(group)) * H + column;
  const ulong y_step = ulong(groups * ROWS) * H;
  Runs<T, NORM_RUNS, STEP> own, ahead;
  Runs<TW, NORM_RUNS, STEP> weight_runs;
  if (HELD) {
    fetch_weight<WIDE>(weight_runs, weights, first_weight, column);
    ahead.template fetch<WIDE>(x_rows, walk.place, column, place.row(group) < M ? H : 0);
  }
  short turn = 0;
  for (uint block = group; block < blocks_flags.x; block += groups, turn ^= 1, first_y += y_step) {
    const uint row = place.row(block), end = row < M ? H : 0;
    device const T* const first_x = walk.place;
    walk.down(x_rows);
    if (HELD) {
      own = ahead;
      ahead.template fetch<WIDE>(x_rows, walk.place, column, place.row(block + groups) < M ? H : 0);
    }
    device const T* x_place = first_x;
    float squares = 0.0f;
    for (uint c = column; has_more<HELD>(c, column, end); c += PASS, x_place += x_pass) {
      if (!HELD) {
        own.template fetch<WIDE>(x_rows, x_place, c, end);
      }
      TFL_UNROLL
      for (short i = 0; i < NORM_RUNS; ++i) {
        const Run x_run = widened(own.runs[i]);
        squares += total(x_run * x_run);
      }
    }
    const float mean = place.sum(squares, shared[turn]) / H;
    const float scale = precise::rsqrt(mean + as_type<float>(weight_stride_eps.y));
    if (column == 0 && row < M) {
      rstd[row] = scale;
    }
    x_place = first_x;
    device const TW* weight_place = first_weight;
    device T* y_place = first_y;
    for (uint c = column; has_more<HELD>(c, column, end); c += PASS, y_place += PASS) {
      if (!HELD) {
        own.template fetch<WIDE>(x_rows, x_place, c, end);
        fetch_weight<WIDE>(weight_runs, weights, weight_place, c);
        x_place += x_pass;
        weight_place += weight_pass;
      }
      TFL_UNROLL
      for (short i = 0; i < NORM_RUNS; ++i) {
        const Run y_run = widened(own.runs[i]) * scale * widened(weight_runs.runs[i]);
        store_run(y_place + i * STEP, y_run, run_count<WIDE>(c + i * STEP, end), WIDE);
      }
    }
  }
}

/// What a thread has of a row in backward, as it comes from memory.
template <typename T, uint STEP>
struct Ahead {
  Runs<T, NORM_RUNS, STEP> grad, x;
  float rstd;  // in the first lane

  template <bool HELD, bool WIDE>
  METAL_FUNC void fetch(
      Matrix<T> grads,
      Matrix<T> x_rows,
      device const float* all_rstd,
      device const T* grad_place,
      device const T* x_place,
      uint row,
      uint column,
      ushort lane) thread {
    if (HELD) {
      const uint end = row < x_rows.rows ? x_rows.cols : 0;
      grad.template fetch<WIDE>(grads, grad_place, column, end);
      x.template fetch<WIDE>(x_rows, x_place, column, end);
    }
    rstd = lane == 0 && row < x_rows.rows ? all_rstd[row] : 0.0f;
  }
};

/// OUT is TW, or float for partial sums: then `dweight` has one more leading dimension, the group.
template <typename T, typename TW, typename OUT, short SIMDGROUPS, short ROWS, bool HELD, bool WIDE>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * SIMDGROUPS * ROWS)]]
void rms_norm_backward(
    device const T* grad [[buffer(NORM_BACKWARD_GRAD)]],
    device const T* x [[buffer(NORM_BACKWARD_X)]],
    device const TW* weight [[buffer(NORM_BACKWARD_WEIGHT)]],
    device const float* rstd [[buffer(NORM_BACKWARD_RSTD)]],
    device T* dx [[buffer(NORM_BACKWARD_DX)]],
    device OUT* dweight [[buffer(NORM_BACKWARD_DWEIGHT)]],
    constant Pair& m_h [[buffer(NORM_BACKWARD_M_H)]],
    constant Pair& blocks_flags [[buffer(NORM_BACKWARD_BLOCKS_FLAGS)]],
    constant Pair& grad_levels [[buffer(NORM_BACKWARD_GRAD_LEVELS)]],
    constant Pair& grad_strides [[buffer(NORM_BACKWARD_GRAD_STRIDES)]],
    constant Pair& x_levels [[buffer(NORM_BACKWARD_X_LEVELS)]],
    constant Pair& x_strides [[buffer(NORM_BACKWARD_X_STRIDES)]],
    constant uint& weight_stride [[buffer(NORM_BACKWARD_WEIGHT_STRIDE)]],
    uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr uint STEP = Place<SIMDGROUPS, ROWS>::STEP, PASS = NORM_RUNS * STEP;
  constexpr short ROW_THREADS = Place<SIMDGROUPS, ROWS>::ROW_THREADS;
  threadgroup float shared[2][SIMDGROUPS * ROWS];
  threadgroup Run row_sums[ROWS > 1 ? ROWS * ROW_THREADS : 1];
  const Place<SIMDGROUPS, ROWS> place = {thread_index, simdgroup_index, lane};
  const uint M = m_h.x, H = m_h.y, flags = blocks_flags.y, column = place.column();
  const bool need_x = (flags & NORM_NEED_X) != 0, need_weight = (flags & NORM_NEED_WEIGHT) != 0;
  const Matrix<T> grads = matrix_of(grad, M, H, grad_levels, grad_strides, WIDE);
  const Matrix<T> x_rows = matrix_of(x, M, H, x_levels, x_strides, WIDE);
  const Matrix<TW> weights = weight_matrix<WIDE>(weight, H, weight_stride, flags);
  device OUT* const first_sum = dweight + ulong(group) * H + column;
  device const TW* const first_weight = weights.at(0, column);
  const ulong grad_pass = grads.across(PASS), x_pass = x_rows.across(PASS), weight_pass = weights.across(PASS);

  Runs<TW, NORM_RUNS, STEP> weight_runs;
  Runs<float, NORM_RUNS, STEP> sums;
  if (HELD) {
    fetch_weight<WIDE>(weight_runs, weights, first_weight, column);
    TFL_UNROLL
    for (short i = 0; i < NORM_RUNS; ++i) {
      sums.runs[i] = filled(0.0f);
    }
  }
  Ahead<T, STEP> ahead, own;
  Walk<T> grad_walk = walk_from(grads, place.row(group), column, groups * ROWS);
  Walk<T> x_walk = walk_from(x_rows, place.row(group), column, groups * ROWS);
  device T* first_dx = dx + ulong(place.row(group)) * H + column;
  const ulong dx_step = ulong(groups * ROWS) * H;
  ahead.template fetch<HELD, WIDE>(grads, x_rows, rstd, grad_walk.place, x_walk.place, place.row(group), column, lane);
  short turn = 0;
  for (uint block = group; block < blocks_flags.x; block += groups, turn ^= 1, first_dx += dx_step) {
    const uint row = place.row(block), end = row < M ? H : 0;
    device const T* const first_grad = grad_walk.place;
    device const T* const first_x = x_walk.place;
    grad_walk.down(grads);
    x_walk.down(x_rows);
    own = ahead;
    ahead.template fetch<HELD, WIDE>(
        grads, x_rows, rstd, grad_walk.place, x_walk.place, place.row(block + groups), column, lane);
    const float scale = simd_broadcast_first(own.rstd);
    device const T* grad_place = first_grad;
    device const T* x_place = first_x;
    device const TW* weight_place = first_weight;
    float products = 0.0f;
    for (uint c = column; has_more<HELD>(c, column, end); c += PASS, grad_place += grad_pass, x_place += x_pass) {
      if (!HELD) {
        own.grad.template fetch<WIDE>(grads, grad_place, c, end);
        own.x.template fetch<WIDE>(x_rows, x_place, c, end);
        fetch_weight<WIDE>(weight_runs, weights, weight_place, c);
        weight_place += weight_pass;
      }
      TFL_UNROLL
      for (short i = 0; i < NORM_RUNS; ++i) {
        const Run scaled = widened(own.grad.runs[i]) * widened(weight_runs.runs[i]);
        products += total(scaled * (widened(own.x.runs[i]) * scale));
      }
    }
    const float mean = place.sum(products, shared[turn]) / H;
    grad_place = first_grad;
    x_place = first_x;
    weight_place = first_weight;
    device T* dx_place = first_dx;
    device OUT* sum_place = first_sum;
    for (uint c = column; has_more<HELD>(c, column, end); c += PASS, dx_place += PASS, sum_place += PASS) {
      if (!HELD) {
        own.grad.template fetch<WIDE>(grads, grad_place, c, end);
        own.x.template fetch<WIDE>(x_rows, x_place, c, end);
        fetch_weight<WIDE>(weight_runs, weights, weight_place, c);
        grad_place += grad_pass;
        x_place += x_pass;
        weight_place += weight_pass;
      }
      TFL_UNROLL
      for (short i = 0; i < NORM_RUNS; ++i) {
        const uint count = run_count<WIDE>(c + i * STEP, end);
        const Run grad_run = widened(own.grad.runs[i]), normal = widened(own.x.runs[i]) * scale;
        if (need_x) {
          const Run scaled = grad_run * widened(weight_runs.runs[i]);
          store_run(dx_place + i * STEP, (scaled - normal * mean) * scale, count, WIDE);
        }
        if (!HELD) {
          const bool is_begun = need_weight && block != group;
          sums.runs[i] = is_begun ? load_run(sum_place + i * STEP, 1, count, WIDE) : filled(0.0f);
        }
        sums.runs[i] = sums.runs[i] + grad_run * normal;
        if (!HELD && need_weight) {
          store_run(sum_place + i * STEP, sums.runs[i], count, WIDE);
        }
      }
    }
  }

  if (HELD && need_weight) {
    TFL_UNROLL
    for (short i = 0; i < NORM_RUNS; ++i) {
      Run sum = sums.runs[i];
      if (ROWS > 1) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        row_sums[thread_index] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (short other = thread_index + ROW_THREADS; other < ROWS * ROW_THREADS; other += ROW_THREADS) {
          sum = sum + row_sums[other];
        }
      }
      if (thread_index < ROW_THREADS) {
        store_run(first_sum + i * STEP, sum, run_count<WIDE>(column + i * STEP, H), WIDE);
      }
    }
  }
}

}  // namespace tfl
