#include "encoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <limits>

#include "counters.h"
#include "queue.h"

namespace emulator {

namespace {

thread_local Encoder* this_thread_encoder = nullptr;
std::mutex stream_mutex;
std::atomic<bool> stream_a_thread = false;

// Where two threads meet, once.
class Meeting {
 public:
  void arrange(double seconds) {
    const std::lock_guard lock(mutex_);
    arrived_ = 0;
    seconds_ = seconds;
  }

  void attend() {
    std::unique_lock lock(mutex_);
    ++arrived_;
    changed_.notify_all();
    changed_.wait_for(lock, std::chrono::duration<double>(seconds_), [this] { return arrived_ != 1; });
    arrived_ = 2;  // whoever comes now comes too late
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  double seconds_ = 0;
} meeting;

}  // namespace

void share_one_stream() { stream_a_thread = false; }

void give_each_thread_a_stream(double meet_seconds) {
  meeting.arrange(meet_seconds);
  stream_a_thread = true;
}

bool in_command_block() { return this_thread_encoder; }

CommandBlock::CommandBlock() {
  TORCH_CHECK(!in_command_block(), "mps emulator: a command block inside a command block waits for itself");
  if (!stream_a_thread) stream_ = std::unique_lock(stream_mutex);
  this_thread_encoder = &encoder_;
  count(Event::command_block);
}

CommandBlock::~CommandBlock() { this_thread_encoder = nullptr; }

Encoder& Encoder::current() {
  TORCH_CHECK(in_command_block(), "mps emulator: encoding outside a command block");
  return *this_thread_encoder;
}

Encoder& Encoder::encoding(const Kernel* kernel) {
  Encoder& encoder = current();
  TORCH_CHECK(encoder.kernel_ == kernel, "mps emulator: start_encoding of ", kernel->name, " comes first");
  TORCH_CHECK(
      std::atomic_ref(kernel->encoder) == &encoder, "mps emulator: ", kernel->name,
      ": its handle holds another stream's encoder, which another thread has started");
  return encoder;
}

// What an encoder held before is undefined here: on the real one any other operator may have encoded in between.
void Encoder::start(const Kernel* kernel) {
  kernel_ = kernel;
  bindings_ = {};
  std::atomic_ref(kernel->encoder) = this;
  if (stream_a_thread) meeting.attend();
}

Binding& Encoder::at(uint32_t index) {
  TORCH_CHECK(
      index < executor_buffers, kernel_->name, ": buffer index ", index, "; Metal has 0 to ", executor_buffers - 1);
  return bindings_[index].emplace();
}

void Encoder::set_tensor(uint32_t index, const at::Tensor& tensor) {
  if (tensor.is_cpu()) {  // as PyTorch does it: a scalar's storage is copied from its start
    TORCH_CHECK(tensor.dim() == 0, kernel_->name, ": buffer ", index, ": Passed CPU tensor to MPS op");
    if (tensor.scalar_type() == at::kDouble) {
      const auto value = static_cast<float>(*tensor.const_data_ptr<double>());
      set_bytes(index, &value, sizeof value);
    } else {
      set_bytes(index, tensor.storage().data(), tensor.element_size());
    }
    return;
  }
  TORCH_CHECK(tensor.is_mps(), kernel_->name, ": buffer ", index, " is a tensor on ", tensor.device());
  Binding& binding = at(index);
  binding.block = block_of(tensor.storage());
  binding.offset = tensor.storage_offset() * tensor.element_size();
  binding.itemsize = tensor.element_size();
  TORCH_CHECK(
      !binding.block || binding.offset < binding.block->size, kernel_->name, ": buffer ", index, ": offset ",
      binding.offset, " is past the end of a buffer of ", binding.block->size, " bytes");
}

void Encoder::set_bytes(uint32_t index, const void* data, size_t size) {
  const auto* bytes = static_cast<const char*>(data);
  at(index).bytes.assign(bytes, bytes + size);
}

void Encoder::check(const Binding& binding, const ExecutorParameter& parameter) const {
  const auto where = [&] { return c10::str(kernel_->name, ": buffer ", parameter.index); };
  if (binding.block) {
    const size_t alignment =
        parameter.space == executor_constant ? std::max(parameter.alignment, 4u) : parameter.alignment;
    TORCH_CHECK(
        binding.offset % alignment == 0, where(), ": offset ", binding.offset, " is not a multiple of ", alignment);
  } else if (!binding.bytes.empty()) {
    TORCH_CHECK(parameter.space != executor_device, where(), " is written by the kernel and bound to a constant");
    TORCH_CHECK(
        binding.bytes.size() >= parameter.size, where(), " takes ", parameter.size, " bytes, not ",
        binding.bytes.size());
  }
}

void Encoder::dispatch(c10::ArrayRef<uint64_t> threads, c10::ArrayRef<uint64_t> group) {
  const std::string& name = kernel_->name;
  TORCH_CHECK(
      !threads.empty() && threads.size() <= 3 && group.size() == threads.size(), name,
      ": grid and threadgroup have one to three dimensions, not ", threads.size(), " and ", group.size());
  ExecutorDispatch request{};
  uint64_t group_threads = 1;
  for (size_t i = 0; i < 3; ++i) {
    const uint64_t total = i < threads.size() ? threads[i] : 1, size = i < group.size() ? group[i] : 1;
    constexpr uint64_t most = std::numeric_limits<uint32_t>::max();
    TORCH_CHECK(
        total && size && total <= most && size <= most, name, ": a grid of ", threads, " threads, ", group,
        " a threadgroup");
    request.threads[i] = static_cast<uint32_t>(total);
    request.group[i] = static_cast<uint32_t>(size);
    group_threads *= size;
  }
  TORCH_CHECK(
      group_threads <= kernel_->max_threads, name, ": ", group_threads, " threads a threadgroup; it takes ",
      kernel_->max_threads);
  for (uint32_t index = 0; index < executor_buffers; ++index) {
    const auto found = kernel_->parameters.find(index);
    TORCH_CHECK(!bindings_[index] || found != kernel_->parameters.end(), name, " has no buffer ", index);
    if (found == kernel_->parameters.end()) continue;
    request.buffers[index].space = found->second.space;
    if (bindings_[index]) check(*bindings_[index], found->second);
  }
  count_dispatch(name);
  queue().push([kernel = kernel_, request, bindings = bindings_]() mutable {
    for (uint32_t index = 0; index < executor_buffers; ++index) {
      if (!bindings[index]) continue;
      Binding& binding = *bindings[index];
      ExecutorBuffer& buffer = request.buffers[index];
      buffer.granule = binding.itemsize;
      if (binding.block) {
        buffer.binding = executor_buffer;
        buffer.data = binding.block->host + binding.offset;
        buffer.size = binding.block->size - binding.offset;
      } else if (!binding.bytes.empty()) {
        buffer.binding = executor_bytes;
        buffer.data = binding.bytes.data();
        buffer.size = binding.bytes.size();
      }
    }
    execute(*kernel, request);
  });
}

}  // namespace emulator
