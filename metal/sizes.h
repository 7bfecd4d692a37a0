// Sizes that the kernels of several families and their launch plans share. As every header of metal/ that names no
// address space, it is read by Metal and by C++.
#pragma once

namespace tfl {

enum Sizes {
  LANES = 32,       // of a simdgroup
  RUN = 8,          // neighbouring elements that a thread reads or writes at a time
  BLOCK = 8,        // rows and columns of a simdgroup matrix
  MAX_RANKS = 256,  // of one LoRA launch: what h in registers and the tiles in 32 KiB hold
};

/// How an operand's elements lie, as far as a kernel reads them in whole runs: those of a row or of a column,
/// contiguous, aligned to 16 bytes and a multiple of RUN, with all rows one stride apart. A kernel for `any` reads any
/// operand.
enum class Layout { any, rows, columns };

/// Elements of a row that so many simdgroups have at a time, a run a lane.
constexpr short row_step(short simdgroups) { return LANES * simdgroups * RUN; }

/// Two arguments of a kernel, x and y, in the eight bytes of one buffer.
#ifdef __METAL_VERSION__
using Pair = uint2;
#else
struct Pair {
  unsigned int x, y;
};
#endif

}  // namespace tfl
