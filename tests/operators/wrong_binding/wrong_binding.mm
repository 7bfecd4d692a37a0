// An operator on csrc/mps/kernels.mm whose plan may say another number of tensors than it binds, and which may bind one
// at a wrong index: y = x + 2 with x, y, a constant 1 and a word 1.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace {

constexpr const char* source = R"(
#include <metal_stdlib>
using namespace metal;

[[kernel]] void add_two(
    device const float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant float& one [[buffer(2)]],
    constant uint& word [[buffer(3)]],
    uint i [[thread_position_in_grid]]) {
  y[i] = x[i] + one + float(word);
}
)";

torch::stable::Tensor add_two(
    const torch::stable::Tensor& x, const torch::stable::Tensor& one, int64_t planned, int64_t at) {
  const torch::stable::Tensor y = torch::stable::empty_like(x);
  const torch_fused_lora::Launch launch = {
      source, "add_two", {static_cast<uint32_t>(x.numel()), 1, 1}, {1, 1, 1}, static_cast<uint32_t>(planned), 1, {1}};
  torch_fused_lora::Dispatches dispatches;
  dispatches.add(launch, {{1, y}, torch_fused_lora::Binding::constant(static_cast<uint32_t>(at), one), {0, x}});
  dispatches.encode();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wrong_binding, MPS, m) { m.impl("add_two", TORCH_BOX(&add_two)); }
