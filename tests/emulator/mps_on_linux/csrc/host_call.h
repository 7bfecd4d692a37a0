// One call of an ATen operator with its mps tensors replaced by CPU tensors over the same memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <functional>
#include <optional>
#include <unordered_map>

#include "memory.h"

namespace emulator {

using Stack = torch::jit::Stack;

at::Tensor host_alias(const at::Tensor& tensor);

class HostCall {
 public:
    // CPU arguments are copied if the call runs later.
  HostCall(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments, bool later);

    // Calls the CPU's kernel; the results are on the CPU.
  Stack run() const;

  // Results for the caller: arguments that were written are the caller's own tensors, views are views of those, and
  // the rest moves to mps.
  Stack to_device(const Stack& results) const;

 private:
  at::Tensor to_host(const at::Tensor& tensor, bool later);
  at::Tensor to_device(const at::Tensor& result) const;

  struct Storages {
    c10::Storage device, host;
  };

  c10::OperatorHandle op_;
  Stack arguments_;
  std::unordered_map<const void*, Storages> storages_;  // by StorageImpl on mps
  std::unordered_map<const void*, at::Tensor> originals_;  // the caller's tensor by TensorImpl on the host
};

// Throws unless all tensors are on mps, but for scalars and indices, which may be on the CPU.
void check_devices(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments);

// Results by PyTorch's shape functions, as tensors on mps: arguments, or fresh and not written yet. None if the
// operator has no shape function, if shapes depend on data, or if a result is no tensor or a view.
std::optional<Stack> infer_results(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments);

// Whether the operator writes to a CPU argument: then the host has to wait for it.
bool writes_to_host(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments);

// Applies a function to the defined tensors of a value: a tensor, a list of tensors, or a list of optional tensors.
c10::IValue map_tensors(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& function);

}  // namespace emulator
