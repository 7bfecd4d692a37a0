// Random numbers on mps come from a CPU generator of their own, so that seeding "mps" and "cpu" is as separate as on a
// Mac.
#pragma once

#include <ATen/core/Generator.h>

namespace emulator {

const at::Generator& default_generator();
at::Generator new_generator();
at::Generator host_generator(const at::Generator& generator);  // the CPU generator behind one of mps

}  // namespace emulator
