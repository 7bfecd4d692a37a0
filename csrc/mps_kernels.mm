#include "mps_kernels.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>

namespace torch_fused_lora {
namespace {

std::atomic<uint32_t> cores{8};
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

/// Throws unless as many tensors are bound as the launch has: the words behind them would come at other indices.
void check_bindings(const Batch& batch, const Launch& launch) {
  const size_t bound = batch.buffers.size() + batch.constants.size();
  if (bound == launch.tensors) return;
  throw std::runtime_error(
      std::string("torch_fused_lora: kernel ") + launch.kernel + ": its plan has " + std::to_string(launch.tensors) +
      " tensors, and " + std::to_string(bound) + " are bound");
}

/// One dispatch with its kernel, and the first call of the shim that failed.
struct Encoding {
  const Batch* batch;
  const Launch* launch;
  AOTIMetalKernelFunctionHandle kernel;
};

struct Block {
  std::vector<Encoding> encodings;
  const Encoding* failed = nullptr;
  const char* call = nullptr;
  std::string reason;
};

const char* encode_one(const Encoding& encoding) {
  const auto& [batch, launch, kernel] = encoding;
  if (aoti_torch_mps_start_encoding(kernel) != AOTI_TORCH_SUCCESS) return "start_encoding";
  unsigned index = 0;
  // Metal wants something bound for the tensors that are not used, too, aligned for any dtype: one that starts its
  // storage, as every output does.
  const auto starts_storage = [](const Binding& buffer) { return buffer && buffer->storage_offset() == 0; };
  const auto stand_in = std::find_if(batch->buffers.begin(), batch->buffers.end(), starts_storage);
  for (const Binding& buffer : batch->buffers) {
    const AtenTensorHandle tensor = (buffer ? *buffer : **stand_in).get();
    if (aoti_torch_mps_set_arg_tensor(kernel, index++, tensor) != AOTI_TORCH_SUCCESS) return "set_arg_tensor";
  }
  for (const Binding& constant : batch->constants) {
    const auto status = constant ? aoti_torch_mps_set_arg_tensor(kernel, index, constant->get())
                                 : aoti_torch_mps_set_arg_int(kernel, index, 0);
    if (status != AOTI_TORCH_SUCCESS) return "set_arg of a constant";
    ++index;
  }
  for (uint32_t i = 0; i < launch->word_count; ++i) {
    const int64_t word = static_cast<int64_t>(launch->words[i]);
    if (aoti_torch_mps_set_arg_int(kernel, index++, word) != AOTI_TORCH_SUCCESS) return "set_arg_int";
  }
  const uint64_t threads[3] = {launch->threads[0], launch->threads[1], launch->threads[2]};
  const uint64_t group[3] = {launch->group[0], launch->group[1], launch->group[2]};
  if (aoti_torch_mps_dispatch_array_with_group_size(kernel, threads, 3, group, 3) != AOTI_TORCH_SUCCESS) {
    return "dispatch";
  }
  return nullptr;
}

/// Runs on the stream's queue, where no exception may pass: what failed is told afterwards.
void encode_block(AOTIMetalKernelFunctionHandle, void* user_data) {
  Block& block = *static_cast<Block*>(user_data);
  for (const Encoding& encoding : block.encodings) {
    block.call = encode_one(encoding);
    if (block.call != nullptr) {
      block.failed = &encoding;
      block.reason = last_error();
      return;
    }
  }
}

}  // namespace

void encode(std::span<const Batch> batches) {
  Block block;
  for (const Batch& batch : batches) {
    for (const Launch& launch : batch.launches) {
      check_bindings(batch, launch);
      block.encodings.push_back({&batch, &launch, compiled(launch)});
    }
  }
  if (block.encodings.empty()) return;
  const Encoding& first = block.encodings.front();
  std::lock_guard<std::mutex> lock(encoding_mutex);
  if (aoti_torch_mps_run_command_block(first.kernel, encode_block, &block) != AOTI_TORCH_SUCCESS) {
    fail(first.launch->kernel, "run_command_block", last_error());
  }
  if (block.failed != nullptr) fail(block.failed->launch->kernel, block.call, block.reason);
}

void check_status(int32_t status, const char* what) {
  if (status == AOTI_TORCH_SUCCESS) return;
  throw std::runtime_error(std::string("torch_fused_lora: ") + what + " failed: " + last_error());
}

uint32_t gpu_cores() { return cores; }

}  // namespace torch_fused_lora

#define TFL_TEXT(x) #x
#define TFL_TEXT_OF(x) TFL_TEXT(x)
const char* tfl_interface() { return "torch_fused_lora interface 2 version " TFL_TEXT_OF(TFL_VERSION); }

void tfl_configure(uint32_t gpu_cores, const char* platform) {
  std::lock_guard<std::mutex> lock(torch_fused_lora::mutex);
  torch_fused_lora::cores = gpu_cores > 0 ? gpu_cores : 8;
  torch_fused_lora::platform = platform;
}

uint64_t tfl_compiled_kernels() {
  std::lock_guard<std::mutex> lock(torch_fused_lora::mutex);
  uint64_t count = 0;
  for (const auto& [source, kernel] : torch_fused_lora::kernels) count += kernel != nullptr;
  return count;
}

double tfl_compile_seconds() {
  std::lock_guard<std::mutex> lock(torch_fused_lora::mutex);
  return torch_fused_lora::compile_seconds;
}
