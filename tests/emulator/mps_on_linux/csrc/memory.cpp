#include "memory.h"

#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace emulator {
namespace {

constexpr size_t page = 4096;
constexpr size_t alignment = 64;                   // the CPU allocator's: matrix products round by it
constexpr size_t span = size_t{1} << 38;           // of address space, on each side
constexpr size_t max_cached = size_t{256} << 20;   // freed memory that stays resident

constexpr size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Pages of a block for `size` bytes: three significant bits, so that blocks are reused among similar sizes.
size_t pages_for(size_t size) {
  const size_t pages = (size + page - 1) / page;
  const size_t width = std::bit_width(pages);
  return width <= 3 ? pages : round_up(pages, size_t{1} << (width - 3));
}

class Arena {
 public:
  Arena() {
    void* memory = mmap(nullptr, 2 * span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "mps emulator: no address space for device memory");
    host_ = static_cast<std::byte*>(memory) + span;
  }

  BlockPtr allocate(size_t size) {
    const std::lock_guard lock(mutex_);
    const size_t pages = pages_for(size);
    std::byte* end = take(pages) + pages * page;
    ++use.allocations, ++use.live_buffers, use.live_bytes += size;
    use.peak_bytes = std::max(use.peak_bytes, use.live_bytes);
    auto block = c10::make_intrusive<Block>(size, pages, end - round_up(size, alignment));
    live_.emplace(block->host, block.get());
    return block;
  }

    // The block that starts at an address of a tensor, or null.
  Block* find(const void* device_address) {
    const std::lock_guard lock(mutex_);
    const auto found = live_.find(static_cast<const std::byte*>(device_address) + span);
    return found == live_.end() ? nullptr : found->second;
  }

    // Memory that nobody owns is all 0xFF: a dangling reader sees NaN, and the next owner starts from it.
  void free(Block& block) {
    memset(block.host, 0xff, block.size);
    const std::lock_guard lock(mutex_);
    std::byte* begin = block.host + round_up(block.size, alignment) - block.pages * page;
    live_.erase(block.host);
    --use.live_buffers, use.live_bytes -= block.size, use.cached_bytes += block.pages * page;
    warm_[block.pages].push_back(begin);
    if (use.cached_bytes > max_cached) release();
  }

  void release_cached() {
    const std::lock_guard lock(mutex_);
    release();
  }

  MemoryUse use{};
  std::mutex mutex_;

 private:
  std::byte* take(size_t pages) {
    if (auto& blocks = warm_[pages]; !blocks.empty()) {
      std::byte* begin = blocks.back();
      blocks.pop_back();
      use.cached_bytes -= pages * page;
      return begin;
    }
    std::byte* begin;
    if (auto& blocks = cold_[pages]; !blocks.empty()) {
      begin = blocks.back();
      blocks.pop_back();
    } else {
      TORCH_CHECK_WITH(OutOfMemoryError, top_ + (pages + 1) * page <= span, "MPS backend out of memory (mps emulator)");
      begin = host_ + top_;
      const int refused = mprotect(begin, pages * page, PROT_READ | PROT_WRITE);
      TORCH_CHECK_WITH(OutOfMemoryError, !refused, "MPS backend out of memory (mps emulator)");
      top_ += (pages + 1) * page;
    }
    memset(begin, 0xff, pages * page);
    return begin;
  }

  void release() {
    for (auto& [pages, blocks] : warm_) {
      for (std::byte* begin : blocks) madvise(begin, pages * page, MADV_DONTNEED);
      auto& cold = cold_[pages];
      cold.insert(cold.end(), blocks.begin(), blocks.end());
      blocks.clear();
    }
    use.cached_bytes = 0;
  }

  std::byte* host_;
  size_t top_ = page;  // the first page is a guard
  std::map<size_t, std::vector<std::byte*>> warm_, cold_;  // begins of free blocks, by pages
  std::unordered_map<const std::byte*, Block*> live_;      // by their host address
};

Arena& arena() {
  static auto* instance = new Arena;  // outlives every tensor
  return *instance;
}

void release_block(void* block) { c10::raw::intrusive_ptr::decref(static_cast<Block*>(block)); }

c10::DataPtr own(BlockPtr block, c10::DeviceType side) {
  std::byte* data = side == c10::kCPU ? block->host : block->host - span;
  const c10::Device device(side, side == c10::kCPU ? -1 : 0);
  return {data, block.release(), release_block, device};
}

template <c10::DeviceType side>
struct BlockAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, c10::Device(side, side == c10::kCPU ? -1 : 0)};
    return own(emulator::allocate(size), side);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

template <c10::DeviceType side>
c10::Allocator* allocator() {
  static BlockAllocator<side> instance;
  return &instance;
}

c10::Storage storage_of(BlockPtr block, size_t size, c10::DeviceType side) {
  auto* memory = side == c10::kCPU ? host_allocator() : device_allocator();
  auto data = block ? own(std::move(block), side) : memory->allocate(0);
  return {c10::Storage::use_byte_size_t(), size, std::move(data), memory, /*resizable=*/true};
}

}  // namespace

Block::~Block() { arena().free(*this); }

BlockPtr allocate(size_t size) { return arena().allocate(size); }

BlockPtr share(Block& block) { return BlockPtr::reclaim_copy(&block); }

c10::Allocator* device_allocator() { return allocator<c10::kMPS>(); }
c10::Allocator* host_allocator() { return allocator<c10::kCPU>(); }

BlockPtr block_of(const c10::Storage& storage) {
  const c10::DataPtr& data = storage.data_ptr();
  if (!data) return {};
  if (data.get_deleter() == release_block) return share(*static_cast<Block*>(data.get_context()));
  Block* block = arena().find(data.get());  // the address of a buffer is one too: torch::from_blob, for one
  TORCH_CHECK(block, "mps emulator: this memory is not the device's");
  return share(*block);
}

c10::Storage host_alias(const c10::Storage& storage) {
  return storage_of(block_of(storage), storage.nbytes(), c10::kCPU);
}

void take_resized(const c10::Storage& alias, const c10::Storage& storage) {
  if (alias.data_ptr().get_context() == storage.data_ptr().get_context()) return;
  auto fresh = storage_of(block_of(alias), alias.nbytes(), c10::kMPS);
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh.unsafeGetStorageImpl()->mutable_data_ptr()));
  storage.set_nbytes(alias.nbytes());
}

MemoryUse memory_use() {
  const std::lock_guard lock(arena().mutex_);
  return arena().use;
}

void reset_memory_counts() {
  const std::lock_guard lock(arena().mutex_);
  arena().use.allocations = 0;
  arena().use.peak_bytes = arena().use.live_bytes;
}

void release_cached_memory() { arena().release_cached(); }

}  // namespace emulator
