// Running what the launch plan says: a cache of compiled kernels, and their encoding onto torch's MPS stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace torch_fused_lora {

/// What is bound at a kernel's tensor index; none for a tensor that the launch does not use.
using Binding = std::optional<torch::stable::Tensor>;

/// Launches that share their tensors: device buffers first, then 0-dim tensors in constant memory, on the CPU or not.
struct Batch {
  std::vector<Launch> launches;
  std::vector<Binding> buffers, constants;
};

/// All dispatches of a problem: `plan(index, &launch, &count)` calls a planning function. Throws what it refuses with.
template <typename Plan>
std::vector<Launch> plan_all(const Plan& plan) {
  std::vector<Launch> launches;
  uint32_t count = 1;
  while (launches.size() < count) {
    Launch& launch = launches.emplace_back();
    if (const char* error = plan(static_cast<uint32_t>(launches.size() - 1), &launch, &count)) {
      throw std::runtime_error(std::string("torch_fused_lora: ") + error);
    }
  }
  return launches;
}

/// Encodes the batches in order, in one command block. Compiles what is not compiled yet; no synchronisation, no
/// commit.
/// Throws where a kernel does not compile or a call of the shim fails, naming the kernel, torch's and the system's
/// version; the process stays usable, and a kernel that did not compile is tried again by the next call.
void encode(std::span<const Batch> batches);

/// Throws, unless the call of torch's C interface that `what` names succeeded, with torch's own text where it has one.
void check_status(int32_t status, const char* what);

/// The GPU's cores, which tfl_configure was told.
uint32_t gpu_cores();

}  // namespace torch_fused_lora

extern "C" {
/// The number of the interface below and of the operators' schemas, and the package's version, as
/// torch_fused_lora/mps.py wants them. It finds this text in the file before it loads it.
__attribute__((visibility("default"))) const char* tfl_interface();
/// Once, before the first call: the GPU's number of cores, and the versions that error messages name.
__attribute__((visibility("default"))) void tfl_configure(uint32_t gpu_cores, const char* platform);
/// How many kernels are compiled so far, in how many seconds, and how many contiguous copies of operands were made.
__attribute__((visibility("default"))) uint64_t tfl_compiled_kernels();
__attribute__((visibility("default"))) double tfl_compile_seconds();
__attribute__((visibility("default"))) uint64_t tfl_contiguous_copies();
}
