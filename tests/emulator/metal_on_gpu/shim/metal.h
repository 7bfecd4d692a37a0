// The Metal standard library for an NVIDIA GPU: that of metal_on_cpu but for executor.h.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma clang attribute push(__attribute__((always_inline)), apply_to = function)
#define AT_CALLER

// The shim's own loops go over components, lanes and arguments: values, once unrolled.
#define for _Pragma("clang loop unroll(full)") for
#include "../../metal_on_cpu/shim/types.h"
// exp is no instruction of the GPU's: executor.h has it.
namespace metal {
namespace executor {
template <typename T> T exp(T x);
}
}  // namespace metal
#define __builtin_elementwise_exp executor::exp
#include "../../metal_on_cpu/shim/math.h"
#include "../../metal_on_cpu/shim/simdgroup.h"
#include "../../metal_on_cpu/shim/simdgroup_matrix.h"
#include "executor.h"
#include "../../metal_on_cpu/shim/launch.h"
#undef for
#pragma clang attribute pop
