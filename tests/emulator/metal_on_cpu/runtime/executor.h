// The executor's C ABI: run one dispatch of a compiled kernel. Python calls it through ctypes; a C++ device may call it
// from any thread (dispatches are serialised by a lock).
#pragma once

#include <stdint.h>

#include "thread.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { executor_max_findings = 64, executor_max_variables = 64 };

enum ExecutorBinding { executor_unbound, executor_buffer, executor_bytes };

struct ExecutorBuffer {
  void* data;
  uint64_t size;  // bytes; the kernel sees a copy that a guard page follows, stores are copied back to `data`
  uint32_t binding;  // ExecutorBinding
  uint32_t space;  // ExecutorSpace of the kernel's parameter; executor_no_space if it has none at this index
  uint32_t granule;  // trace: races are looked for per granule of this many bytes (the element size: 1, 2, 4 or 8)
};

enum ExecutorOrder { executor_forward, executor_reverse, executor_permuted };

struct ExecutorDispatch {
  void (*launch)(const struct ExecutorThread*);
  uint32_t threads[3], group[3];
  uint32_t order;  // ExecutorOrder of lanes, of simdgroups and of threadgroups
  uint32_t most_groups;  // run no more threadgroups than so many, the first in order; 0: all
  uint32_t trace;  // the kernel was compiled with instrumentation: keep shadow memory
  struct ExecutorBuffer buffers[executor_buffers];
};

enum ExecutorKind {
  executor_race,
  executor_group_race,
  executor_uninitialised,
  executor_out_of_bounds,
  executor_divergent_barrier,
  executor_divergent_simd,
  executor_limit,
  executor_fault,
};

enum ExecutorObject {
  executor_nothing,
  executor_buffer_object,
  executor_threadgroup_object,
  executor_constant_object,
  executor_array_object,
};

struct ExecutorFinding {
  uint32_t kind;  // ExecutorKind
  uint32_t object;  // ExecutorObject
  uint32_t index;  // buffer index, or site of the threadgroup variable; ~0u where none is hit
  uint32_t store;  // the access was a store
  int64_t offset;  // of the access in the object, bytes; of executor_array_object, the index
  uint64_t size;  // of the access, or of the threadgroup memory for executor_limit
  uint64_t object_size;
  uint64_t pc;  // of the access in the kernel's library, relative to its load address
  uint32_t thread[3], group[3];
  uint32_t other_thread;  // race: index in its threadgroup of the other thread
  uint32_t other_group;  // group-race: linear index of the other threadgroup
  uint32_t other_store;
  const char* name;  // of a program-scope constant; lives as long as the kernel's library
};

struct ExecutorReport {
  uint64_t loaded[executor_buffers], stored[executor_buffers];  // trace: bytes requested from device memory
  uint64_t constant_loaded;  // trace: bytes requested from constant buffers
  uint64_t barriers, simdgroup_barriers, matrix_multiplies, threadgroups;
  uint64_t threadgroup_bytes;
  uint64_t threadgroup_accessed;  // trace: bytes requested from threadgroup memory
  // Of the threadgroup and of the simdgroup that have most: steps that wait for loads (trace; see Chain), matrix
  // multiplies, and other simd operations.
  uint64_t longest_steps, longest_multiplies, longest_collectives;
  uint32_t complete;  // every threadgroup ran to its end
  uint32_t finding_count;
  struct ExecutorFinding findings[executor_max_findings];
};

void executor_dispatch(const struct ExecutorDispatch* dispatch, struct ExecutorReport* report);

#ifdef __cplusplus
}
#endif
