// Device memory. A tensor on "mps" has an address that nothing may touch, as the data pointer of a real one is no host
// address either; its bytes lie at a fixed distance from there, where only the queue's commands go.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <c10/util/intrusive_ptr.h>

#include <cstddef>

namespace emulator {

// One buffer. Its last byte lies right before a guard page (up to alignment), and it holds 0xFF until written: NaN.
// Tensors and queued commands share its ownership.
struct Block final : c10::intrusive_ptr_target {
  Block(size_t size, size_t pages, std::byte* host) : size(size), pages(pages), host(host) {}
  ~Block() override;

  const size_t size, pages;
  std::byte* const host;
};

using BlockPtr = c10::intrusive_ptr<Block>;

BlockPtr allocate(size_t size);
BlockPtr share(Block& block);

c10::Allocator* device_allocator();
c10::Allocator* host_allocator();  // the same memory by its host addresses, for CPU tensors that stand in for mps ones

// The block behind a storage on mps, or null for an empty one.
BlockPtr block_of(const c10::Storage& storage);

// A CPU storage over the memory of a storage on mps. Making one touches no byte.
c10::Storage host_alias(const c10::Storage& storage);

// The reverse: moves what a host alias has become (an operator may have resized it) into the storage on mps.
void take_resized(const c10::Storage& alias, const c10::Storage& storage);

struct MemoryUse {
  size_t allocations, live_buffers, live_bytes, cached_bytes;
  size_t peak_bytes;  // that were live at once since the counts were reset
};
MemoryUse memory_use();
void reset_memory_counts();
void release_cached_memory();

}  // namespace emulator
