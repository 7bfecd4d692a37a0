// What lora_decode and its launch plan agree on.
#pragma once

#include "sizes.h"

namespace tfl {

enum DecodeBuffers {
  DECODE_X,
  DECODE_WEIGHT,
  DECODE_BIAS,
  DECODE_LORA_A,
  DECODE_LORA_B,
  DECODE_Y,
  DECODE_H,
  DECODE_SCALING,
  DECODE_K_N,
  DECODE_RANK_ROWS,
  DECODE_X_LEVELS,
  DECODE_X_STRIDES,
  DECODE_W_STRIDES,
  DECODE_A_STRIDES,
  DECODE_B_STRIDES,
  DECODE_FLAGS_BIAS_STRIDE,
};

enum DecodeFlags { DECODE_HAS_BIAS = 1, DECODE_SAVE_H = 2 };

enum DecodeSizes {
  DECODE_MAX_ROWS = 8,  // of x: as many have their sums in registers; not timed
  DECODE_SIMDGROUPS = 16,
  DECODE_X_FLOATS = 4096,
  DECODE_H_FLOATS = DECODE_MAX_ROWS * MAX_RANKS,
};

static_assert(4 * (DECODE_X_FLOATS + DECODE_H_FLOATS) <= 32 << 10, "x and h fit threadgroup memory");

/// Columns of x that are staged at a time: a multiple of what a simdgroup reads at once, up to a run a lane.
constexpr short decode_chunk_columns(short rows) { return DECODE_X_FLOATS / rows / (LANES * RUN) * (LANES * RUN); }

}  // namespace tfl
