#include "products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_mps.h>

#include <algorithm>

namespace torch_fused_lora {
namespace {

// What is wrong or slow on some Mac and never asked of torch, by the issues of pytorch/pytorch; the emulated device
// refuses it:
// - linear and matmul of more than two dimensions: another result each time on M5 (#180776, #181936), wrong ones with a
//   bias (#192934, #189495), an abort (#197796), 8 times slower for a row a batch (#189847);
// - linear of a single row with a bias: the bias is lost (#188438; torch's own way out is to add it afterwards, too);
// - an empty reduction: aborts the process (#190050);
// - a reduction of 32,767 or more: reads past the operands on M1 and M2 (#177116, #195163).
// Long sums are split on every GPU and under every torch: one rule, one result, and beside so many products a pass over
// the result is cheap. torch 2.14 has a way round of its own, from a reduction of 32,769 on.
constexpr int64_t kLongReduction = 32767;
constexpr int64_t kPart = 32704;  // the multiple of 64 below: parts of aligned operands are aligned

template <typename... Operands>
Tensor call_product(const char* name, const Operands&... operands) {
  return as_contiguous(call<Tensor>(name, "", operands...));
}

/// The stable ABI has no addition.
Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

}  // namespace

void add_product(const Tensor& sum, const Tensor& left, const Tensor& right) {
  // The dispatcher's stable ABI takes no Scalar.
  check_status(aoti_torch_mps_addmm_out(sum.get(), sum.get(), left.get(), right.get(), 1.0, 1.0), "aten::addmm");
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const bool whole = x.size(1) > 0 && x.size(1) < kLongReduction;
  if (whole && (x.size(0) > 1 || !bias.has_value())) return call_product("aten::linear", x, weight, bias);
  const Tensor y = whole ? call_product("aten::linear", x, weight, OptionalTensor()) : product(x, transposed(weight));
  return bias.has_value() ? add(y, *bias) : y;
}

Tensor product(const Tensor& left, const Tensor& right) {
  const int64_t terms = left.size(1);
  if (left.numel() == 0 || right.numel() == 0) {
    const std::vector<int64_t> shape = {left.size(0), right.size(1)};
    return torch::stable::new_zeros(left, shape);
  }
  if (terms < kLongReduction) return call_product("aten::mm", left, right);
  OptionalTensor sum;
  for (int64_t begin = 0; begin < terms; begin += kPart) {
    const int64_t count = std::min(kPart, terms - begin);
    Tensor columns = left, rows = right;
    columns = torch::stable::narrow(columns, 1, begin, count);
    rows = torch::stable::narrow(rows, 0, begin, count);
    const Tensor part = call_product("aten::mm", columns, rows);
    sum = sum.has_value() ? add(*sum, part) : part;
  }
  return *sum;
}

}  // namespace torch_fused_lora
