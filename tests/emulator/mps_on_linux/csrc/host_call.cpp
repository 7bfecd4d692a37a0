#include "host_call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>

#include "generator.h"
#include "plain_dispatch.h"

namespace emulator {
namespace {

bool is_optional_generator(const c10::Argument& argument) {
  const auto* optional = argument.type()->castRaw<c10::OptionalType>();
  return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

c10::IValue replace_device(const c10::IValue& value, c10::DeviceType type) {
  return value.isDevice() && value.toDevice().is_mps() ? c10::IValue(c10::Device(type)) : value;
}

at::Tensor tensor_over(const c10::Storage& storage, c10::DispatchKey key, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

const void* storage_key(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

bool returns_only_tensors(const c10::FunctionSchema& schema) {
  return std::all_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& result) {
    const auto* list = result.type()->castRaw<c10::ListType>();
    return (list ? list->getElementType() : result.type())->kind() == c10::TypeKind::TensorType;
  });
}

}  // namespace

at::Tensor host_alias(const at::Tensor& tensor) {
  return tensor_over(host_alias(tensor.storage()), c10::DispatchKey::CPU, tensor);
}

c10::IValue map_tensors(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& function) {
  const auto apply = [&](const at::Tensor& tensor) { return tensor.defined() ? function(tensor) : tensor; };
  if (value.isTensor()) return apply(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(apply(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional(apply(*tensor)) : std::nullopt);
    }
    return list;
  }
  return value;
}

void check_devices(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const bool indices = arguments[i].isOptionalTensorList();
    map_tensors(arguments[i], [&](const at::Tensor& tensor) {
      TORCH_CHECK(
          tensor.is_mps() || (tensor.is_cpu() && (tensor.dim() == 0 || indices)),
          "Expected all tensors to be on the same device, but found at least two devices, mps:0 and ", tensor.device(),
          "! (", op.operator_name(), ", argument ", op.schema().arguments()[i].name(), ")");
      return tensor;
    });
  }
}

HostCall::HostCall(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments, bool later) : op_(op) {
  const auto& schema = op.schema();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue value = map_tensors(
        replace_device(arguments[i], c10::kCPU), [&](const at::Tensor& tensor) { return to_host(tensor, later); });
    if (value.isGenerator()) {
      value = host_generator(value.toGenerator());
    } else if (value.isNone() && is_optional_generator(schema.arguments()[i])) {
      value = host_generator(default_generator());
    }
    arguments_.push_back(std::move(value));
  }
}

at::Tensor HostCall::to_host(const at::Tensor& tensor, bool later) {
  at::Tensor host = tensor;
  if (tensor.is_mps()) {
    auto [found, is_new] = storages_.try_emplace(storage_key(tensor));
    if (is_new) found->second = {later ? c10::Storage() : tensor.storage(), host_alias(tensor.storage())};
    host = tensor_over(found->second.host, c10::DispatchKey::CPU, tensor);
  } else if (later && !tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    host = tensor.clone();
  }
  // A queued call gives nothing back: it keeps the memory, and neither the caller's tensors nor their storages, which
  // may have Python objects.
  if (!later) originals_.emplace(host.unsafeGetTensorImpl(), tensor);
  return host;
}

Stack HostCall::run() const {
  const PlainDispatch plain;
  Stack stack = arguments_;
  op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  return stack;
}

at::Tensor HostCall::to_device(const at::Tensor& result) const {
  if (auto found = originals_.find(result.unsafeGetTensorImpl()); found != originals_.end()) {
    const at::Tensor& original = found->second;
    if (original.is_mps() && (original.sizes() != result.sizes() || original.strides() != result.strides())) {
      original.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides());
    }
    return original;
  }
  for (const auto& [key, storages] : storages_) {
    if (storages.host.unsafeGetStorageImpl() == storage_key(result)) {
      return tensor_over(storages.device, c10::DispatchKey::MPS, result);
    }
  }
  const auto options = result.options().device(c10::kMPS);
  const at::Tensor moved = result.is_non_overlapping_and_dense()
      ? at::empty_strided(result.sizes(), result.strides(), options)
      : at::empty(result.sizes(), options);
  host_alias(moved).copy_(result);
  return moved;
}

Stack HostCall::to_device(const Stack& results) const {
  const PlainDispatch plain;
  for (const auto& [key, storages] : storages_) take_resized(storages.host, storages.device);
  Stack moved;
  for (const c10::IValue& value : results) {
    moved.push_back(map_tensors(value, [this](const at::Tensor& result) { return to_device(result); }));
  }
  return moved;
}

std::optional<Stack> infer_results(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  if (!op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta) || !returns_only_tensors(op.schema())) return {};
  const PlainDispatch plain;
  std::unordered_map<const void*, at::Tensor> metas;  // by the argument's TensorImpl
  std::unordered_map<const void*, at::Tensor> originals;  // arguments by their meta tensor's TensorImpl and StorageImpl
  Stack stack;
  for (const c10::IValue& value : arguments) {
    stack.push_back(map_tensors(replace_device(value, c10::kMeta), [&](const at::Tensor& tensor) -> at::Tensor {
      if (tensor.is_cpu() && tensor.dim() == 0) return tensor;
      at::Tensor& meta = metas[tensor.unsafeGetTensorImpl()];
      if (!meta.defined()) {
        meta = at::Tensor(at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(), tensor.scalar_type()));
        originals[meta.unsafeGetTensorImpl()] = originals[storage_key(meta)] = tensor;
      }
      return meta;
    }));
    if (stack.back().isGenerator()) stack.back() = c10::IValue();
  }
  try {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  } catch (...) {
    return {};  // the CPU's kernel will do it, or say what is wrong
  }
  bool views = false;
  Stack results;
  for (const c10::IValue& value : stack) {
    results.push_back(map_tensors(value, [&](const at::Tensor& meta) -> at::Tensor {
      if (auto found = originals.find(meta.unsafeGetTensorImpl()); found != originals.end()) {
        if (found->second.sizes() != meta.sizes()) found->second.resize_(meta.sizes());  // out=
        return found->second;
      }
      views |= originals.contains(storage_key(meta));
      return views ? meta : at::empty_strided(meta.sizes(), meta.strides(), meta.options().device(c10::kMPS));
    }));
  }
  if (views) return {};
  return results;
}

bool writes_to_host(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  bool writes = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = op.schema().arguments()[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    map_tensors(arguments[i], [&](const at::Tensor& tensor) { return writes |= tensor.is_cpu(), tensor; });
  }
  return writes;
}

}  // namespace emulator
