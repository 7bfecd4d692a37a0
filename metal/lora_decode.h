// What lora_decode and its launch plan agree on.
#pragma once

#include "sizes.h"

namespace tfl {

enum DecodeBuffers {
  DECODE_X,
  DECODE_WEIGHT,
  DECODE_SCALES,
  DECODE_BIASES,
  DECODE_BIAS,
  DECODE_LORA_A,
  DECODE_LORA_B,
  DECODE_Y,
  DECODE_H,
  DECODE_H_SUMS,
  DECODE_SCALING,
  DECODE_K_N,
  DECODE_RANK_ROWS,
  DECODE_X_LEVELS,
  DECODE_X_STRIDES,
  DECODE_W_LAYOUT,
  DECODE_A_STRIDES,
  DECODE_B_STRIDES,
  DECODE_FLAGS_BIAS_STRIDE,
  DECODE_SLICES,
};

enum DecodeFlags {
  DECODE_HAS_BIAS = 1,
  DECODE_SAVE_H = 2,
  DECODE_WIDE_A = 4,  // and x
  DECODE_WIDE_W = 8,  // and x
  DECODE_DOWN = 16,   // h is to be computed
  DECODE_UP = 32,     // and y
};

enum DecodeSizes {
  DECODE_MAX_ROWS = 8,  // of x: as many have their sums in registers
  DECODE_SIMDGROUPS = 8,
  DECODE_W_ROWS = 4,  // of W or A that a simdgroup reads at once
  DECODE_MOST_H = DECODE_W_ROWS * DECODE_MAX_ROWS,  // elements of h that a threadgroup computes
};

/// Neighbouring runs of a packed row that a lane reads at once, for so many rows of x: 16 bytes of 4-bit elements in
/// flight, as of half ones, where few sums take the registers.
constexpr short decode_packed_runs(short rows) { return rows <= 2 ? 4 : 2; }

}  // namespace tfl
