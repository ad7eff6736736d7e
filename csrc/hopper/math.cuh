// Arithmetic that CUDA C++ has no intrinsic for.
#pragma once

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/math.h"
#else

namespace llama4_kernels::hopper {

// 2^x in one instruction: 2 ulp, denormals are zero.
__device__ inline float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

}  // namespace llama4_kernels::hopper

#endif
