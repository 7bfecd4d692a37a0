#include "tensors.h"

#include <algorithm>
#include <atomic>
#include <iterator>

namespace torch_fused_lora {
namespace {

std::atomic<uint64_t> copies{0};

struct Dtype {
  ScalarType type;
  const char* name;
};

// In the order of Scalar.
constexpr Dtype kDtypes[] = {
    {ScalarType::Float, "torch.float32"},
    {ScalarType::Half, "torch.float16"},
    {ScalarType::BFloat16, "torch.bfloat16"}};
static_assert(std::size(kDtypes) == std::size(kScalars));

const Dtype* find(ScalarType dtype) {
  const auto found =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& known) { return known.type == dtype; });
  return found == std::end(kDtypes) ? nullptr : found;
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  return strides;
}

// What follows comes straight from the shim: by its name in the dispatcher it takes twice as long.

Tensor empty(const std::vector<int64_t>& shape, const Tensor& like, int32_t dtype) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made;
  const auto status = aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, device_type, like.get_device_index(),
      &made);
  check_status(status, "allocating an output");
  return Tensor(made);
}

/// Other sizes and strides over the same memory.
Tensor reinterpreted(const Tensor& tensor, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  constexpr int64_t added_offset = 0;
  AtenTensorHandle made;
  const auto status = aoti_torch__reinterpret_tensor(
      tensor.get(), static_cast<int64_t>(shape.size()), shape.data(), strides.data(), added_offset, &made);
  check_status(status, "reshaping a tensor");
  return Tensor(made);
}

Tensor contiguous_copy(const Tensor& tensor) {
  ++copies;
  return torch::stable::contiguous(tensor);
}

}  // namespace

Tensor empty(const std::vector<int64_t>& shape, const Tensor& like) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(shape, like, dtype);
}

Tensor empty_float(const std::vector<int64_t>& shape, const Tensor& like) {
  return empty(shape, like, aoti_torch_dtype_float32());
}

Tensor with_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
  return reinterpreted(tensor, shape, contiguous_strides(shape));
}

std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  shape.back() = last;
  return shape;
}

Rows rows_of(const Tensor& tensor) {
  // The leading dimensions, folded where memory allows: the last two levels, the inner one second.
  struct Level {
    int64_t size, stride;
  };
  Level outer = {}, inner = {};
  int count = 0;
  const int64_t dims = tensor.dim();
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) {
    const Level level = {tensor.size(d), tensor.stride(d)};
    rows *= level.size;
    if (level.size == 1) continue;
    if (count > 0 && inner.stride == level.size * level.stride) {
      inner = {inner.size * level.size, level.stride};
    } else {
      outer = inner;
      inner = level;
      ++count;
    }
  }
  const int64_t cols = tensor.size(dims - 1), col_stride = cols > 1 ? tensor.stride(dims - 1) : 1;
  const int64_t row_stride = count == 0 ? cols : inner.stride;
  if (rows > 0 && cols > 0 && (count > 2 || (col_stride != 1 && row_stride != 1))) {
    return rows_of(contiguous_copy(tensor));
  }
  const auto u = [](int64_t value) { return static_cast<uint64_t>(value); };
  Operand operand = {u(rows), u(cols), u(rows), 0, u(row_stride), u(col_stride), u(tensor.storage_offset())};
  if (count == 2) {
    operand.inner = u(inner.size);
    operand.outer_stride = u(outer.stride);
  }
  return {tensor, operand};
}

Rows as_matrix(Rows rows) {
  if (rows.operand.inner < rows.operand.rows) rows = rows_of(contiguous_copy(rows.tensor));
  if (rows.tensor.dim() == 2) return rows;
  const auto i = [](uint64_t value) { return static_cast<int64_t>(value); };
  const Operand& m = rows.operand;
  rows.tensor = reinterpreted(rows.tensor, {i(m.rows), i(m.cols)}, {i(m.row_stride), i(m.col_stride)});
  return rows;
}

bool has_shape(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  const auto sizes = tensor.sizes();  // torch 2.11 has no == for them
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

bool is_alike(const Tensor& tensor, const Tensor& other) {
  return !tensor.is_cpu() && tensor.scalar_type() == other.scalar_type() && has_shape(tensor, other.sizes());
}

const char kSupported[] = "float16, bfloat16 or float32, which device mps has";

bool is_supported(ScalarType dtype) { return find(dtype) != nullptr; }

Scalar scalar(ScalarType dtype) { return static_cast<Scalar>(find(dtype) - kDtypes); }

const char* name_of(ScalarType dtype) {
  const Dtype* const found = find(dtype);
  return found != nullptr ? found->name : "another dtype";
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

uint64_t contiguous_copies() { return copies; }

Tensor constant(const Tensor& tensor) {
  return tensor.is_cpu() && tensor.storage_offset() != 0 ? torch::stable::clone(tensor) : tensor;
}

OptionalTensor constant(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(constant(*tensor)) : std::nullopt;
}

std::string describe(torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::string text = "shape (";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::string describe(const Tensor& tensor) {
  return describe(tensor.sizes()) + ", " + name_of(tensor.scalar_type()) + (tensor.is_cpu() ? ", on cpu" : ", on mps");
}

}  // namespace torch_fused_lora
