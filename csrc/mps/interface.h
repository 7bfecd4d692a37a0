// The extension's C functions, which torch_fused_lora/mps.py calls.
#pragma once

#include <cstdint>

#define TFL_EXPORT __attribute__((visibility("default")))

extern "C" {
/// The number of the interface below and of the operators' schemas, and the package's version, as
/// torch_fused_lora/mps.py wants them. It finds this text in the file before it loads it.
TFL_EXPORT const char* tfl_interface();
/// Once, before the first call: the GPU's number of cores, the versions that error messages name, and what overrides
/// launch configurations (see set_overrides). Returns null, or what is wrong with the last.
TFL_EXPORT const char* tfl_configure(uint32_t gpu_cores, const char* platform, const char* overrides);
/// How many kernels are compiled so far, in how many seconds, and how many contiguous copies of operands were made.
TFL_EXPORT uint64_t tfl_compiled_kernels();
TFL_EXPORT double tfl_compile_seconds();
TFL_EXPORT uint64_t tfl_contiguous_copies();
/// What is launched for `operation`: "lora_linear" by four numbers, M, K, N and r, "rms_norm" and "softmax" by M and H.
/// JSON (see describe.h), or an object with the key "error"; it lives until the thread's next call. Dtypes are a
/// Scalar's numbers; no cores are this GPU's.
TFL_EXPORT const char* tfl_describe(
    const char* operation, const uint64_t* shape, int32_t dtype, int32_t adapter_dtype, uint32_t gpu_cores);
/// What can be tuned, as JSON: kernel to field to numbers.
TFL_EXPORT const char* tfl_candidates();
/// Overrides (see tune) for lora_linear's forward or backward on a shape M, K, N, r. Returns null, or what is wrong.
TFL_EXPORT const char* tfl_tune(
    int32_t backward, const uint64_t* shape, int32_t dtype, int32_t adapter_dtype, const char* overrides);
}
