// What sum_splits and its launch plan agree on.
#pragma once

#include "sizes.h"

namespace tfl {

enum SumBuffers { SUM_FIRST_PARTIAL, SUM_SECOND_PARTIAL, SUM_FIRST, SUM_SECOND, SUM_ELEMENTS, SUM_SPLITS };

enum SumSizes {
  SUM_THREADS = 256,
  SUM_SLICES = 8,  // threads an element, where it has more partial sums than that
};

}  // namespace tfl
