// cp.async: 16-byte copies by a thread from global to shared memory, for rows that no tensor map describes.
#pragma once

#include "hopper/barrier.cuh"

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/copies.h"
#else

namespace llama4_kernels::hopper {

// Copy 16 bytes, or write zeros where `valid` is false; `from` is not read then. Both addresses are multiples of 16. By a predicate: of a
// number of bytes that ptxas cannot see to be 0 or 16 it makes several instructions a copy.
__device__ inline void cp_async_16(void* to, const void* from, bool valid = true) {
    asm volatile(
        "{\n"
        ".reg .pred ignore;\n"
        "setp.eq.u32 ignore, %2, 0;\n"
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignore;\n"
        "}" ::"r"(shared_address(to)),
        "l"(from), "r"(unsigned(valid))
        : "memory");
}

// End this thread's group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until all but this thread's PENDING latest groups are complete.
template <int PENDING>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Arrive at `barrier`, as one of the arrivals that it was initialised with, once all copies of this thread so far are complete; at once
// where there are none. Who waits for the phase sees these copies, but not this thread's plain stores: they need an arrive() of their own.
// wgmma and TMA stores must not read the data before a fence_async_proxy that follows the completion, of the thread that copied or of all
// who wait.
__device__ inline void cp_async_arrive(Barrier& barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Orders plain and cp.async accesses to shared memory that this thread has done, or has waited for at a barrier, before later ones by TMA
// and wgmma. ptxas makes a MEMBAR of the block of it, which may wait for copies that the thread has under way.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace llama4_kernels::hopper

#endif
