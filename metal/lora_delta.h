// What lora_delta and its launch plan agree on.
#pragma once

#include "sizes.h"

namespace tfl {

enum class Mask { none, input, output };

enum DeltaBuffers {
  DELTA_X,
  DELTA_LORA_A,
  DELTA_LORA_B,
  DELTA_Y,
  DELTA_H,
  DELTA_PARTIAL,
  DELTA_SCALING,
  DELTA_SEED,
  DELTA_M_K,
  DELTA_N_COLUMNS,
  DELTA_RANKS,
  DELTA_X_LEVELS,
  DELTA_X_STRIDES,
  DELTA_A_STRIDES,
  DELTA_B_STRIDES,
  DELTA_Y_STRIDE_FLAGS,
  DELTA_DROPOUT_WORDS,
  DELTA_STREAM_H_STRIDE,
  DELTA_K_SPLITS,
};

enum DeltaFlags {
  DELTA_WIDE_X = 1,
  DELTA_WIDE_A = 2,
  DELTA_WIDE_B = 4,
  DELTA_WIDE_Y = 8,
  DELTA_SAVE_H = 16,
  DELTA_DOWN = 32,  // stage 1 is to be done
  DELTA_UP = 64,    // and stage 2
};

enum DeltaSizes { DELTA_SIMDGROUPS = 8 };  // at most

/// Columns of a tile: wider ones mean fewer barriers; what fits 32 KiB narrows as the rank grows.
constexpr short delta_width(short rank_blocks) { return rank_blocks <= 8 ? 64 : rank_blocks <= 16 ? 32 : 16; }

/// Blocks of rows that a simdgroup has: it multiplies them with each block of A or B that it reads.
constexpr short delta_blocks(short rank_blocks, short row_blocks) {
  return rank_blocks <= 16 && row_blocks > 1 ? 2 : 1;
}

}  // namespace tfl
