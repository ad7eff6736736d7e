// Global memory with an order or a cache hint, for counters that blocks share and for data that is used once.
#pragma once

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/memory.h"
#else

namespace llama4_kernels::hopper {

// Read what another block published; what it wrote before its release is seen afterwards.
__device__ inline unsigned load_acquire(const unsigned* from) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// Add and give the old value: a ticket. Publishes this thread's writes, and sees those published by earlier tickets.
__device__ inline unsigned add_acquire_release(unsigned* to, unsigned value) {
    unsigned old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(to), "r"(value) : "memory");
    return old;
}

// Bring the line of this address into L2.
__device__ inline void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory"); }

}  // namespace llama4_kernels::hopper

#endif
