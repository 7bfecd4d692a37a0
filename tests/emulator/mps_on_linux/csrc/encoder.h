// The compute encoder of a command block: a kernel, its arguments, dispatches.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <array>
#include <mutex>
#include <optional>
#include <vector>

#include "memory.h"
#include "metal.h"

namespace emulator {

struct Binding {
  BlockPtr block;            // a buffer, at an offset ...
  size_t offset = 0;
  uint32_t itemsize = 1;
  std::vector<char> bytes;  // ... or a constant that was copied
};

class Encoder {
 public:
  static Encoder& current();                      // of this thread's command block; throws outside of one
  // The one that the kernel's handle holds, as PyTorch's handle does: whoever started it last. Throws unless it is this
  // thread's and encodes this kernel.
  static Encoder& encoding(const Kernel* kernel);

  void start(const Kernel* kernel);
  void set_tensor(uint32_t index, const at::Tensor& tensor);
  void set_bytes(uint32_t index, const void* data, size_t size);
  // Threads of the whole grid and of a threadgroup, one to three dimensions.
  void dispatch(c10::ArrayRef<uint64_t> threads, c10::ArrayRef<uint64_t> group);

 private:
  void check(const Binding& binding, const ExecutorParameter& parameter) const;
  Binding& at(uint32_t index);

  const Kernel* kernel_ = nullptr;
  std::array<std::optional<Binding>, executor_buffers> bindings_;
};

// Usually all threads share one stream. With a stream a thread, none waits for another; and of the next two that start
// encoding the first waits, `meet_seconds` at most, until the second has started too. Not while a command block exists.
void share_one_stream();
void give_each_thread_a_stream(double meet_seconds);

// This thread encodes while one exists; other threads wait for their turn, as on the stream's serial dispatch queue.
class CommandBlock {
 public:
  CommandBlock();
  ~CommandBlock();

 private:
  std::unique_lock<std::mutex> stream_;
  Encoder encoder_;
};

}  // namespace emulator
