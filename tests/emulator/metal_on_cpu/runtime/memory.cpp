#include "memory.h"

#include <algorithm>
#include <cstring>
#include <sys/mman.h>

namespace {

// As far as a 32-bit index of floats reaches. Findings name the nearest buffer where an access is close to it.
constexpr size_t guard_span = size_t{1} << 34, named_span = 1 << 20;

void* reserve(size_t size, int protection) {
  void* memory = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) __builtin_trap();
  return memory;
}

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Pages that hold a region: its end touches the guard behind it as far as the alignment of its start allows.
size_t pages_of(const Region& region) { return round_up(region.size + 16, page); }

}  // namespace

// Fills regions_ with one entry a stretch of host memory: overlapping buffers fall together.
size_t DeviceMemory::merge(const ExecutorDispatch& dispatch) {
  count_ = 0;
  for (uint32_t index = 0; index < executor_buffers; ++index) {
    const ExecutorBuffer& buffer = dispatch.buffers[index];
    if (buffer.space == executor_no_space) continue;
    const bool bound = buffer.binding != executor_unbound;
    regions_[count_++] = {
        nullptr,
        bound ? buffer.size : 0,
        bound ? buffer.data : nullptr,
        index,
        std::max(buffer.granule, 1u),
        buffer.space == executor_device,
        buffer.space == executor_constant,
        bound,
        nullptr};
  }
  for (bool merged = true; merged;) {
    merged = false;
    for (size_t i = 0; i < count_ && !merged; ++i) {
      for (size_t j = i + 1; j < count_ && !merged; ++j) {
        Region &a = regions_[i], &b = regions_[j];
        auto *a0 = static_cast<uint8_t*>(a.host), *b0 = static_cast<uint8_t*>(b.host);
        if (!a.bound || !b.bound || a0 + a.size <= b0 || b0 + b.size <= a0) continue;
        uint8_t* end = std::max(a0 + a.size, b0 + b.size);
        a.host = std::min(a0, b0);
        a.size = end - static_cast<uint8_t*>(a.host);
        a.granule = std::min(a.granule, b.granule);
        a.writable |= b.writable;
        a.constant &= b.constant;
        regions_[j] = regions_[--count_];
        merged = true;
      }
    }
  }
  return count_;
}

void DeviceMemory::open(const ExecutorDispatch& dispatch, void** addresses) {
  merge(dispatch);
  span_ = guard_span;
  size_t cells = 0;
  for (size_t i = 0; i < count_; ++i) {
    span_ += pages_of(regions_[i]) + guard_span;
    if (dispatch.trace && regions_[i].writable) cells += regions_[i].size / regions_[i].granule + 2;
  }
  base_ = reinterpret_cast<uintptr_t>(reserve(span_, PROT_NONE));
  pages_span_ = span_ / page + 1;
  regions_by_page_ = static_cast<uint8_t*>(reserve(pages_span_, PROT_READ | PROT_WRITE));
  cells_span_ = cells * sizeof(Cell);
  cells_ = cells ? static_cast<Cell*>(reserve(cells_span_, PROT_READ | PROT_WRITE)) : nullptr;

  Cell* next_cell = cells_;
  uintptr_t next = base_ + guard_span;
  for (size_t i = 0; i < count_; ++i) {
    Region& region = regions_[i];
    const size_t pages = pages_of(region);
    const size_t misalignment = reinterpret_cast<uintptr_t>(region.host) % 16;
    uintptr_t begin = next + pages - region.size;
    begin -= (begin - misalignment) % 16;
    region.begin = reinterpret_cast<uint8_t*>(begin);
    if (region.bound) {
      mprotect(reinterpret_cast<void*>(next), pages, PROT_READ | PROT_WRITE);
      memset(reinterpret_cast<void*>(next), 0xff, begin - next);
      memcpy(region.begin, region.host, region.size);
      memset(region.begin + region.size, 0xff, next + pages - begin - region.size);
      if (dispatch.trace && region.writable) {
        region.cells = next_cell;
        next_cell += region.size / region.granule + 2;
      }
    }
    memset(regions_by_page_ + (next - base_ - named_span) / page, int(i + 1), (pages + 2 * named_span) / page);
    next += pages + guard_span;
  }
  for (uint32_t index = 0; index < executor_buffers; ++index) {
    const ExecutorBuffer& buffer = dispatch.buffers[index];
    addresses[index] = nullptr;
    for (size_t i = 0; i < count_ && buffer.space != executor_no_space; ++i) {
      const Region& region = regions_[i];
      const auto offset = static_cast<uint8_t*>(buffer.data) - static_cast<uint8_t*>(region.host);
      if (buffer.binding == executor_unbound ? region.index == index
                                             : region.bound && offset >= 0 && offset + buffer.size <= region.size) {
        addresses[index] = region.begin + (region.bound ? offset : 0);
      }
    }
  }
}

void DeviceMemory::close() {
  for (size_t i = 0; i < count_; ++i) {
    if (regions_[i].bound && regions_[i].writable) memcpy(regions_[i].host, regions_[i].begin, regions_[i].size);
  }
  munmap(reinterpret_cast<void*>(base_), span_);
  munmap(regions_by_page_, pages_span_);
  if (cells_) munmap(cells_, cells_span_);
  span_ = 0;
  cells_ = nullptr;
}

void ThreadgroupMemory::open(bool trace) {
  if (!base_) {
    base_ = reinterpret_cast<uintptr_t>(reserve(capacity + 2 * guard, PROT_NONE)) + guard;
    mprotect(reinterpret_cast<void*>(base_), capacity, PROT_READ | PROT_WRITE);
    memset(reinterpret_cast<void*>(base_), 0xff, capacity);
    variable_by_byte_ = static_cast<uint8_t*>(reserve(capacity, PROT_READ | PROT_WRITE));
    cells_ = static_cast<Cell*>(reserve(capacity * sizeof(Cell), PROT_READ | PROT_WRITE));
  }
  for (size_t i = 0; i < count_; ++i) {
    const size_t begin = reinterpret_cast<uintptr_t>(variables_[i].begin) - base_;
    memset(variable_by_byte_ + begin, 0, variables_[i].size);
    memset(cells_ + begin, 0, variables_[i].size * sizeof(Cell));
  }
  poison();
  red_zone_ = trace ? red_zone : 0;
  top_ = red_zone_;
  bytes_ = count_ = 0;
}

void ThreadgroupMemory::poison() {
  for (size_t i = 0; i < count_; ++i) memset(variables_[i].begin, 0xff, variables_[i].size);
}

void* ThreadgroupMemory::variable(uint32_t site, size_t size, size_t alignment) {
  for (size_t i = 0; i < count_; ++i) {
    if (variables_[i].site == site) return variables_[i].begin;
  }
  const size_t begin = round_up(top_, std::max(alignment, size_t{16}));
  if (count_ == executor_max_variables || begin + size + red_zone_ > capacity) {
    bytes_ += size;
    return nullptr;
  }
  bytes_ = round_up(bytes_, alignment) + size;
  top_ = begin + size + red_zone_;
  variables_[count_] = {site, reinterpret_cast<uint8_t*>(base_ + begin), size};
  memset(variable_by_byte_ + begin, int(++count_), size);
  return reinterpret_cast<void*>(base_ + begin);
}

const Variable* ThreadgroupMemory::nearest(uintptr_t address) const {
  const Variable* best = nullptr;
  uintptr_t best_distance = ~uintptr_t{0};
  for (size_t i = 0; i < count_; ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(variables_[i].begin), end = begin + variables_[i].size;
    const uintptr_t distance = address < begin ? begin - address : address >= end ? address - end : 0;
    if (distance < best_distance) best = &variables_[i], best_distance = distance;
  }
  return best;
}
