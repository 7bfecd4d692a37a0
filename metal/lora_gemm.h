// What lora_gemm and its launch plan agree on.
#pragma once

#include "sizes.h"

namespace tfl {

enum GemmBuffers {
  GEMM_X,
  GEMM_WEIGHT,
  GEMM_SCALES,
  GEMM_BIASES,
  GEMM_BIAS,
  GEMM_H,
  GEMM_FACTOR,
  GEMM_Y,
  GEMM_SCALING,
  GEMM_SEED,
  GEMM_ROWS_TERMS,
  GEMM_COLUMNS_RANKS,
  GEMM_X_LEVELS,
  GEMM_X_STRIDES,
  GEMM_W_LAYOUT,
  GEMM_FACTOR_STRIDES,
  GEMM_FLAGS_BIAS_STRIDE,
  GEMM_DROPOUT_WORDS,
  GEMM_SPLIT_TERMS,
};

enum GemmFlags {
  GEMM_HAS_BIAS = 1,
  GEMM_WIDE_X = 2,
  GEMM_WIDE_W = 4,
  GEMM_WIDE_H = 8,
  GEMM_WIDE_FACTOR = 16,
  GEMM_WIDE_Y = 32,
};

/// Of a threadgroup's tiles, and of its simdgroups: two beside each other in both directions.
enum GemmSizes { GEMM_COLUMNS = 64, GEMM_DEPTH = 16, GEMM_SIMDGROUPS = 4 };

}  // namespace tfl
