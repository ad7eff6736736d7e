// Thread-block clusters: blocks that run together and reach one another's shared memory. LaunchConfig::cluster_blocks sets their size.
#pragma once

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/cluster.h"
#else

#include <cstdint>

namespace llama4_kernels::hopper {

// This block's rank in its cluster, and the number of blocks there.
__device__ inline unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline unsigned cluster_size() {
    unsigned size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// A barrier of all threads of the cluster, in two halves: what is written before the arrival is seen after the wait.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// An arrival that publishes no plain writes, and does not wait for them: only barriers made visible by fence_barrier_init are seen.
__device__ inline void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ inline void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// The counterpart, in block `rank`, of `local` in this block's shared memory; may be read and written like any pointer until that block
// ends.
template <class T>
__device__ T* remote_shared(T* local, unsigned rank) {
    uint64_t remote;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
    return reinterpret_cast<T*>(remote);
}

}  // namespace llama4_kernels::hopper

#endif
