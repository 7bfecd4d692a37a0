// The extension's C functions, which torch_fused_lora/mps.py calls.
#pragma once

#include <cstdint>

extern "C" {
/// The number of the interface below and of the operators' schemas, and the package's version, as
/// torch_fused_lora/mps.py wants them. It finds this text in the file before it loads it.
__attribute__((visibility("default"))) const char* tfl_interface();
/// Once, before the first call: the GPU's number of cores, the versions that error messages name, and what overrides the
/// launch configurations (see set_overrides). Returns null, or what is wrong with the last.
__attribute__((visibility("default"))) const char* tfl_configure(
    uint32_t gpu_cores, const char* platform, const char* overrides);
/// How many kernels are compiled so far, in how many seconds, and how many contiguous copies of operands were made.
__attribute__((visibility("default"))) uint64_t tfl_compiled_kernels();
__attribute__((visibility("default"))) double tfl_compile_seconds();
__attribute__((visibility("default"))) uint64_t tfl_contiguous_copies();
}
