// Registers moved between the warpgroups of a warp-specialised block.
#pragma once

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/registers.h"
#else

namespace llama4_kernels::hopper {

// Raise or lower the calling warpgroup's registers per thread to COUNT, a multiple of 8 from 24 to 256. By all of its threads.
template <int COUNT>
__device__ inline void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ inline void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace llama4_kernels::hopper

#endif
