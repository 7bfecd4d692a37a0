// The Metal standard library as far as compute kernels use it, for clang's OpenCL C++. Every shim function is inlined.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma clang attribute push(__attribute__((always_inline)), apply_to = function)

// For a function that touches a kernel's memory or waits: it carries no source position of its own, so that a finding
// names the line of the kernel that calls it.
#define AT_CALLER __attribute__((nodebug))

// Names that OpenCL has types for.
#define atomic_int metal_atomic_int
#define atomic_uint metal_atomic_uint
#define atomic_float metal_atomic_float

#include "types.h"
#include "math.h"
#include "executor.h"
#include "simdgroup.h"
#include "simdgroup_matrix.h"
#include "collective.h"
#include "atomic.h"
#include "launch.h"
#pragma clang attribute pop
