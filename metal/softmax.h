// What softmax, softmax_backward and their launch plans agree on.
#pragma once

namespace tfl {

enum SoftmaxBuffers {
  SOFTMAX_X,
  SOFTMAX_Y,
  SOFTMAX_M_H,
  SOFTMAX_BLOCKS,
  SOFTMAX_X_LEVELS,
  SOFTMAX_X_STRIDES,
};

enum SoftmaxBackwardBuffers {
  SOFTMAX_BACKWARD_GRAD,
  SOFTMAX_BACKWARD_Y,
  SOFTMAX_BACKWARD_DX,
  SOFTMAX_BACKWARD_M_H,
  SOFTMAX_BACKWARD_BLOCKS,
  SOFTMAX_BACKWARD_GRAD_LEVELS,
  SOFTMAX_BACKWARD_GRAD_STRIDES,
  SOFTMAX_BACKWARD_Y_LEVELS,
  SOFTMAX_BACKWARD_Y_STRIDES,
};

/// Runs that a thread has of a row at a time: they are on their way at once, and share the sum over the row.
enum SoftmaxSizes { SOFTMAX_RUNS = 4, SOFTMAX_BACKWARD_RUNS = 2 };

}  // namespace tfl
