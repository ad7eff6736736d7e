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

__device__ inline void store_release(unsigned* to, unsigned value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// Add and give the old value: a ticket. Publishes this thread's writes, and sees those published by earlier tickets.
__device__ inline unsigned add_acquire_release(unsigned* to, unsigned value) {
    unsigned old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(to), "r"(value) : "memory");
    return old;
}

// Bring the line of this address into L2.
__device__ inline void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory"); }

// 16 bytes that this block reads once: not kept in L1.
__device__ inline uint4 load_once(const void* from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}

}  // namespace llama4_kernels::hopper

#endif
