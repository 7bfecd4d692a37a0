// What rms_norm, rms_norm_backward and their launch plans agree on.
#pragma once

namespace tfl {

enum NormBuffers {
  NORM_X,
  NORM_WEIGHT,
  NORM_Y,
  NORM_RSTD,
  NORM_M_H,
  NORM_BLOCKS_FLAGS,
  NORM_X_LEVELS,
  NORM_X_STRIDES,
  NORM_WEIGHT_STRIDE_EPS,
};

enum NormBackwardBuffers {
  NORM_BACKWARD_GRAD,
  NORM_BACKWARD_X,
  NORM_BACKWARD_WEIGHT,
  NORM_BACKWARD_RSTD,
  NORM_BACKWARD_DX,
  NORM_BACKWARD_DWEIGHT,
  NORM_BACKWARD_M_H,
  NORM_BACKWARD_BLOCKS_FLAGS,
  NORM_BACKWARD_GRAD_LEVELS,
  NORM_BACKWARD_GRAD_STRIDES,
  NORM_BACKWARD_X_LEVELS,
  NORM_BACKWARD_X_STRIDES,
  NORM_BACKWARD_WEIGHT_STRIDE,
};

/// Runs that a thread has of a row at a time: they are on their way at once, and share the sum over the row.
enum NormSizes { NORM_RUNS = 2 };

enum NormFlags { NORM_HAS_WEIGHT = 1, NORM_NEED_X = 2, NORM_NEED_WEIGHT = 4 };

}  // namespace tfl
