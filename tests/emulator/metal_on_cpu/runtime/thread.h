// What a launcher receives for one thread. Read by C++ (the runtime) and by OpenCL C++ (the shim): plain C only.
#pragma once

enum { executor_buffers = 31, executor_simd_width = 32 };

// Slots of ExecutorThread::ids; the vector attributes take three. A launcher names a slot as
// executor_first_id + slot, and a buffer by its index, so the two share one numbering.
enum ExecutorId {
  executor_first_id = 32,
  thread_position_in_grid = executor_first_id,
  thread_position_in_threadgroup = thread_position_in_grid + 3,
  threadgroup_position_in_grid = thread_position_in_threadgroup + 3,
  threads_per_threadgroup = threadgroup_position_in_grid + 3,
  dispatch_threads_per_threadgroup = threads_per_threadgroup + 3,
  threadgroups_per_grid = dispatch_threads_per_threadgroup + 3,
  threads_per_grid = threadgroups_per_grid + 3,
  thread_index_in_threadgroup = threads_per_grid + 3,
  simdgroup_index_in_threadgroup,
  thread_index_in_simdgroup,
  simdgroups_per_threadgroup,
  dispatch_simdgroups_per_threadgroup,
  threads_per_simdgroup,
  thread_execution_width,
  executor_end_id,
};

struct ExecutorThread {
  void* buffers[executor_buffers];
  unsigned ids[executor_end_id - executor_first_id];
};

enum ExecutorSpace { executor_no_space, executor_device, executor_device_const, executor_constant };

// One buffer parameter of a kernel, as its launcher describes it.
struct ExecutorParameter {
  unsigned index, space, size, alignment;  // size and alignment: of the type pointed to
};
