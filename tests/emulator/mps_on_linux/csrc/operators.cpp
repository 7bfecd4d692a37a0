// ATen on mps. Storage and views are handled here; every other operator is the CPU's kernel, queued where its result's
// shape is known beforehand.
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "counters.h"
#include "host_call.h"
#include "memory.h"
#include "queue.h"

namespace emulator {
namespace {

using at::Tensor;
using c10::IntArrayRef;
using c10::OperatorHandle;
using OptionalDtype = std::optional<at::ScalarType>;
using OptionalLayout = std::optional<at::Layout>;
using OptionalDevice = std::optional<at::Device>;
using OptionalFormat = std::optional<at::MemoryFormat>;

void check_outside_command_block(const char* what) {
  TORCH_CHECK(
      !in_command_block(), "mps emulator: ", what,
      " inside a command block: only its own kernels may be encoded there");
}

// --- Storage

constexpr c10::DispatchKeySet mps_keys(c10::DispatchKey::MPS);

at::ScalarType checked(OptionalDtype dtype) {
  const auto type = c10::dtype_or_default(dtype);
  TORCH_CHECK_TYPE(
      type != at::kDouble && type != at::kComplexDouble, "Cannot convert a MPS Tensor to ", type,
      " dtype as the MPS framework doesn't support ",
      type == at::kDouble ? "float64. Please use float32 instead." : "complex128. Please use complex64 instead.");
  return type;
}

Tensor empty(
    IntArrayRef size, OptionalDtype dtype, OptionalLayout, OptionalDevice, std::optional<bool>, OptionalFormat format) {
  return Tensor(at::detail::empty_generic(size, device_allocator(), mps_keys, checked(dtype), format));
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, OptionalDtype dtype, OptionalLayout, OptionalDevice, std::optional<bool>) {
  return Tensor(at::detail::empty_strided_generic(size, stride, device_allocator(), mps_keys, checked(dtype)));
}

void grow(const at::Storage& storage, size_t size) {
  const auto old = host_alias(storage);
  auto fresh = device_allocator()->allocate(size);
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(size);
  if (const size_t kept = std::min(old.nbytes(), size)) {
    queue().push([old, now = host_alias(storage), kept] { memcpy(now.mutable_data(), old.data(), kept); });
  }
}

void set_layout(const Tensor& tensor, IntArrayRef size, IntArrayRef stride, int64_t offset) {
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  const size_t needed = at::detail::computeStorageNbytes(size, stride, tensor.itemsize(), offset);
  if (tensor.numel() && needed > tensor.storage().nbytes()) grow(tensor.storage(), needed);
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, OptionalFormat format) {
  if (self.sizes() != size) set_layout(self, size, c10::contiguous_strides(size), self.storage_offset());
  if (format) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  TORCH_CHECK(
      source.device().is_mps(),
      "Attempted to set the storage of a tensor on device \"mps:0\" to a storage on "
      "different device \"",
      source.device(), "\".");
  const auto contiguous = c10::contiguous_strides(size);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  set_layout(self, size, stride.size() == size.size() ? stride : IntArrayRef(contiguous), offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {count}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) { return set_storage(self, at::empty({0}, self.options()).storage(), 0, {0}, {}); }

// --- Between the host and the device

void copy_from_host(const Tensor& to, const Tensor& from) {
  queue().push([to = host_alias(to), from = from.clone()] { to.copy_(from); });
}

Tensor copy_to_host(const Tensor& from) {
  queue().synchronise();
  return host_alias(from);
}

c10::Scalar local_scalar_dense(const Tensor& self) { return copy_to_host(self).item(); }

// --- Everything else

// On a Mac an operator that has no Metal kernel raises too: only ATen's own, nearly all of which have one, are stood in
// for.
void check_is_aten(const OperatorHandle& op) {
  const auto& name = op.operator_name().name;
  TORCH_CHECK_NOT_IMPLEMENTED(
      name.starts_with("aten::") || name.starts_with("prims::"), "The operator '", name,
      "' is not currently implemented for the MPS device.");
}

std::vector<Tensor> flatten(const Stack& values) {
  std::vector<Tensor> tensors;
  for (const auto& value : values) {
    map_tensors(value, [&](const Tensor& tensor) { return tensors.push_back(tensor), tensor; });
  }
  return tensors;
}

void queue_call(const OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments, const Stack& results) {
  std::vector<Tensor> outputs;
  for (const Tensor& result : flatten(results)) outputs.push_back(host_alias(result));
  queue().push(
      [call = HostCall(op, arguments, /*later=*/true), outputs = std::move(outputs), name = op.operator_name()] {
        const auto values = flatten(call.run());
        TORCH_INTERNAL_ASSERT(values.size() == outputs.size(), name);
        for (size_t i = 0; i < values.size(); ++i) {
          if (values[i].storage().data() == outputs[i].storage().data()) continue;  // it was an argument
          TORCH_INTERNAL_ASSERT(
              values[i].sizes() == outputs[i].sizes(), name, ": the shape function says ", outputs[i].sizes(),
              ", the kernel ", values[i].sizes());
          outputs[i].copy_(values[i]);
        }
      });
}

void call_on_host(const OperatorHandle& op, Stack* stack) {
  check_is_aten(op);
  check_outside_command_block(op.operator_name().name.c_str());
  count_fallback(toString(op.operator_name()));
  const size_t count = op.schema().arguments().size();
  const auto arguments = torch::jit::last(*stack, count);
  Stack results;
  check_devices(op, arguments);
  if (auto inferred = writes_to_host(op, arguments) ? std::nullopt : infer_results(op, arguments)) {
    queue_call(op, arguments, *inferred);
    results = std::move(*inferred);
  } else {
    queue().synchronise();
    const HostCall call(op, arguments, /*later=*/false);
    results = call.to_device(call.run());
  }
  torch::jit::drop(*stack, count);
  for (auto& result : results) stack->push_back(std::move(result));
}

// The CPU's kernel of an operator by name, for arguments given as C++ values.
template <typename... Arguments>
Stack call_named(const char* name, const char* overload, Arguments... arguments) {
  Stack stack;
  torch::jit::push(stack, std::move(arguments)...);
  call_on_host(c10::Dispatcher::singleton().findSchemaOrThrow(name, overload), &stack);
  return stack;
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  check_outside_command_block("a copy");
  TORCH_CHECK(self.is_cpu() || self.is_mps(), "copy_ from mps to ", self.device(), " is not supported");
  if (self.is_same(source)) return self;
  if (self.is_cpu()) return self.copy_(copy_to_host(source));
  if (source.is_cpu()) {
    copy_from_host(self, source.expand_as(self));
  } else {
    call_named("aten::copy_", "", self, source, non_blocking);
  }
  return self;
}

Tensor convolution(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    IntArrayRef stride,
    IntArrayRef padding,
    IntArrayRef dilation,
    bool transposed,
    IntArrayRef output_padding,
    int64_t groups) {
  const auto out = call_named(
      "aten::convolution", "", input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  return out.back().toTensor();
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad,
    const Tensor& input,
    const Tensor& weight,
    IntArrayRef stride,
    IntArrayRef padding,
    IntArrayRef dilation,
    bool transposed,
    IntArrayRef output_padding,
    int64_t groups,
    std::array<bool, 3> mask) {
  const auto bias_size = std::optional(std::vector<int64_t>{grad.size(1)});
  const auto out = call_named(
      "aten::convolution_backward", "", grad, input, weight, bias_size, stride, padding, dilation, transposed,
      output_padding, groups, c10::List<bool>({mask[0], mask[1], mask[2]}));
  return {out[0].toTensor(), out[1].toTensor(), out[2].toTensor()};
}

// aten::linear has a kernel and a backward of its own on mps; elsewhere it is a composite.
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  return call_named("aten::linear", "", input, weight, bias).back().toTensor();
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& input, const Tensor& grad, const Tensor& weight, std::array<bool, 3> mask) {
  const Tensor rows = grad.reshape({-1, weight.size(0)});
  return {
      mask[0] ? at::mm(rows, weight).view(input.sizes()) : Tensor(),
      mask[1] ? at::mm(rows.t(), input.reshape({-1, weight.size(1)})) : Tensor(), mask[2] ? rows.sum(0) : Tensor()};
}

Tensor scaled_dot_product_attention(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const std::optional<Tensor>& mask,
    double dropout_p,
    bool is_causal,
    std::optional<double> scale,
    bool enable_gqa) {
  std::optional<Tensor> added = mask;  // a boolean mask says which keys take part; the math wants what to add
  if (mask.has_value() && mask->scalar_type() == at::kBool) {
    added = at::zeros_like(*mask, query.options()).masked_fill_(mask->logical_not(), -INFINITY);
  }
  return std::get<0>(
      at::_scaled_dot_product_attention_math(query, key, value, added, dropout_p, is_causal, {}, scale, enable_gqa));
}

}  // namespace

TORCH_LIBRARY_IMPL(_, MPS, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<call_on_host>()); }

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("linear", linear);
  m.impl("linear_backward", linear_backward);
  m.impl("scaled_dot_product_attention", scaled_dot_product_attention);
  // A composite kernel would come before the fallback; the CPU has one of its own, and so has a Mac.
  for (const char* name : {"native_layer_norm", "native_group_norm", "silu_backward", "mish_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<call_on_host>());
  }
}

// Its composite kernel asserts that the device has fused kernels.
TORCH_LIBRARY_IMPL(aten, AutogradMPS, m) { m.impl("scaled_dot_product_attention", scaled_dot_product_attention); }

}  // namespace emulator
