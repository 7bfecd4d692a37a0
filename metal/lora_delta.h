// What lora_delta and its launch plan agree on.
#pragma once

#include "sizes.h"

namespace tfl {

/// The dispatches of lora_delta: h = x A^T, then y += s h B^T.
enum class Stage { down, up };

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
  DELTA_FLAGS_STREAM,
  DELTA_DROPOUT_WORDS,
  DELTA_K_SPLITS,
  DELTA_H_STRIDE,
};

enum DeltaFlags { DELTA_WIDE_X = 1, DELTA_WIDE_A = 2, DELTA_WIDE_B = 4, DELTA_WIDE_Y = 8, DELTA_SAVE_H = 16 };

enum DeltaSizes {
  DELTA_SIMDGROUPS = 8,
  DELTA_HELD = 8,        // blocks of ranks of h that a simdgroup has room for in registers
  DELTA_CHUNK = 4,       // blocks of ranks of a tile of B where h is not held
};

/// Simdgroups that share the ranks of h in the first stage, so that each has at most DELTA_HELD blocks of them.
constexpr short delta_rank_groups(short rank_blocks) {
  return rank_blocks <= DELTA_HELD ? 1 : rank_blocks <= 2 * DELTA_HELD ? 2 : 4;
}

/// Columns of a tile of x: wider ones mean fewer barriers; what fits 32 KiB narrows as the rank grows.
constexpr short delta_width(short rank_blocks) { return rank_blocks <= 2 ? 128 : 64 / delta_rank_groups(rank_blocks); }

/// Blocks of rows that a simdgroup has: it multiplies them with each block of A or B that it reads.
constexpr short delta_blocks(short row_blocks) { return row_blocks > 1 ? 2 : 1; }

/// Columns of a tile of y: wider ones keep more of y on its way at once, where threadgroup memory has room for them.
constexpr short delta_columns(short row_blocks, short rank_blocks) {
  return row_blocks > 2 && rank_blocks <= 2 ? 128 : 64;
}

/// Blocks of rows of a threadgroup in the second stage, whose threadgroup memory has room for their h.
constexpr short delta_up_rows(short row_blocks, short rank_blocks) {
  return rank_blocks > DELTA_HELD && row_blocks > 2 ? 2 : row_blocks;
}

}  // namespace tfl
