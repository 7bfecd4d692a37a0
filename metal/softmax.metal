// softmax: y = exp(x - maximum) / sum of exp(x - maximum) along rows.
// softmax_backward: dx = y * (grad - sum of y * grad).
//
// Algorithm. Each thread takes exp of its elements against a maximum of its own, which rises as it goes (online: one
//   loop finds maximum and sum); the threads' sums are then brought to the row's maximum and added. HELD: a thread
//   keeps its runs of the row in registers; longer rows are looped over once more.
//   A maximum starts at the lowest finite number, so that no exp(-inf - -inf) arises while all that was seen is -inf.
//   A row that is -inf throughout has the sum 0, and 0 * (1 / 0) is NaN; one with a NaN or +inf has the sum NaN: as
//   torch's.
// Tile. None: two floats a simdgroup in threadgroup memory, twice.
// Threads. Four runs of eight elements each, two in backward: 1 to 8 simdgroups a row, 4 to 8 a group.
// Bytes (counted by the executor). HELD: every operand is touched once, the least possible. Looped rows: what is read
//   is read twice.
// Rounding. Once: sums and products are float32.
#include "rows.h"
#include "softmax.h"

namespace tfl {

constant constexpr float LOWEST = -FLT_MAX;

/// Of some elements: a number that none exceeds, and the sum of exp(element - maximum).
struct Part {
  float maximum, sum;
};

/// The simdgroup's parts as one.
METAL_FUNC Part joined(Part part) {
  const float maximum = simd_max(part.maximum);
  return {maximum, simd_sum(part.sum * precise::exp(part.maximum - maximum))};
}

/// A thread's runs of a row from a column on, which lies at `place`; -inf from `end` on.
template <uint STEP, bool WIDE, typename T>
METAL_FUNC Runs<float, SOFTMAX_RUNS, STEP> load_logits(Matrix<T> x, device const T* place, uint column, uint end) {
  Runs<T, SOFTMAX_RUNS, STEP> found;
  found.template fetch<WIDE>(x, place, column, end);
  Runs<float, SOFTMAX_RUNS, STEP> logits;
  TFL_UNROLL
  for (short i = 0; i < SOFTMAX_RUNS; ++i) {
    const uint count = run_count<WIDE>(column + i * STEP, end);
    logits.runs[i] = widened(found.runs[i]);
    TFL_UNROLL
    for (short j = 0; j < RUN; ++j) {
      if (uint(j) >= count) {
        logits.runs[i].set(j, -INFINITY);
      }
    }
  }
  return logits;
}

METAL_FUNC float largest(float maximum, Run run) {
  const float4 maxima = max(run.low, run.high);
  return max(maximum, max(max(maxima.x, maxima.y), max(maxima.z, maxima.w)));
}

METAL_FUNC Run exponentials(Run run, float maximum) {
  return {precise::exp(run.low - maximum), precise::exp(run.high - maximum)};
}

template <typename T, short SIMDGROUPS, short ROWS, bool HELD, bool WIDE>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * SIMDGROUPS * ROWS)]]
void softmax(
    device const T* x [[buffer(SOFTMAX_X)]],
    device T* y [[buffer(SOFTMAX_Y)]],
    constant Pair& m_h [[buffer(SOFTMAX_M_H)]],
    constant uint& blocks [[buffer(SOFTMAX_BLOCKS)]],
    constant Pair& x_levels [[buffer(SOFTMAX_X_LEVELS)]],
    constant Pair& x_strides [[buffer(SOFTMAX_X_STRIDES)]],
    uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr uint STEP = Place<SIMDGROUPS, ROWS>::STEP, PASS = SOFTMAX_RUNS * STEP;
  threadgroup Part shared[2][SIMDGROUPS * ROWS];
  const Place<SIMDGROUPS, ROWS> place = {thread_index, simdgroup_index, lane};
  const uint M = m_h.x, H = m_h.y;
  const Matrix<T> x_rows = matrix_of(x, M, H, x_levels, x_strides, WIDE);
  const ulong x_pass = x_rows.across(PASS), y_step = ulong(groups * ROWS) * H;
  const uint column = place.column();
  Walk<T> walk = walk_from(x_rows, place.row(group), column, groups * ROWS);
  device T* first_y = y + ulong(place.row(group)) * H + column;

  short turn = 0;
  for (uint block = group; block < blocks; block += groups, turn ^= 1, first_y += y_step) {
    const uint end = place.row(block) < M ? H : 0;
    device const T* x_place = walk.place;
    Runs<float, SOFTMAX_RUNS, STEP> own_runs;
    Part own = {LOWEST, 0.0f};
    for (uint c = column; has_more<HELD>(c, column, end); c += PASS, x_place += x_pass) {
      own_runs = load_logits<STEP, WIDE>(x_rows, x_place, c, end);
      float maximum = own.maximum;
      TFL_UNROLL
      for (short i = 0; i < SOFTMAX_RUNS; ++i) {
        maximum = largest(maximum, own_runs.runs[i]);
      }
      own = {maximum, own.sum * precise::exp(own.maximum - maximum)};
      TFL_UNROLL
      for (short i = 0; i < SOFTMAX_RUNS; ++i) {
        own_runs.runs[i] = exponentials(own_runs.runs[i], maximum);
        own.sum += total(own_runs.runs[i]);
      }
    }
    Part all = joined(own);
    if (SIMDGROUPS > 1) {
      if (lane == 0) {
        shared[turn][simdgroup_index] = all;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      all = {LOWEST, 0.0f};
      if (lane < SIMDGROUPS) {
        all = shared[turn][simdgroup_index / SIMDGROUPS * SIMDGROUPS + lane];
      }
      all = joined(all);
    }
    const float scale = precise::exp(own.maximum - all.maximum) * (1.0f / all.sum);
    x_place = walk.place;
    walk.down(x_rows);
    device T* y_place = first_y;
    for (uint c = column; has_more<HELD>(c, column, end); c += PASS, y_place += PASS) {
      if (!HELD) {
        own_runs = load_logits<STEP, WIDE>(x_rows, x_place, c, end);
        x_place += x_pass;
      }
      TFL_UNROLL
      for (short i = 0; i < SOFTMAX_RUNS; ++i) {
        Run run = own_runs.runs[i];
        if (!HELD) {
          run = exponentials(run, own.maximum);
        }
        store_run(y_place + i * STEP, run * scale, run_count<WIDE>(c + i * STEP, end), WIDE);
      }
    }
  }
}

template <typename T, short SIMDGROUPS, short ROWS, bool HELD, bool WIDE>
[[kernel]] [[max_total_threads_per_threadgroup(LANES * SIMDGROUPS * ROWS)]]
void softmax_backward(
    device const T* grad [[buffer(SOFTMAX_BACKWARD_GRAD)]],
    device const T* y [[buffer(SOFTMAX_BACKWARD_Y)]],
    device T* dx [[buffer(SOFTMAX_BACKWARD_DX)]],
    constant Pair& m_h [[buffer(SOFTMAX_BACKWARD_M_H)]],
    constant uint& blocks [[buffer(SOFTMAX_BACKWARD_BLOCKS)]],
    constant Pair& grad_levels [[buffer(SOFTMAX_BACKWARD_GRAD_LEVELS)]],
    constant Pair& grad_strides [[buffer(SOFTMAX_BACKWARD_GRAD_STRIDES)]],
    constant Pair& y_levels [[buffer(SOFTMAX_BACKWARD_Y_LEVELS)]],
    constant Pair& y_strides [[buffer(SOFTMAX_BACKWARD_Y_STRIDES)]],
    uint group [[threadgroup_position_in_grid]],
    uint groups [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr uint STEP = Place<SIMDGROUPS, ROWS>::STEP, PASS = SOFTMAX_BACKWARD_RUNS * STEP;
  threadgroup float shared[2][SIMDGROUPS * ROWS];
  const Place<SIMDGROUPS, ROWS> place = {thread_index, simdgroup_index, lane};
  const uint M = m_h.x, H = m_h.y;
  const Matrix<T> grads = matrix_of(grad, M, H, grad_levels, grad_strides, WIDE);
  const Matrix<T> y_rows = matrix_of(y, M, H, y_levels, y_strides, WIDE);
  const ulong grad_pass = grads.across(PASS), y_pass = y_rows.across(PASS), dx_step = ulong(groups * ROWS) * H;
  const uint column = place.column();
  Walk<T> grad_walk = walk_from(grads, place.row(group), column, groups * ROWS);
  Walk<T> y_walk = walk_from(y_rows, place.row(group), column, groups * ROWS);
  device T* first_dx = dx + ulong(place.row(group)) * H + column;

  Runs<T, SOFTMAX_BACKWARD_RUNS, STEP> grad_runs, y_runs;
  short turn = 0;
  for (uint block = group; block < blocks; block += groups, turn ^= 1, first_dx += dx_step) {
    const uint end = place.row(block) < M ? H : 0;
    device const T* grad_place = grad_walk.place;
    device const T* y_place = y_walk.place;
    float products = 0.0f;
    for (uint c = column; has_more<HELD>(c, column, end); c += PASS, grad_place += grad_pass, y_place += y_pass) {
      grad_runs.template fetch<WIDE>(grads, grad_place, c, end);
      y_runs.template fetch<WIDE>(y_rows, y_place, c, end);
      TFL_UNROLL
      for (short i = 0; i < SOFTMAX_BACKWARD_RUNS; ++i) {
        products += total(widened(grad_runs.runs[i]) * widened(y_runs.runs[i]));
      }
    }
    const float sum = place.sum(products, shared[turn]);
    grad_place = grad_walk.place;
    y_place = y_walk.place;
    grad_walk.down(grads);
    y_walk.down(y_rows);
    device T* dx_place = first_dx;
    for (uint c = column; has_more<HELD>(c, column, end); c += PASS, dx_place += PASS) {
      if (!HELD) {
        grad_runs.template fetch<WIDE>(grads, grad_place, c, end);
        y_runs.template fetch<WIDE>(y_rows, y_place, c, end);
        grad_place += grad_pass;
        y_place += y_pass;
      }
      TFL_UNROLL
      for (short i = 0; i < SOFTMAX_BACKWARD_RUNS; ++i) {
        const Run dx_run = widened(y_runs.runs[i]) * (widened(grad_runs.runs[i]) - filled(sum));
        store_run(dx_place + i * STEP, dx_run, run_count<WIDE>(c + i * STEP, end), WIDE);
      }
    }
  }
}

}  // namespace tfl
