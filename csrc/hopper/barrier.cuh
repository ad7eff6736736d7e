// mbarriers and named barriers. PTX ISA, "Parallel Synchronization and Communication Instructions".
#pragma once

#include "hopper/layout.cuh"

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/barrier.h"
#else

namespace llama4_kernels::hopper {

// Address in the shared-memory window of a generic pointer into it.
__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// An mbarrier, in shared memory. Its phases complete one after another, each when all arrivals and all expected bytes have come.
struct Barrier {
    // arrivals: how many each phase waits for. By one thread, which then calls fence_barrier_init before the block's next barrier.
    __device__ void init(unsigned arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
    }

    __device__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory"); }

    // Arrive as so many.
    __device__ void arrive_for(unsigned arrivals) {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
    }

    // Arrive, and make the phase wait for `bytes` of asynchronous copies as well.
    __device__ void arrive_expect(unsigned bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes) : "memory");
    }

    // Arrive at the barrier of the same offset in block `rank` of the cluster. Products and copies that were waited for are over; plain
    // writes are not made visible there, which would cost a fence of the whole GPU.
    __device__ void arrive_remote(unsigned rank) {
        asm volatile(
            "{\n.reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(this)),
            "r"(rank)
            : "memory");
    }

    // Until the phase of this parity has completed. The first phase has parity 0; a new barrier counts as having completed one of parity 1.
    __device__ void wait(unsigned parity) {
        while (!try_wait(parity)) {
        }
    }

    uint64_t state;

private:
    // The hardware may put the thread to sleep, for as long as it likes, until the phase completes: only for who has nothing else to do.
    __device__ bool try_wait(unsigned parity) {
        unsigned done;
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(shared_address(this)), "r"(parity)
            : "memory");
        return done;
    }
};

// Makes initialised barriers visible to asynchronous copies and to the cluster.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Barrier `id` (1–15; 0 is __syncthreads) among `threads` threads, whole warps, of the block.
__device__ inline void named_barrier_sync(unsigned id, unsigned threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Count as one of the `threads` of named_barrier_sync without waiting for them.
__device__ inline void named_barrier_arrive(unsigned id, unsigned threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace llama4_kernels::hopper

#endif
