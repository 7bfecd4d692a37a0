// Runs a dispatch: one fiber a thread. The lanes of a simdgroup run one after the other until each waits; when all wait
// at the same operation of the same source position, it is completed and they go on. A simdgroup runs until its lanes
// wait at a threadgroup barrier or end; then the next simdgroup has its turn.
#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <utility>

#include "fault.h"
#include "fiber.h"

Dispatch running;
void* scheduler_stack_pointer;

namespace {

constexpr uint32_t max_threads = 1024;
constexpr size_t max_threadgroup_bytes = 32 * 1024;
constexpr size_t stack_size = 128 * 1024;  // the lowest page is a guard

enum class Wait : uint8_t { none, collective, simdgroup_barrier, barrier, end };

using Complete = void (*)(void** frames);

struct Fiber {
  void* stack_pointer;
  Wait wait;
  uint8_t flags;  // of a barrier
  bool is_matrix_multiply;
  const void* pc;  // where it waits
  Complete complete;
  void* frame;
  ExecutorThread thread;
};

Fiber fibers[max_threads];
uint32_t lane_order[32], simdgroup_order[32];
uint8_t* stacks;

// The lanes of the pass that is under way.
uint32_t pass_base, pass_size, pass_position;

uint32_t linear(const uint32_t position[3], const uint32_t extent[3]) {
  return position[0] + extent[0] * (position[1] + extent[1] * position[2]);
}

void set_running(uint32_t index) {
  running.thread = &fibers[index].thread;
  running.thread_index = index;
  running.simdgroup = index / executor_simd_width;
}

// The next lane of the pass that exists (the last simdgroup may be partial), or none.
bool next_lane(uint32_t* index) {
  while (pass_position < executor_simd_width) {
    const uint32_t lane = lane_order[pass_position++];
    if (lane < pass_size) {
      *index = pass_base + lane;
      return true;
    }
  }
  return false;
}

void suspend(Fiber& fiber) {
  uint32_t next;
  if (next_lane(&next)) {
    set_running(next);
    fiber_switch(&fiber.stack_pointer, fibers[next].stack_pointer);
  } else {
    running.thread = nullptr;
    fiber_switch(&fiber.stack_pointer, scheduler_stack_pointer);
  }
}

void wait(
    Wait operation,
    const void* pc,
    uint32_t flags = 0,
    Complete complete = nullptr,
    void* frame = nullptr,
    bool is_matrix_multiply = false) {
  Fiber& fiber = fibers[running.thread_index];
  fiber.wait = operation;
  fiber.pc = pc;
  fiber.flags = uint8_t(flags);
  fiber.complete = complete;
  fiber.frame = frame;
  fiber.is_matrix_multiply = is_matrix_multiply;
  suspend(fiber);
}

[[noreturn]] void run_thread() {
  running.request->launch(running.thread);
  wait(Wait::end, nullptr);
  __builtin_trap();
}

bool same_wait(const Fiber& a, const Fiber& b) {
  return a.wait == b.wait && a.pc == b.pc && a.flags == b.flags && a.complete == b.complete;
}

// One thread waits where another does not: each operation that one of them waits at is a finding.
void report_divergence(const Fiber& a, const Fiber& b) {
  for (const auto& [waiting, other] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
    if (waiting->wait == Wait::end) continue;
    running.thread = &waiting->thread;
    const auto kind = waiting->wait == Wait::collective ? executor_divergent_simd : executor_divergent_barrier;
    if (auto* finding = report_finding(kind, waiting->pc)) finding->other_thread = uint32_t(other - fibers);
  }
  running.thread = nullptr;
}

void advance(Clock& clock, uint16_t* steps) {
  ++clock.epoch;
  memset(steps, 0, sizeof running.device_step);
}

void complete_collective(uint32_t base, uint32_t size) {
  void* frames[executor_simd_width] = {};
  for (uint32_t lane = 0; lane < size; ++lane) frames[lane] = fibers[base + lane].frame;
  fibers[base].complete(frames);
  running.report->matrix_multiplies += fibers[base].is_matrix_multiply;
  running.chain.collective(base / executor_simd_width, fibers[base].is_matrix_multiply);
}

// Runs a simdgroup until its lanes wait at a threadgroup barrier or have ended. False: the lanes diverged.
bool run_simdgroup(uint32_t simdgroup, uint32_t threads) {
  const uint32_t base = simdgroup * executor_simd_width;
  const uint32_t size = std::min<uint32_t>(executor_simd_width, threads - base);
  for (;;) {
    pass_base = base, pass_size = size, pass_position = 0;
    uint32_t first;
    next_lane(&first);
    set_running(first);
    fiber_switch(&scheduler_stack_pointer, fibers[first].stack_pointer);
    if (running.report->complete == 0) return false;  // abandoned

    for (uint32_t lane = 1; lane < size; ++lane) {
      if (!same_wait(fibers[base], fibers[base + lane])) {
        report_divergence(fibers[base], fibers[base + lane]);
        return false;
      }
    }
    switch (fibers[base].wait) {
      case Wait::collective: complete_collective(base, size); break;
      case Wait::simdgroup_barrier:
        ++running.report->simdgroup_barriers;
        if (fibers[base].flags & 1) ++running.device_step[simdgroup];
        if (fibers[base].flags & 2) ++running.threadgroup_step[simdgroup];
        break;
      default: return true;
    }
  }
}

bool run_threadgroup(uint32_t threads) {
  const uint32_t simdgroups = (threads + executor_simd_width - 1) / executor_simd_width;
  for (;;) {
    for (uint32_t i = 0, done = 0; done < simdgroups; ++i) {
      if (simdgroup_order[i] >= simdgroups) continue;
      if (!run_simdgroup(simdgroup_order[i], threads)) return false;
      ++done;
    }
    for (uint32_t simdgroup = 1; simdgroup < simdgroups; ++simdgroup) {
      const Fiber& fiber = fibers[simdgroup * executor_simd_width];
      if (!same_wait(fibers[0], fiber)) {
        report_divergence(fibers[0], fiber);
        return false;
      }
    }
    running.chain.barrier();
    if (fibers[0].wait == Wait::end) return true;
    ++running.report->barriers;
    if (fibers[0].flags & 1) advance(running.device_clock, running.device_step);
    if (fibers[0].flags & 2) advance(running.threadgroup_clock, running.threadgroup_step);
  }
}

void set_order(uint32_t order) {
  for (uint32_t i = 0; i < 32; ++i) {
    const uint32_t position = order == executor_forward ? i : order == executor_reverse ? 31 - i : (i * 13 + 7) % 32;
    lane_order[i] = simdgroup_order[i] = position;
  }
}

uint32_t ordered_group(uint32_t i, uint32_t count, uint32_t order) {
  if (order == executor_forward) return i;
  if (order == executor_reverse) return count - 1 - i;
  const uint32_t half = (count + 1) / 2;  // permuted: the two halves interleaved, from the back
  return count - 1 - (i < half ? 2 * i : 2 * (i - half) + 1);
}

void start_threadgroup(const uint32_t group[3], const uint32_t groups[3], const void* const* buffers) {
  const ExecutorDispatch& request = *running.request;
  uint32_t extent[3];  // a threadgroup at the grid's edge may be smaller
  for (int d = 0; d < 3; ++d) {
    running.group[d] = group[d];
    extent[d] = std::min(request.group[d], request.threads[d] - group[d] * request.group[d]);
  }
  const uint32_t threads = extent[0] * extent[1] * extent[2];
  const uint32_t full = request.group[0] * request.group[1] * request.group[2];
  for (uint32_t index = 0; index < threads; ++index) {
    Fiber& fiber = fibers[index];
    const uint32_t position[3] = {index % extent[0], index / extent[0] % extent[1], index / extent[0] / extent[1]};
    memcpy(fiber.thread.buffers, buffers, sizeof fiber.thread.buffers);
    auto set = [&](ExecutorId id, auto value) { fiber.thread.ids[id - executor_first_id] = uint32_t(value); };
    for (int d = 0; d < 3; ++d) {
      set(ExecutorId(thread_position_in_threadgroup + d), position[d]);
      set(ExecutorId(thread_position_in_grid + d), group[d] * request.group[d] + position[d]);
      set(ExecutorId(threadgroup_position_in_grid + d), group[d]);
      set(ExecutorId(threads_per_threadgroup + d), extent[d]);
      set(ExecutorId(dispatch_threads_per_threadgroup + d), request.group[d]);
      set(ExecutorId(threadgroups_per_grid + d), groups[d]);
      set(ExecutorId(threads_per_grid + d), request.threads[d]);
    }
    set(thread_index_in_threadgroup, index);
    set(simdgroup_index_in_threadgroup, index / executor_simd_width);
    set(thread_index_in_simdgroup, index % executor_simd_width);
    set(simdgroups_per_threadgroup, (threads + executor_simd_width - 1) / executor_simd_width);
    set(dispatch_simdgroups_per_threadgroup, (full + executor_simd_width - 1) / executor_simd_width);
    set(threads_per_simdgroup, executor_simd_width);
    set(thread_execution_width, executor_simd_width);
    fiber.wait = Wait::none;
    fiber.stack_pointer = fiber_prepare(stacks + (index + 1) * stack_size, run_thread);
  }
}

bool run_grid(void* const* buffers) {
  const ExecutorDispatch& request = *running.request;
  uint32_t groups[3];
  for (int d = 0; d < 3; ++d) groups[d] = (request.threads[d] + request.group[d] - 1) / request.group[d];
  const uint32_t count = groups[0] * groups[1] * groups[2];
  const uint32_t running_count = request.most_groups ? std::min(count, request.most_groups) : count;
  for (uint32_t i = 0; i < running_count; ++i) {
    const uint32_t index = ordered_group(i, count, request.order);
    const uint32_t group[3] = {index % groups[0], index / groups[0] % groups[1], index / groups[0] / groups[1]};
    running.threadgroup.poison();
    start_threadgroup(group, groups, buffers);
    advance(running.device_clock, running.device_step);
    advance(running.threadgroup_clock, running.threadgroup_step);
    running.device_clock.first_epoch = running.device_clock.epoch;
    running.threadgroup_clock.first_epoch = running.threadgroup_clock.epoch;
    if (running.first_epochs) {
      running.first_epochs[i] = running.device_clock.epoch;
      running.first_epoch_groups[i] = index;
    }
    running.groups_started = i + 1;
    running.chain.start_threadgroup();
    const ExecutorThread& first = fibers[0].thread;
    uint32_t threads = 1;
    for (int d = 0; d < 3; ++d) threads *= first.ids[threads_per_threadgroup + d - executor_first_id];
    if (!run_threadgroup(threads)) return false;
    ExecutorReport& report = *running.report;
    ++report.threadgroups;
    report.longest_steps = std::max(report.longest_steps, running.chain.steps);
    report.longest_multiplies = std::max(report.longest_multiplies, running.chain.multiplies());
    report.longest_collectives = std::max(report.longest_collectives, running.chain.collectives());
  }
  return true;
}

void map_stacks() {
  if (stacks) return;
  void* memory = mmap(
      nullptr, max_threads * stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) __builtin_trap();
  stacks = static_cast<uint8_t*>(memory);
  for (uint32_t i = 0; i < max_threads; ++i) mprotect(stacks + i * stack_size, page, PROT_NONE);
}

pthread_mutex_t one_dispatch = PTHREAD_MUTEX_INITIALIZER;  // std::mutex would need the C++ library at run time

}  // namespace

ExecutorFinding* report_finding(ExecutorKind kind, const void* pc) {
  ExecutorReport& report = *running.report;
  Dl_info library = {};
  if (pc) dladdr(pc, &library);
  // Minus one: a return address may already belong to the next line.
  const uint64_t relative = pc ? static_cast<const uint8_t*>(pc) - static_cast<uint8_t*>(library.dli_fbase) - 1 : 0;
  for (uint32_t i = 0; i < report.finding_count; ++i) {
    if (report.findings[i].kind == kind && report.findings[i].pc == relative) return nullptr;
  }
  if (report.finding_count == executor_max_findings) return nullptr;
  ExecutorFinding& finding = report.findings[report.finding_count++];
  finding = {};
  finding.kind = kind;
  finding.index = ~0u;
  finding.pc = relative;
  for (int d = 0; d < 3; ++d) {
    finding.group[d] = running.group[d];
    if (running.thread) finding.thread[d] = running.thread->ids[thread_position_in_threadgroup - executor_first_id + d];
  }
  return &finding;
}

[[noreturn]] void abandon_dispatch() {
  running.thread = nullptr;
  running.report->complete = 0;
  fiber_jump(scheduler_stack_pointer);
}

extern "C" {

// The shim's side of the runtime: declared in shim/executor.h.

void executor_barrier(uint32_t flags) { wait(Wait::barrier, __builtin_return_address(0), flags); }

void executor_simdgroup_barrier(uint32_t flags) { wait(Wait::simdgroup_barrier, __builtin_return_address(0), flags); }

void executor_collective(Complete complete, void* frame, bool is_matrix_multiply) {
  wait(Wait::collective, __builtin_return_address(0), 0, complete, frame, is_matrix_multiply);
}

uint32_t executor_lane() { return running.thread_index % executor_simd_width; }

void executor_pointers_differ() {
  if (auto* finding = report_finding(executor_divergent_simd, fibers[pass_base].pc)) finding->other_thread = pass_base;
}

void* executor_threadgroup_variable(uint32_t site, uint64_t size, uint64_t alignment) {
  void* variable = running.threadgroup.variable(site, size, alignment);
  if (variable && running.threadgroup.bytes() <= max_threadgroup_bytes) return variable;
  if (auto* finding = report_finding(executor_limit, __builtin_return_address(0))) {
    finding->object = executor_threadgroup_object;
    finding->index = site;
    finding->size = running.threadgroup.bytes();
  }
  abandon_dispatch();
}

void executor_dispatch(const ExecutorDispatch* dispatch, ExecutorReport* report) {
  pthread_mutex_lock(&one_dispatch);
  map_stacks();
  *report = {};
  report->complete = 1;
  running.request = dispatch;
  running.report = report;
  running.thread = nullptr;
  running.device_clock = running.threadgroup_clock = {};
  running.groups_started = 0;
  set_order(dispatch->order);
  uint64_t groups = 1;
  for (int d = 0; d < 3; ++d) groups *= (dispatch->threads[d] + dispatch->group[d] - 1) / dispatch->group[d];
  const size_t epochs_span = groups * 2 * sizeof(uint32_t);
  if (dispatch->trace) {
    running.first_epochs = static_cast<uint32_t*>(
        mmap(nullptr, epochs_span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    running.first_epoch_groups = running.first_epochs + groups;
  }
  void* buffers[executor_buffers];
  running.device.open(*dispatch, buffers);
  running.threadgroup.open(dispatch->trace);
  running.constants = constants_of(reinterpret_cast<const void*>(dispatch->launch));
  {
    const FaultHandler handler;
    report->complete = run_grid(buffers);
  }
  report->threadgroup_bytes = running.threadgroup.bytes();
  running.device.close();
  if (running.first_epochs) munmap(running.first_epochs, epochs_span);
  running.first_epochs = nullptr;
  pthread_mutex_unlock(&one_dispatch);
}

// Conversions that LLVM leaves to the compiler's runtime library.
__bf16 __truncsfbf2(float value) {
  auto bits = __builtin_bit_cast(uint32_t, value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  bits = nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);  // round to nearest, ties to even
  return __builtin_bit_cast(__bf16, uint16_t(bits >> 16));
}

}  // extern "C"
