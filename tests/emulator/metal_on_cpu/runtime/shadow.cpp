// Trace mode: what the instrumentation of a kernel calls before each load and store (clang's outlined address sanitizer
// checks, with this file in the place of its runtime), and the races, overruns and uninitialised reads it finds.
#include <algorithm>
#include <cstring>

#include "scheduler.h"

namespace {

enum class Access { load, store };

struct Where {
  const void* pc;
  ExecutorObject object;
  uint32_t index;
  int64_t offset;
  uint64_t size, object_size;
  Access access;
  const char* name = nullptr;
};

// An indexed array, as clang's bounds sanitizer describes it.
struct ArrayType {
  uint16_t kind, info;
  char name[];
};
struct IndexedArray {
  const char* file;
  uint32_t line, column;
  const ArrayType* type;
};

ExecutorFinding* report_at(ExecutorKind kind, const Where& where) {
  auto* finding = report_finding(kind, where.pc);
  if (!finding) return nullptr;
  finding->object = where.object;
  finding->index = where.index;
  finding->offset = where.offset;
  finding->size = where.size;
  finding->object_size = where.object_size;
  finding->store = where.access == Access::store;
  finding->name = where.name;
  return finding;
}

void report_race(const Where& where, uint16_t other, bool other_store) {
  if (auto* finding = report_at(executor_race, where)) {
    finding->other_thread = other & thread_mask;
    finding->other_store = other_store;
  }
}

void report_group_race(const Where& where, uint32_t other_epoch, bool other_store) {
  if (auto* finding = report_at(executor_group_race, where)) {
    const uint32_t *begin = running.first_epochs, *end = begin + running.groups_started;
    const auto position = std::upper_bound(begin, end, other_epoch) - begin - 1;
    finding->other_group = running.first_epoch_groups[position];
    finding->other_store = other_store;
  }
}

struct Now {
  uint32_t epoch, first_epoch;
  uint16_t step, thread;

  // Whether a barrier lies between an access of this threadgroup and now.
  bool after(uint32_t other_epoch, uint16_t other_step, uint16_t other_thread) const {
    if (other_epoch < epoch) return true;
    return (other_thread & thread_mask) / executor_simd_width == thread / executor_simd_width && other_step < step;
  }
};

void load(Cell& cell, const Now& now, const Where& where) {
  const bool threadgroup = where.object == executor_threadgroup_object;
  if (cell.write_epoch < now.first_epoch) {
    if (threadgroup) {
      report_at(executor_uninitialised, where);
    } else if (cell.write_epoch) {
      report_group_race(where, cell.write_epoch, true);
    }
  } else if (cell.writer != now.thread && !now.after(cell.write_epoch, cell.write_step, cell.writer)) {
    report_race(where, cell.writer, true);
  }

  const uint16_t elsewhere =
      (cell.reader & read_elsewhere) | (cell.read_epoch && cell.read_epoch < now.first_epoch ? read_elsewhere : 0);
  uint16_t reader = now.thread;
  if (cell.read_epoch == now.epoch && !(cell.reader & read_by_many)) {
    const uint16_t previous = cell.reader & thread_mask;
    if (previous / executor_simd_width != now.thread / executor_simd_width) {
      reader |= read_by_many;
    } else if (cell.read_step == now.step && (previous != now.thread || cell.reader & read_by_lanes)) {
      reader |= read_by_lanes;
    }
  } else if (cell.read_epoch == now.epoch) {
    reader |= read_by_many;
  }
  cell.reader = reader | elsewhere;
  cell.read_epoch = now.epoch;
  cell.read_step = now.step;
}

void store(Cell& cell, const Now& now, const Where& where) {
  const bool device = where.object == executor_buffer_object;
  if (cell.write_epoch >= now.first_epoch) {
    if (cell.writer != now.thread && !now.after(cell.write_epoch, cell.write_step, cell.writer)) {
      report_race(where, cell.writer, true);
    }
  } else if (device && cell.write_epoch) {
    report_group_race(where, cell.write_epoch, true);
  }
  if (device && cell.read_epoch && (cell.reader & read_elsewhere || cell.read_epoch < now.first_epoch)) {
    report_group_race(where, cell.read_epoch < now.first_epoch ? cell.read_epoch : 1, false);
  }
  if (cell.read_epoch >= now.first_epoch) {
    const bool only_self = (cell.reader & ~read_elsewhere) == now.thread;
    if (!only_self &&
        (cell.reader & read_by_many ? cell.read_epoch == now.epoch
                                    : !now.after(cell.read_epoch, cell.read_step, cell.reader))) {
      report_race(where, cell.reader, false);
    }
  }
  cell = {
      .write_epoch = now.epoch,
      .read_epoch = 0,
      .writer = now.thread,
      .reader = 0,
      .write_step = now.step,
      .read_step = 0};
}

void check(Cell* cell, size_t count, const Now& now, const Where& where) {
  for (size_t i = 0; i < count; ++i) {
    where.access == Access::load ? load(cell[i], now, where) : store(cell[i], now, where);
  }
}

[[noreturn]] void out_of_bounds(const Where& where) {
  report_at(executor_out_of_bounds, where);
  abandon_dispatch();
}

void check_device(uintptr_t address, size_t size, Access access, const void* pc) {
  Region* region = running.device.at(address);
  Where where = {pc, executor_nothing, ~0u, 0, size, 0, access};
  if (!region) out_of_bounds(where);
  where.object = executor_buffer_object;
  where.index = region->index;
  where.offset = int64_t(address) - int64_t(reinterpret_cast<uintptr_t>(region->begin));
  where.object_size = region->size;
  const bool inside = where.offset >= 0 && where.offset + size <= region->size;
  if (!inside || !region->bound || (access == Access::store && !region->writable)) out_of_bounds(where);
  ExecutorReport& report = *running.report;
  (region->constant ? report.constant_loaded
                    : (access == Access::load ? report.loaded : report.stored)[region->index]) += size;
  if (access == Access::load && !region->constant && running.thread_index % executor_simd_width == 0) {
    running.chain.load(running.simdgroup, pc);
  }
  if (!region->cells) return;
  const size_t first = where.offset / region->granule, last = (where.offset + size - 1) / region->granule;
  const Clock& clock = running.device_clock;
  check(
      region->cells + first, last - first + 1,
      {clock.epoch, clock.first_epoch, running.device_step[running.simdgroup], uint16_t(running.thread_index)}, where);
}

void check_threadgroup(uintptr_t address, size_t size, Access access, const void* pc) {
  const Variable* variable = running.threadgroup.at(address);
  const bool inside = variable && running.threadgroup.at(address + size - 1) == variable;
  if (!variable) variable = running.threadgroup.nearest(address);
  Where where = {pc, executor_threadgroup_object, ~0u, 0, size, 0, access};
  if (variable) {
    where.index = variable->site;
    where.offset = int64_t(address) - int64_t(reinterpret_cast<uintptr_t>(variable->begin));
    where.object_size = variable->size;
  }
  if (!inside) out_of_bounds(where);
  running.report->threadgroup_accessed += size;
  const Clock& clock = running.threadgroup_clock;
  check(
      running.threadgroup.cells(address), size,
      {clock.epoch, clock.first_epoch, running.threadgroup_step[running.simdgroup], uint16_t(running.thread_index)},
      where);
}

void check_constant(uintptr_t address, size_t size, Access access, const void* pc) {
  const Constant* constant = running.constants.at(address);
  if (constant && address + size <= constant->begin + constant->size) return;
  Where where = {pc, executor_nothing, ~0u, 0, size, 0, access};
  if (constant) {
    where.object = executor_constant_object;
    where.offset = int64_t(address - constant->begin);
    where.object_size = constant->size;
    where.name = constant->name;
  }
  out_of_bounds(where);
}

// Anything else is private to a thread.
inline void check_access(uintptr_t address, size_t size, Access access, const void* pc) {
  if (!running.thread || !size) return;
  if (running.threadgroup.contains(address)) {
    check_threadgroup(address, size, access, pc);
  } else if (running.device.contains(address)) {
    check_device(address, size, access, pc);
  } else if (running.constants.contains(address)) {
    check_constant(address, size, access, pc);
  }
}

}  // namespace

extern "C" {

#define CALLBACKS(bytes)                                                      \
  void __asan_load##bytes##_noabort(uintptr_t address) {                      \
    check_access(address, bytes, Access::load, __builtin_return_address(0));  \
  }                                                                           \
  void __asan_store##bytes##_noabort(uintptr_t address) {                     \
    check_access(address, bytes, Access::store, __builtin_return_address(0)); \
  }
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
#undef CALLBACKS

void __asan_loadN_noabort(uintptr_t address, size_t size) {
  check_access(address, size, Access::load, __builtin_return_address(0));
}

void __asan_storeN_noabort(uintptr_t address, size_t size) {
  check_access(address, size, Access::store, __builtin_return_address(0));
}

void* __asan_memcpy(void* to, const void* from, size_t size) {
  check_access(reinterpret_cast<uintptr_t>(from), size, Access::load, __builtin_return_address(0));
  check_access(reinterpret_cast<uintptr_t>(to), size, Access::store, __builtin_return_address(0));
  return memcpy(to, from, size);
}

void* __asan_memmove(void* to, const void* from, size_t size) {
  check_access(reinterpret_cast<uintptr_t>(from), size, Access::load, __builtin_return_address(0));
  check_access(reinterpret_cast<uintptr_t>(to), size, Access::store, __builtin_return_address(0));
  return memmove(to, from, size);
}

void* __asan_memset(void* to, int value, size_t size) {
  check_access(reinterpret_cast<uintptr_t>(to), size, Access::store, __builtin_return_address(0));
  return memset(to, value, size);
}

// A noreturn call would unpoison the stack; there is no shadow of it here.
void __asan_handle_no_return() {}

// An index that its array's type does not have, wherever the array lies: a row of a tile, an array of one thread.
void __ubsan_handle_out_of_bounds(const IndexedArray* array, uintptr_t index) {
  const char* name = array->type->name;
  out_of_bounds({__builtin_return_address(0), executor_array_object, ~0u, int64_t(index), 0, 0, Access::load, name});
}

// The shim's atomic operations: bounds only, no races.
void executor_atomic(void* object, uint64_t size) {
  const auto address = reinterpret_cast<uintptr_t>(object);
  if (!running.request->trace || !running.device.contains(address)) return;
  Region* region = running.device.at(address);
  Where where = {
      __builtin_return_address(0), executor_buffer_object, region ? region->index : ~0u, 0, size, 0, Access::store};
  if (!region || !region->bound || address + size > reinterpret_cast<uintptr_t>(region->begin) + region->size)
    out_of_bounds(where);
  running.report->loaded[region->index] += size;
  running.report->stored[region->index] += size;
}

}  // extern "C"
