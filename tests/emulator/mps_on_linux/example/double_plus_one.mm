// A whole MPS operator on PyTorch's stable C shim, y = 2 x + 1 for x of two dimensions in any strides: the shape of the
// real extension, small enough to test the emulator with.
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace {

constexpr const char* source = R"(
#include <metal_stdlib>
using namespace metal;

[[kernel]] void double_plus_one(
    device const float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant uint2& strides [[buffer(2)]],
    uint2 position [[thread_position_in_grid]],
    uint2 size [[threads_per_grid]]) {
  y[position.y * size.x + position.x] = 2 * x[position.y * strides.x + position.x * strides.y] + 1;
}
)";

AOTIMetalKernelFunctionHandle kernel() {
  static const AOTIMetalKernelFunctionHandle function = [] {
    AOTIMetalShaderLibraryHandle library;
    AOTIMetalKernelFunctionHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_mps_create_shader_library(source, &library));
    TORCH_ERROR_CODE_CHECK(aoti_torch_mps_get_kernel_function(library, "double_plus_one", &handle));
    return handle;
  }();
  return function;
}

struct Encoding {
  const torch::stable::Tensor &x, &y;
  AOTITorchError status = AOTI_TORCH_SUCCESS;

  AOTITorchError encode(AOTIMetalKernelFunctionHandle function) const {
    const int64_t strides = x.stride(0) | x.stride(1) << 32;  // a uint2
    const std::array<uint64_t, 2> threads = {uint64_t(x.size(1)), uint64_t(x.size(0))}, group = {32, 4};
    AOTITorchError status = aoti_torch_mps_start_encoding(function);
    if (!status) status = aoti_torch_mps_set_arg_tensor(function, 0, x.get());
    if (!status) status = aoti_torch_mps_set_arg_tensor(function, 1, y.get());
    if (!status) status = aoti_torch_mps_set_arg_int(function, 2, strides);
    if (!status) status = aoti_torch_mps_dispatch_array_with_group_size(function, threads.data(), 2, group.data(), 2);
    return status;
  }
};

torch::stable::Tensor double_plus_one(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(
      x.dim() == 2 && x.scalar_type() == torch::headeronly::ScalarType::Float,
      "double_plus_one: x is a float32 matrix");
  torch::stable::Tensor y = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return y;
  Encoding encoding{x, y};
  TORCH_ERROR_CODE_CHECK(aoti_torch_mps_run_command_block(
      kernel(),
      [](AOTIMetalKernelFunctionHandle function, void* data) {
        auto& encoding = *static_cast<Encoding*>(data);
        encoding.status = encoding.encode(function);
      },
      &encoding));
  TORCH_ERROR_CODE_CHECK(encoding.status);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mps_on_linux, MPS, m) { m.impl("double_plus_one", TORCH_BOX(&double_plus_one)); }
