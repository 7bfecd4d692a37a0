// The memory that a dispatch sees: device buffers between guard pages, and one threadgroup's variables between red
// zones.
#pragma once

#include <cstddef>
#include <cstdint>

#include "executor.h"

// A race is looked for per granule: who wrote and who read it last, and when. "When" is an epoch, which a barrier of
// the whole threadgroup advances, and a step within it, which a simdgroup_barrier advances for its simdgroup. Epochs
// never repeat in a dispatch, so an epoch before a threadgroup's first one belongs to an earlier threadgroup.
struct Cell {
  uint32_t write_epoch, read_epoch;
  uint16_t writer, reader;  // reader: a thread index and the flags below
  uint16_t write_step, read_step;
};

enum : uint16_t {
  thread_mask = 0x3ff,
  read_by_lanes = 0x400,  // also by other lanes of the reader's simdgroup, at read_step
  read_by_many = 0x800,  // by more than one simdgroup in read_epoch
  read_elsewhere = 0x1000,  // by an earlier threadgroup
};

constexpr size_t page = 4096;

// A stretch of host memory and its guarded copy. Bound buffers that overlap share one.
struct Region {
  uint8_t* begin;
  size_t size;
  void* host;
  uint32_t index;  // the lowest buffer index bound to it
  uint32_t granule;
  bool writable, constant, bound;
  Cell* cells;  // trace, and only where a store is possible
};

class DeviceMemory {
 public:
  // Copies the bound buffers in and fills addresses[index]; unbound buffers get an inaccessible address.
  void open(const ExecutorDispatch& dispatch, void** addresses);
  void close();  // copies stores back, unmaps
  bool contains(uintptr_t address) const { return address - base_ < span_; }
  Region* at(uintptr_t address) {
    const uint8_t index = regions_by_page_[(address - base_) / page];
    return index ? &regions_[index - 1] : nullptr;
  }

 private:
  size_t merge(const ExecutorDispatch& dispatch);

  uintptr_t base_ = 0;
  size_t span_ = 0, cells_span_ = 0, pages_span_ = 0;
  uint8_t* regions_by_page_ = nullptr;
  Cell* cells_ = nullptr;
  size_t count_ = 0;
  Region regions_[executor_buffers];
};

struct Variable {
  uint32_t site;
  uint8_t* begin;
  size_t size;
};

class ThreadgroupMemory {
 public:
  void open(bool trace);
  void poison();  // fresh memory for the next threadgroup: NaN
  void* variable(uint32_t site, size_t size, size_t alignment);  // null where no room is left
  bool contains(uintptr_t address) const { return address - (base_ - guard) < capacity + 2 * guard; }
  // The variable that holds an address, or null: then it is in a red zone.
  const Variable* at(uintptr_t address) const {
    if (address - base_ >= capacity) return nullptr;
    const uint8_t index = variable_by_byte_[address - base_];
    return index ? &variables_[index - 1] : nullptr;
  }
  const Variable* nearest(uintptr_t address) const;
  Cell* cells(uintptr_t address) { return cells_ + (address - base_); }
  size_t bytes() const { return bytes_; }  // as Metal counts them

 private:
  // A red zone is as large as all of a threadgroup's memory: no overrun within that reaches another variable.
  static constexpr size_t red_zone = 32 * 1024, capacity = 4 << 20, guard = size_t{1} << 34;
  uintptr_t base_ = 0;
  size_t top_ = 0, bytes_ = 0, count_ = 0, red_zone_ = 0;
  uint8_t* variable_by_byte_ = nullptr;
  Cell* cells_ = nullptr;  // one a byte
  Variable variables_[executor_max_variables];
};
