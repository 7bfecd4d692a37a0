// Barriers, and what the shim asks of the runtime (runtime/scheduler.cpp).
#pragma once

#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
// nomerge: where an operation stands in the source is how lanes that diverged are told.
#pragma clang attribute push(__attribute__((nomerge)), apply_to = function)
extern "C" {
void executor_barrier(uint flags);
void executor_simdgroup_barrier(uint flags);
// Waits until every lane of the simdgroup calls it at the same place; then `complete` runs once, with the lanes' frames
// (null for a lane that a partial simdgroup lacks).
void executor_collective(void (*complete)(void** frames), void* frame, bool is_matrix_multiply);
void executor_pointers_differ();
uint executor_lane();
void* executor_threadgroup_variable(uint site, ulong size, ulong alignment);
void executor_atomic(const void* object, ulong size);
}
#pragma clang attribute pop

namespace metal {

AT_CALLER inline void threadgroup_barrier(mem_flags flags) { executor_barrier(uint(flags)); }
AT_CALLER inline void simdgroup_barrier(mem_flags flags) { executor_simdgroup_barrier(uint(flags)); }

namespace executor {

// The lanes' frames as the type that they are.
template <typename Frame> struct Frames {
  void** frames;
  bool has(int lane) const { return frames[lane]; }
  Frame& operator[](int lane) const { return *(Frame*)frames[lane]; }
};

// One collective operation: Operation::run(Frames<Frame>) sees the frames of all lanes at once.
template <typename Operation, typename Frame>
__attribute__((noinline, no_sanitize("kernel-address"))) void complete(void** frames) {
  Operation::run(Frames<Frame>{frames});
}
template <typename Operation, typename Frame>
AT_CALLER Frame collective(Frame frame, bool is_matrix_multiply = false) {
  executor_collective(&complete<Operation, Frame>, &frame, is_matrix_multiply);
  return frame;
}

// A kernel's threadgroup variable. `site` numbers the declaration.
template <typename T, uint site> AT_CALLER threadgroup T& threadgroup_variable() {
  return *(threadgroup T*)executor_threadgroup_variable(site, sizeof(T), alignof(T));
}

}  // namespace executor
}  // namespace metal
#pragma OPENCL EXTENSION __cl_clang_function_pointers : disable
