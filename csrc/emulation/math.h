// Host twin of hopper/math.cuh.
#pragma once

#include <cmath>

namespace llama4_kernels::hopper {

inline float exp2_approximate(float x) { return std::exp2(x); }

}  // namespace llama4_kernels::hopper
