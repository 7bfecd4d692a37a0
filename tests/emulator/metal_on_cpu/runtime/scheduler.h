// The running dispatch, as the scheduler and the instrumentation's callbacks share it.
#pragma once

#include "chain.h"
#include "constants.h"
#include "executor.h"
#include "memory.h"

// Barriers order one address space each; every space counts its own time (see Cell).
struct Clock {
  uint32_t epoch, first_epoch;  // first_epoch: the running threadgroup's
};

struct Dispatch {
  const ExecutorDispatch* request;
  ExecutorReport* report;
  DeviceMemory device;
  ThreadgroupMemory threadgroup;
  Chain chain;
  Constants constants;              // trace: of the kernel's library
  Clock device_clock, threadgroup_clock;
  uint32_t group[3];
  uint32_t* first_epochs;           // trace: device_clock.first_epoch of each threadgroup run so far, ascending,
  uint32_t* first_epoch_groups;     // and which threadgroup that was
  uint32_t groups_started;
    // The running thread:
  const ExecutorThread* thread;     // null while the scheduler itself runs
  uint32_t thread_index, simdgroup;
  uint16_t device_step[32], threadgroup_step[32];  // by simdgroup
};

extern Dispatch running;
extern void* scheduler_stack_pointer;

// A new finding of this kind at this place, or null where the same was reported before or no room is left.
ExecutorFinding* report_finding(ExecutorKind kind, const void* pc);

// Ends the dispatch from inside a thread; its stack is abandoned.
[[noreturn]] void abandon_dispatch();
