#include "kernels.h"

#include <dlfcn.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>

#include "../../metal/sum_splits.h"

namespace torch_fused_lora {
namespace {

constexpr uint32_t kUnknownCores = 8;  // what launches are planned for where the GPU does not tell

std::atomic<uint32_t> cores{kUnknownCores};
std::mutex mutex;  // of what follows
std::string platform = "unknown torch and system";
std::map<const char*, AOTIMetalKernelFunctionHandle> kernels;  // by Launch::source, one string a kernel
double compile_seconds = 0;

// A kernel's handle holds the encoder that start_encoding took from the caller's stream. Two threads with streams of
// their own would encode into each other's through the handles that they share, so one encodes at a time. It cannot
// deadlock: the holder waits for its stream's queue alone, on which neither torch's blocks nor encode_block take this
// mutex; kernels are compiled before it is taken.
std::mutex encoding_mutex;

[[noreturn]] void fail(const char* kernel, const char* what, const std::string& reason) {
  throw std::runtime_error(
      std::string("torch_fused_lora: kernel ") + kernel + ": " + what + " failed (" + platform + ")" +
      (reason.empty() ? "" : ": " + reason));
}

/// torch's own text for the last failed call. The running torch has it from 2.13 on; the stable ABI that this is built
/// for does not, so it is looked up by name.
std::string last_error() {
  using Text = const char* (*)();
  static const auto text = reinterpret_cast<Text>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return text != nullptr ? text() : "torch printed its reason to stderr";
}

/// The launch's compiled kernel. torch's own pipeline cache has no lock, hence ours; the libraries are never deleted.
AOTIMetalKernelFunctionHandle compiled(const Launch& launch) {
  std::lock_guard<std::mutex> lock(mutex);
  AOTIMetalKernelFunctionHandle& kernel = kernels[launch.source];
  if (kernel == nullptr) {
    const auto start = std::chrono::steady_clock::now();
    AOTIMetalShaderLibraryHandle library = nullptr;
    if (aoti_torch_mps_create_shader_library(launch.source, &library) != AOTI_TORCH_SUCCESS) {
      fail(launch.kernel, "compiling it", last_error());
    }
    if (aoti_torch_mps_get_kernel_function(library, launch.kernel, &kernel) != AOTI_TORCH_SUCCESS) {
      kernel = nullptr;
      const std::string reason = last_error();
      aoti_torch_mps_delete_shader_library(library);
      fail(launch.kernel, "finding it in its library", reason);
    }
    compile_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return kernel;
}

}  // namespace

void Dispatches::add(const Launch& launch, std::initializer_list<Binding> bindings) {
  Dispatch& dispatch = dispatches_.emplace_back();
  dispatch.launch = &launch;
  uint32_t seen = 0;  // a bit a buffer
  for (const Binding& binding : bindings) {
    if (binding.buffer >= launch.tensors) continue;
    seen |= 1u << binding.buffer;
    dispatch.tensors.of[binding.buffer] = binding.tensor;
    dispatch.tensors.is_constant[binding.buffer] = binding.is_constant;
  }
  // What is missing would be bound to whatever was there; what is too many, to where the words go.
  if (bindings.size() != launch.tensors || seen != (1u << launch.tensors) - 1) {
    std::string bound;
    for (const Binding& binding : bindings) bound += (bound.empty() ? "" : ", ") + std::to_string(binding.buffer);
    throw std::runtime_error(
        std::string("torch_fused_lora: kernel ") + launch.kernel + ": its plan has " + std::to_string(launch.tensors) +
        " tensors, and bound are the buffers " + bound);
  }
  dispatch.kernel = compiled(launch);
}

void Dispatches::add(
    const PartialSums& sums,
    const OptionalTensor& first_partial,
    const OptionalTensor& second_partial,
    const OptionalTensor& first,
    const OptionalTensor& second) {
  if (sums.splits == 1) return;
  add(sums.launch,
      {{tfl::SUM_FIRST_PARTIAL, first_partial},
       {tfl::SUM_SECOND_PARTIAL, second_partial},
       {tfl::SUM_FIRST, first},
       {tfl::SUM_SECOND, second}});
}

/// The call of the shim that failed, or null.
const char* Dispatches::Dispatch::encode() const {
  if (aoti_torch_mps_start_encoding(kernel) != AOTI_TORCH_SUCCESS) return "start_encoding";
  const auto begin = tensors.of.begin(), end = begin + launch->tensors;
  // Metal wants something bound for the tensors that are not used, too, aligned for any dtype: one that starts its
  // storage, as every output does. (Constants come last and are not reached.)
  const auto stand_in = [&] {
    return *std::find_if(begin, end, [](const auto* t) { return t != nullptr && t->storage_offset() == 0; });
  };
  unsigned index = 0;
  for (; index < launch->tensors; ++index) {
    const auto* tensor = tensors.of[index];
    if (tensor == nullptr && tensors.is_constant[index]) {
      if (aoti_torch_mps_set_arg_int(kernel, index, 0) != AOTI_TORCH_SUCCESS) return "set_arg_int";
      continue;
    }
    if (tensor == nullptr) tensor = stand_in();
    if (aoti_torch_mps_set_arg_tensor(kernel, index, tensor->get()) != AOTI_TORCH_SUCCESS) return "set_arg_tensor";
  }
  for (uint32_t i = 0; i < launch->word_count; ++i) {
    const int64_t word = static_cast<int64_t>(launch->words[i]);
    if (aoti_torch_mps_set_arg_int(kernel, index++, word) != AOTI_TORCH_SUCCESS) return "set_arg_int";
  }
  const uint64_t threads[3] = {launch->threads[0], launch->threads[1], launch->threads[2]};
  const uint64_t group[3] = {launch->group[0], launch->group[1], launch->group[2]};
  const auto status = aoti_torch_mps_dispatch_array_with_group_size(kernel, threads, 3, group, 3);
  return status == AOTI_TORCH_SUCCESS ? nullptr : "dispatch";
}

/// Runs on the stream's queue, where no exception may pass: what failed is told afterwards.
void Dispatches::encode_block(AOTIMetalKernelFunctionHandle, void* dispatches) {
  auto& self = *static_cast<Dispatches*>(dispatches);
  for (const Dispatch& dispatch : self.dispatches_) {
    self.call_ = dispatch.encode();
    if (self.call_ != nullptr) {
      self.failed_ = &dispatch;
      self.reason_ = last_error();
      return;
    }
  }
}

void Dispatches::encode() {
  if (dispatches_.empty()) return;
  const Dispatch& first = dispatches_.front();
  std::lock_guard<std::mutex> lock(encoding_mutex);
  if (aoti_torch_mps_run_command_block(first.kernel, encode_block, this) != AOTI_TORCH_SUCCESS) {
    fail(first.launch->kernel, "run_command_block", last_error());
  }
  if (failed_ != nullptr) fail(failed_->launch->kernel, call_, reason_);
}

void check_status(int32_t status, const char* what) {
  if (status == AOTI_TORCH_SUCCESS) return;
  throw std::runtime_error(std::string("torch_fused_lora: ") + what + " failed: " + last_error());
}

void configure(uint32_t gpu_cores, const char* named) {
  std::lock_guard<std::mutex> lock(mutex);
  cores = gpu_cores > 0 ? gpu_cores : kUnknownCores;
  platform = named;
}

uint32_t gpu_cores() { return cores; }

bool is_deterministic() {
  // Of torch's C++, which has no C function for it, so they are looked up by name.
  static const auto context = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv"));
  static const auto asks =
      reinterpret_cast<bool (*)(const void*)>(dlsym(RTLD_DEFAULT, "_ZNK2at7Context23deterministicAlgorithmsEv"));
  return context == nullptr || asks == nullptr || asks(context());
}

Compiled compiled_so_far() {
  std::lock_guard<std::mutex> lock(mutex);
  const auto is_compiled = [](const auto& entry) { return entry.second != nullptr; };
  return {static_cast<uint64_t>(std::count_if(kernels.begin(), kernels.end(), is_compiled)), compile_seconds};
}

}  // namespace torch_fused_lora
