// What is launched for a shape, as JSON: for people and for records, not for launching.
#pragma once

#include <string>

#include "launch.h"

namespace torch_fused_lora {

/// The dispatches of a layer's forward and of its whole backward, all operands contiguous, without dropout and bias: an
/// array of {"direction", "kernel", "configuration", "threadgroups", "threads", "scratch_bytes"}. Throws
/// std::runtime_error where a plan refuses.
std::string describe_lora(
    uint64_t M, uint64_t K, uint64_t N, uint64_t r, Scalar dtype, Scalar adapter_dtype, uint32_t gpu_cores);

/// The same of RMS norm, with a weight of the rows' dtype, or of softmax on M rows of H elements.
std::string describe_rms_norm(uint64_t M, uint64_t H, Scalar dtype, uint32_t gpu_cores);
std::string describe_softmax(uint64_t M, uint64_t H, Scalar dtype, uint32_t gpu_cores);

}  // namespace torch_fused_lora
