// What lora_grad and its launch plan agree on.
#pragma once

#include "sizes.h"

namespace tfl {

enum GradBuffers {
  GRAD_X,
  GRAD_Z,
  GRAD_DY,
  GRAD_H,
  GRAD_DA,
  GRAD_DB,
  GRAD_SCALING,
  GRAD_SEED,
  GRAD_ROWS,
  GRAD_K_N,
  GRAD_RANKS,
  GRAD_X_LEVELS,
  GRAD_X_STRIDES,
  GRAD_DY_LEVELS,
  GRAD_DY_STRIDES,
  GRAD_FLAGS_STREAM,
  GRAD_DROPOUT_WORDS,
  GRAD_R_TILES,
};

enum GradFlags { GRAD_WIDE_X = 1, GRAD_WIDE_DY = 2, GRAD_WIDE_SMALL = 4 };

enum GradSizes { GRAD_SIMDGROUPS = 8, GRAD_DEPTH = 32 };

/// Blocks of a simdgroup's columns.
constexpr short grad_column_blocks(short rank_blocks) { return rank_blocks <= 8 ? 2 : 1; }

/// Columns of a threadgroup.
constexpr short grad_columns(short rank_blocks) { return BLOCK * grad_column_blocks(rank_blocks) * GRAD_SIMDGROUPS; }

/// Rows of a tile; a split of the rows is a multiple of GRAD_DEPTH.
constexpr short grad_depth(short rank_blocks) { return rank_blocks <= 16 ? GRAD_DEPTH : GRAD_DEPTH / 2; }

}  // namespace tfl
