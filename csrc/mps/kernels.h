// Running what the launch plan says: a cache of compiled kernels, and their encoding onto torch's MPS stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../plan/launch.h"

namespace torch_fused_lora {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// What a tensor of a kernel is bound to, by its buffer index in the kernel's header. The caller keeps the tensor.
struct Binding {
  uint32_t buffer;
  const Tensor* tensor;  // none for one that the launch does not use
  bool is_constant = false;

  Binding(uint32_t buffer, const Tensor& tensor) : buffer(buffer), tensor(&tensor) {}
  Binding(uint32_t buffer, const OptionalTensor& tensor)
      : buffer(buffer), tensor(tensor.has_value() ? &*tensor : nullptr) {}
  Binding(uint32_t buffer, Tensor&& temporary) = delete;
  Binding(uint32_t buffer, OptionalTensor&& temporary) = delete;

  /// A 0-dim tensor in constant memory, on the CPU or not.
  template <typename T>
  static Binding constant(uint32_t buffer, T&& tensor) {
    Binding binding(buffer, std::forward<T>(tensor));
    binding.is_constant = true;
    return binding;
  }
};

/// Dispatches in order, in one command block. One may read what an earlier one wrote: torch's encoder is a serial one,
/// as its source has it, in which Metal lets dispatches wait for each other.
class Dispatches {
 public:
  /// Compiles what is not compiled yet. Throws where a kernel does not compile or the bindings are not the launch's
  /// tensors. Launch and tensors have to live until `encode`.
  void add(const Launch& launch, std::initializer_list<Binding> bindings);

  template <typename Configuration>
  void add(const Plan<Configuration>& plan, std::initializer_list<Binding> bindings) {
    for (const auto& step : plan.steps) add(step.launch, bindings);
  }

  /// sum_splits, where there are partial sums.
  void add(
      const PartialSums& sums,
      const OptionalTensor& first_partial,
      const OptionalTensor& second_partial,
      const OptionalTensor& first,
      const OptionalTensor& second);

  /// No synchronisation, no commit. Throws where a call of the shim fails, naming the kernel, torch's and the system's
  /// version; the process stays usable, and a kernel that did not compile is tried again by the next call.
  void encode();

 private:
  struct Tensors {
    std::array<const Tensor*, kMostTensors> of;
    std::array<bool, kMostTensors> is_constant;
  };
  struct Dispatch {
    const Launch* launch;
    AOTIMetalKernelFunctionHandle kernel;
    Tensors tensors;

    const char* encode() const;
  };

  static void encode_block(AOTIMetalKernelFunctionHandle, void* dispatches);

  std::vector<Dispatch> dispatches_;
  const Dispatch* failed_ = nullptr;  // with the call of the shim that did
  const char* call_ = nullptr;
  std::string reason_;
};

/// What a plan says, alone.
template <typename Configuration>
void launch(const Plan<Configuration>& plan, std::initializer_list<Binding> bindings) {
  Dispatches dispatches;
  dispatches.add(plan, bindings);
  dispatches.encode();
}

/// The plan of a problem. Throws what it refuses with.
template <typename Problem>
auto plan_or_throw(const Problem& problem) {
  auto planned = plan(problem);
  if (!planned.error.empty()) throw std::runtime_error("torch_fused_lora: " + planned.error);
  return planned;
}

/// Throws, unless the call of torch's C interface that `what` names succeeded, with torch's own text where it has one.
void check_status(int32_t status, const char* what);

/// The GPU's cores, and the versions that errors name. To be told before the first call.
void configure(uint32_t gpu_cores, const char* platform);
uint32_t gpu_cores();

/// What `torch.use_deterministic_algorithms` says, or true where that cannot be told.
bool is_deterministic();

/// Kernels compiled so far, and in how many seconds.
struct Compiled {
  uint64_t kernels;
  double seconds;
};
Compiled compiled_so_far();

}  // namespace torch_fused_lora
