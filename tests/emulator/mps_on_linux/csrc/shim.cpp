// The C functions of PyTorch's MPS shim. An exception becomes an error status; its text is where PyTorch's own shim
// puts it.
#include <ATen/ops/addmm.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_mps.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "counters.h"
#include "encoder.h"
#include "metal.h"
#include "queue.h"

namespace {

using namespace emulator;

// A handle by its real type; the header only declares opaque ones.
ShaderLibrary& library_of(AOTIMetalShaderLibraryHandle handle) {
  TORCH_CHECK(handle, "mps emulator: no shader library");
  return *reinterpret_cast<ShaderLibrary*>(handle);
}

const Kernel* kernel_of(AOTIMetalKernelFunctionHandle handle) {
  TORCH_CHECK(handle, "mps emulator: no kernel function");
  return reinterpret_cast<const Kernel*>(handle);
}

Encoder& encoder_of(AOTIMetalKernelFunctionHandle handle) { return Encoder::encoding(kernel_of(handle)); }

// aoti_torch_mps_malloc's buffers: opaque to the caller, as a Metal buffer is.
Block& block_of(void* buffer, size_t offset, size_t size) {
  auto* block = static_cast<Block*>(buffer);
  TORCH_CHECK(
      block && offset + size >= size && offset + size <= block->size, "mps emulator: a copy past the end of a buffer");
  return *block;
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_mps_create_shader_library(const char* source, AOTIMetalShaderLibraryHandle* library) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *library = reinterpret_cast<AOTIMetalShaderLibraryHandle>(compile(source)); });
}

// Kernels outlive their library, as pipeline states do: it stays.
AOTITorchError aoti_torch_mps_delete_shader_library(AOTIMetalShaderLibraryHandle library) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ library_of(library); });
}

AOTITorchError aoti_torch_mps_get_kernel_function(
    AOTIMetalShaderLibraryHandle library, const char* name, AOTIMetalKernelFunctionHandle* function) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto& kernels = library_of(library).kernels;
    const auto found = kernels.find(name);
    TORCH_CHECK(found != kernels.end(), "Failed to create function state object for: ", name);
    *function = reinterpret_cast<AOTIMetalKernelFunctionHandle>(&found->second);
  });
}

void aoti_torch_mps_shared_callback(AOTIMetalKernelFunctionHandle func, void* user_data) {
  (*static_cast<std::function<void(AOTIMetalKernelFunctionHandle)>*>(user_data))(func);
}

AOTITorchError aoti_torch_mps_run_command_block(
    AOTIMetalKernelFunctionHandle func, aoti_torch_mps_command_block_callback_t callback, void* user_data) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    kernel_of(func);
    {
      const CommandBlock block;
      callback(func, user_data);
    }
    queue().run_ahead();
  });
}

AOTITorchError aoti_torch_mps_start_encoding(AOTIMetalKernelFunctionHandle func) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ Encoder::current().start(kernel_of(func)); });
}

AOTITorchError aoti_torch_mps_set_arg_tensor(
    AOTIMetalKernelFunctionHandle func, unsigned idx, AtenTensorHandle tensor) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { encoder_of(func).set_tensor(idx, *torch::aot_inductor::tensor_handle_to_tensor_pointer(tensor)); });
}

AOTITorchError aoti_torch_mps_set_arg_int(AOTIMetalKernelFunctionHandle func, unsigned idx, int64_t val) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ encoder_of(func).set_bytes(idx, &val, sizeof val); });
}

AOTITorchError aoti_torch_mps_dispatch_single(AOTIMetalKernelFunctionHandle func, uint64_t length) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { encoder_of(func).dispatch(length, std::min<uint64_t>(length, kernel_of(func)->max_threads)); });
}

AOTITorchError aoti_torch_mps_dispatch_single_with_group_size(
    AOTIMetalKernelFunctionHandle func, uint64_t length, uint64_t group_size) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ encoder_of(func).dispatch(length, group_size); });
}

AOTITorchError aoti_torch_mps_dispatch_array(
    AOTIMetalKernelFunctionHandle func, const uint64_t* length, size_t length_size) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const uint64_t group[3] = {kernel_of(func)->max_threads, 1, 1};
    encoder_of(func).dispatch({length, length_size}, {group, std::min<size_t>(length_size, 3)});
  });
}

AOTITorchError aoti_torch_mps_dispatch_array_with_group_size(
    AOTIMetalKernelFunctionHandle func,
    const uint64_t* length,
    size_t length_size,
    const uint64_t* group_size,
    size_t group_size_size) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { encoder_of(func).dispatch({length, length_size}, {group_size, group_size_size}); });
}

AOTITorchError aoti_torch_mps_addmm_out(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle mat1,
    AtenTensorHandle mat2,
    double beta,
    double alpha) {
  const auto& tensor = torch::aot_inductor::tensor_handle_to_tensor_pointer;
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    count_stable_call("aten::addmm");
    at::addmm_out(*tensor(out), *tensor(self), *tensor(mat1), *tensor(mat2), beta, alpha);
  });
}

AOTITorchError aoti_torch_mps_malloc(void** buffer, size_t num_bytes) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ *buffer = num_bytes ? allocate(num_bytes).release() : nullptr; });
}

AOTITorchError aoti_torch_mps_free(void* ptr) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ BlockPtr::reclaim(static_cast<Block*>(ptr)); });
}

AOTITorchError aoti_torch_mps_memcpy(
    void* buffer, size_t constant_offset, size_t bytes_read, size_t data_size, uint8_t* constants_start) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    memcpy(
        block_of(buffer, constant_offset, data_size).host + constant_offset, constants_start + bytes_read, data_size);
  });
}

AOTITorchError aoti_torch_mps_copy_buffer(
    void* src_buffer, void* dst_buffer, size_t data_size, size_t src_offset, size_t dst_offset) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    auto from = share(block_of(src_buffer, src_offset, data_size));
    auto to = share(block_of(dst_buffer, dst_offset, data_size));
    queue().push([=] { memcpy(to->host + dst_offset, from->host + src_offset, data_size); });
  });
}

}  // extern "C"
