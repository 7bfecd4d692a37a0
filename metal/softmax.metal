// softmax: y = exp(x - maximum) / sum of exp(x - maximum) along rows.
// softmax_backward: dx = y * (grad - sum of y * grad).
//
// Algorithm. Each thread takes exp of its elements against a maximum of its own, which rises as it goes (online: one
//   loop finds maximum and sum); the threads' sums are then brought to the row's maximum and added. HELD: a thread has
//   one run of the row and keeps it in registers; longer rows are looped over once more.
//   A maximum starts at the lowest finite number, so that no exp(-inf - -inf) arises while all that was seen is -inf.
//   A row that is -inf throughout has the sum 0, and 0 * (1 / 0) is NaN; one with a NaN or +inf has the sum NaN: as
//   torch's.
// Tile. None: two floats a simdgroup in threadgroup memory, twice.
// Threads. A run of eight elements each: 1 to 16 simdgroups a row, 8 to 16 a group.
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

/// The run of a row at `place`, of which `count` elements exist, -inf beyond its end.
template <typename T>
METAL_FUNC Run load_logits(Matrix<T> x, device const T* place, uint count) {
  Run run = x.load(place, count);
  TFL_UNROLL
  for (short i = 0; i < RUN; ++i) {
    if (uint(i) >= count) {
      run.set(i, -INFINITY);
    }
  }
  return run;
}

METAL_FUNC float largest(Run run) {
  const float4 maxima = max(run.low, run.high);
  return max(max(maxima.x, maxima.y), max(maxima.z, maxima.w));
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
  constexpr uint STEP = Place<SIMDGROUPS, ROWS>::STEP;
  threadgroup Part shared[2][SIMDGROUPS * ROWS];
  const Place<SIMDGROUPS, ROWS> place = {thread_index, simdgroup_index, lane};
  const uint M = m_h.x, H = m_h.y;
  const Matrix<T> x_rows = matrix_of(x, M, H, x_levels, x_strides, WIDE);
  const ulong x_step = x_rows.across(STEP);

  short turn = 0;
  for (uint block = group; block < blocks; block += groups, turn ^= 1) {
    const uint row = place.row(block), column = place.column(), end = row < M ? H : 0;
    device const T* const first_x = x_rows.at(row, column);
    device const T* x_place = first_x;
    Run run = filled(0.0f);
    Part own = {LOWEST, 0.0f};
    for (uint c = column; c < end; c += STEP, x_place += x_step) {
      run = load_logits(x_rows, x_place, run_count<WIDE>(c, H));
      const float maximum = max(own.maximum, largest(run));
      run = exponentials(run, maximum);
      own = {maximum, own.sum * precise::exp(own.maximum - maximum) + total(run)};
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
    x_place = first_x;
    device T* y_place = y + ulong(row) * H + column;
    for (uint c = column; c < end; c += STEP, y_place += STEP) {
      if (!HELD) {
        run = exponentials(load_logits(x_rows, x_place, run_count<WIDE>(c, H)), own.maximum);
        x_place += x_step;
      }
      store_run(y_place, run * scale, run_count<WIDE>(c, H), WIDE);
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
  constexpr uint STEP = Place<SIMDGROUPS, ROWS>::STEP;
  threadgroup float shared[2][SIMDGROUPS * ROWS];
  const Place<SIMDGROUPS, ROWS> place = {thread_index, simdgroup_index, lane};
  const uint M = m_h.x, H = m_h.y;
  const Matrix<T> grads = matrix_of(grad, M, H, grad_levels, grad_strides, WIDE);
  const Matrix<T> y_rows = matrix_of(y, M, H, y_levels, y_strides, WIDE);
  const ulong grad_step = grads.across(STEP), y_step = y_rows.across(STEP);

  Run grad_run = filled(0.0f), y_run = filled(0.0f);
  short turn = 0;
  for (uint block = group; block < blocks; block += groups, turn ^= 1) {
    const uint row = place.row(block), column = place.column(), end = row < M ? H : 0;
    device const T* const first_grad = grads.at(row, column);
    device const T* const first_y = y_rows.at(row, column);
    device const T* grad_place = first_grad;
    device const T* y_place = first_y;
    float products = 0.0f;
    for (uint c = column; c < end; c += STEP, grad_place += grad_step, y_place += y_step) {
      grad_run = grads.load(grad_place, run_count<WIDE>(c, H));
      y_run = y_rows.load(y_place, run_count<WIDE>(c, H));
      products += total(grad_run * y_run);
    }
    const float sum = place.sum(products, shared[turn]);
    grad_place = first_grad;
    y_place = first_y;
    device T* dx_place = dx + ulong(row) * H + column;
    for (uint c = column; c < end; c += STEP, dx_place += STEP) {
      if (!HELD) {
        grad_run = grads.load(grad_place, run_count<WIDE>(c, H));
        y_run = y_rows.load(y_place, run_count<WIDE>(c, H));
        grad_place += grad_step;
        y_place += y_step;
      }
      store_run(dx_place, y_run * (grad_run - filled(sum)), run_count<WIDE>(c, H), WIDE);
    }
  }
}

}  // namespace tfl
