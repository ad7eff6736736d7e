// st.async: stores into the shared memory of another block of the cluster that an mbarrier there counts, as it counts the bytes of a copy.
#pragma once

#include "hopper/barrier.cuh"

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/copies.h"
#else

namespace llama4_kernels::hopper {

// Write `value` to the counterpart of `local`, a multiple of 8 bytes, in block `rank`. The counterpart of `barrier` there has been
// initialised; its phase waits for the bytes, and who has waited for the phase sees them. The other block must not end before.
template <class T>
__device__ inline void store_async(T* local, unsigned rank, T value, Barrier& barrier) {
    static_assert(sizeof(T) == sizeof(uint64_t));
    asm volatile(
        "{\n.reg .b32 to, counter;\n"
        "mapa.shared::cluster.u32 to, %0, %3;\n"
        "mapa.shared::cluster.u32 counter, %1, %3;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [to], %2, [counter];\n}" ::"r"(shared_address(local)),
        "r"(shared_address(&barrier)), "l"(reinterpret_cast<const uint64_t&>(value)), "r"(rank)
        : "memory");
}

}  // namespace llama4_kernels::hopper

#endif
