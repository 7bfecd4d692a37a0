// torch's tensors through the stable ABI: allocating, checking, and how the kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "../plan/launch.h"
#include "kernels.h"

namespace torch_fused_lora {

using torch::headeronly::ScalarType;

/// An operator of torch's that the stable ABI has no function for.
template <typename Result, typename... Arguments>
Result call(const char* name, const char* overload, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  check_status(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION), name);
  return torch::stable::detail::to<Result>(stack[0]);
}

/// Contiguous, on like's device.
Tensor empty(const std::vector<int64_t>& shape, const Tensor& like);
Tensor empty_float(const std::vector<int64_t>& shape, const Tensor& like);

/// A contiguous tensor in another shape, as a tensor of its own: autograd would forbid to write to a view.
Tensor with_shape(const Tensor& tensor, const std::vector<int64_t>& shape);

/// The tensor's shape, with another last dimension.
std::vector<int64_t> with_last(const Tensor& tensor, int64_t last);

/// A tensor as the kernels see it. `tensor` is a contiguous copy where they could not read the original: where its
/// leading dimensions do not fold into two levels of rows, or none of its dimensions has unit stride.
struct Rows {
  Tensor tensor;
  Operand operand;
};

Rows rows_of(const Tensor& tensor);

/// The same with one level of rows, for torch's own products: `tensor` has two dimensions, and is a contiguous copy
/// where the original has no such view.
Rows as_matrix(Rows rows);

/// The tensor, or a copy; where nothing is to be done, without a call of the dispatcher.
Tensor as_contiguous(const Tensor& tensor);

/// How many contiguous copies of operands were made so far.
uint64_t contiguous_copies();

/// What set_arg_tensor binds as a constant: a 0-dim tensor whose storage starts with its value.
Tensor constant(const Tensor& tensor);
OptionalTensor constant(const OptionalTensor& tensor);

bool has_shape(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef shape);

/// On mps, with the same shape and dtype.
bool is_alike(const Tensor& tensor, const Tensor& other);

/// `scalar` is for the dtypes that are supported alone; `kSupported` is what errors say of them.
bool is_supported(ScalarType dtype);
extern const char kSupported[];
Scalar scalar(ScalarType dtype);

const char* name_of(ScalarType dtype);

/// "shape (3, 4)"
std::string describe(torch::headeronly::IntHeaderOnlyArrayRef shape);

/// "shape (3, 4), torch.float16, on mps"
std::string describe(const Tensor& tensor);

/// The checks of one operator, which its errors name. The parts of `expected` are put together only where they are
/// needed.
struct Expect {
  const char* op;

  template <typename... Parts>
  void operator()(bool holds, const char* name, const Tensor& got, const Parts&... expected) const {
    if (holds) return;
    STD_TORCH_CHECK(false, op, ": ", name, ": expected ", expected..., "; got ", describe(got));
  }
};

}  // namespace torch_fused_lora
