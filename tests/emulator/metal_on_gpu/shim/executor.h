// The lanes of a simdgroup as the 32 threads of an NVIDIA warp, all of which must arrive wherever they act together.
#pragma once

#include "../../metal_on_cpu/runtime/thread.h"

// What a kernel is launched with: of a device buffer its address, of a constant one the eight bytes themselves.
struct KernelArguments {
  ulong slots[executor_buffers];
};

extern "C" __attribute__((const)) float __nv_expf(float x);  // libdevice's
extern "C" inline uint executor_lane() { return __nvvm_read_ptx_sreg_laneid(); }

namespace metal {

inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __nvvm_bar_warp_sync(~0u); }

namespace executor {

template <typename T> T exp(T x) {
  if constexpr (is_vector<T>) {
    for (int i = 0; i < vector_traits<T>::size; ++i) x[i] = exp(x[i]);
    return x;
  } else {
    return T(__nv_expf(float(x)));
  }
}

// Undefined: ptx.py makes it the address of a shared variable.
template <uint size, uint site> __attribute__((const)) threadgroup void* shared_variable();
template <typename T, uint site> threadgroup T& threadgroup_variable() {
  return *(threadgroup T*)shared_variable<sizeof(T), site>();
}

template <typename T> T shuffle(T value, uint source) {
  if constexpr (is_vector<T>) {
    for (int i = 0; i < vector_traits<T>::size; ++i) value[i] = shuffle(value[i], source);
    return value;
  } else if constexpr (sizeof(T) == 2) {
    return as_type<T>(ushort(shuffle(uint(as_type<ushort>(value)), source)));
  } else if constexpr (sizeof(T) == 1) {
    return as_type<T>(uchar(shuffle(uint(as_type<uchar>(value)), source)));
  } else {
    const T found = as_type<T>(__nvvm_shfl_sync_idx_i32(~0u, as_type<int>(value), source, simd_width - 1));
    return source < simd_width ? found : value;
  }
}

template <typename Operator, typename T> T reduce(T value) {
  for (uint stride = 1; stride < simd_width; stride *= 2) {
    value = Operator::apply(value, shuffle(value, executor_lane() ^ stride));
  }
  return value;
}

inline Placement agreed(Placement placement) { return placement; }

template <typename D, typename A, typename B, typename C>
vec<D, 2> multiply_accumulate(vec<A, 2> a, vec<B, 2> b, vec<C, 2> c) {
  float2 sum = __builtin_convertvector(c, float2);
#if defined(MULTIPLY_BY_FMA)  // the lane's own elements: wrong numbers, the arithmetic alone
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 2; ++i) sum[i] = __builtin_fmaf(float(a[k % 2]), float(b[i]), sum[i]);
  }
#elif defined(TENSOR_CORES)
  // A lane's own elements of a are two neighbouring columns of its row: they count as columns j and j + 4 of the
  // instruction's, j = lane % 4, and the rows of b are taken in the same order. Half of the instruction's sixteen rows
  // are zero. Floats are rounded to tf32, eleven bits.
  const auto tf32 = [](float value) { return as_type<uint>(value) + 0x1000; };  // the instruction drops the rest
  uint b_rows[2];
  for (uint i = 0; i < 2; ++i) {
    const uint b_lane = (executor_lane() % 4 * 2 + i) * 4 + executor_lane() / 8;
    const float even = shuffle(float(b[0]), b_lane), odd = shuffle(float(b[1]), b_lane);
    b_rows[i] = tf32(executor_lane() / 4 % 2 == 0 ? even : odd);
  }
  float2 unused = 0;
  __asm__(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, {%0, %1, %2, %3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(unused.x), "+f"(unused.y)
      : "r"(tf32(float(a[0]))), "r"(0), "r"(tf32(float(a[1]))), "r"(b_rows[0]), "r"(b_rows[1]));
#else
  const uint lane = executor_lane(), own_row = lane & 0b10110, own_column = lane & 0b01001;
  for (uint k = 0; k < 8; ++k) {
    const uint a_lane = own_row | (k & 4) << 1 | (k & 2) >> 1;      // of this row, column k
    const uint b_lane = own_column | (k & 4) << 2 | (k & 3) << 1;  // of row k, this column
    const float a_k = shuffle(float(a[k % 2]), a_lane);
    for (int i = 0; i < 2; ++i) sum[i] += a_k * shuffle(float(b[i]), b_lane);
  }
#endif
  return __builtin_convertvector(sum, vec<D, 2>);
}

// What launch.h knows of a thread. Bit i of `constants`: buffer i is in the arguments themselves. Threadgroups are
// full.
template <uint constants> ExecutorThread thread_of(const KernelArguments& arguments) {
  ExecutorThread state;
  for (uint i = 0; i < executor_buffers; ++i) {
    state.buffers[i] = (constants >> i & 1) != 0 ? (void*)&arguments.slots[i] : (void*)arguments.slots[i];
  }
  const uint3 group = {__nvvm_read_ptx_sreg_ctaid_x(), __nvvm_read_ptx_sreg_ctaid_y(), __nvvm_read_ptx_sreg_ctaid_z()};
  const uint3 inside = {__nvvm_read_ptx_sreg_tid_x(), __nvvm_read_ptx_sreg_tid_y(), __nvvm_read_ptx_sreg_tid_z()};
  const uint3 size = {__nvvm_read_ptx_sreg_ntid_x(), __nvvm_read_ptx_sreg_ntid_y(), __nvvm_read_ptx_sreg_ntid_z()};
  const uint3 groups = {
      __nvvm_read_ptx_sreg_nctaid_x(), __nvvm_read_ptx_sreg_nctaid_y(), __nvvm_read_ptx_sreg_nctaid_z()};
  const uint index = (inside.z * size.y + inside.y) * size.x + inside.x;
  const uint simdgroups = (size.x * size.y * size.z + simd_width - 1) / simd_width;
  const auto set = [&](uint id, uint3 value) {
    for (uint i = 0; i < 3; ++i) state.ids[id - executor_first_id + i] = value[i];
  };
  const auto set_one = [&](uint id, uint value) { state.ids[id - executor_first_id] = value; };
  set(thread_position_in_grid, group * size + inside);
  set(thread_position_in_threadgroup, inside);
  set(threadgroup_position_in_grid, group);
  set(threads_per_threadgroup, size);
  set(dispatch_threads_per_threadgroup, size);
  set(threadgroups_per_grid, groups);
  set(threads_per_grid, groups * size);
  set_one(thread_index_in_threadgroup, index);
  set_one(simdgroup_index_in_threadgroup, index / simd_width);
  set_one(thread_index_in_simdgroup, executor_lane());
  set_one(simdgroups_per_threadgroup, simdgroups);
  set_one(dispatch_simdgroups_per_threadgroup, simdgroups);
  set_one(threads_per_simdgroup, simd_width);
  set_one(thread_execution_width, simd_width);
  return state;
}

}  // namespace executor
}  // namespace metal
