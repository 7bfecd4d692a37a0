// Dropout from a seed: the mask that torch_fused_lora/ops/dropout/ defines, drawn again wherever it is needed.
#pragma once

#include "operands.h"

namespace tfl {

/// Philox 4x32-7: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
METAL_FUNC uint4 philox(uint2 key, uint4 counter) {
  for (short round = 0; round < 7; ++round) {
    const uint2 multiplied = counter.xz;
    const uint2 factor = uint2(0xD2511F53u, 0xCD9E8D57u);
    const uint2 high = mulhi(multiplied, factor);
    const uint2 low = multiplied * factor;
    counter = uint4(high.y ^ counter.y ^ key.x, low.y, high.x ^ counter.w ^ key.y, low.x);
    key += uint2(0x9E3779B9u, 0xBB67AE85u);
  }
  return counter;
}

/// The keep-mask of one adapter, over the elements of an M x K matrix counted row by row. Eight elements share a
/// Philox counter; two share a word, which the second reads rotated by half its bits.
struct Dropout {
  uint2 seed;
  uint stream;
  uint threshold;
  float inverse_keep;

  /// Bit i: whether element 8 * counter + i is kept.
  METAL_FUNC uint keep_eight(ulong counter) const thread {
    const uint4 words = philox(seed, uint4(uint(counter), uint(counter >> 32), stream, 0));
    uint bits = 0;
    TFL_UNROLL
    for (short i = 0; i < 4; ++i) {
      bits |= uint(words[i] >= threshold) << (2 * i);
      bits |= uint(rotate(words[i], 16u) >= threshold) << (2 * i + 1);
    }
    return bits;
  }

  METAL_FUNC float apply(float value, ulong element) const thread {
    const bool keep = (keep_eight(element / RUN) >> uint(element % RUN) & 1) != 0;
    return keep ? value * inverse_keep : 0.0f;
  }

  /// The run that starts at element `first`, dropped and rescaled. One Philox call when it is aligned, else two.
  METAL_FUNC Run apply(Run run, ulong first) const thread {
    const uint shift = uint(first % RUN);
    uint bits = keep_eight(first / RUN);
    if (shift != 0) {
      bits = (bits | keep_eight(first / RUN + 1) << RUN) >> shift;
    }
    TFL_UNROLL
    for (short i = 0; i < RUN; ++i) {
      run.set(i, (bits >> i & 1) != 0 ? run.get(i) * inverse_keep : 0.0f);
    }
    return run;
  }
};

}  // namespace tfl
