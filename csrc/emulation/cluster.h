// Host twin of hopper/cluster.cuh.
#pragma once

#include "emulation/scheduler.h"

namespace llama4_kernels::hopper {

inline unsigned cluster_rank() { return emulation::scheduler().rank(); }
inline unsigned cluster_size() { return emulation::scheduler().blocks(); }

inline void cluster_arrive() {
    emulation::Rendezvous& cluster = emulation::scheduler().cluster().rendezvous;
    emulation::current().cluster_phase = cluster.generation + 1;
    emulation::scheduler().arrive(cluster);
}

inline void cluster_arrive_relaxed() { cluster_arrive(); }

inline void cluster_wait(emulation::Site site = emulation::Site::here()) {
    emulation::Rendezvous& cluster = emulation::scheduler().cluster().rendezvous;
    if (cluster.generation >= emulation::current().cluster_phase) return;
    cluster.waiting.push_back(&emulation::current());
    emulation::scheduler().wait(site, "the cluster");
}

inline void cluster_sync(emulation::Site site = emulation::Site::here()) {
    cluster_arrive();
    cluster_wait(site);
}

template <class T>
T* remote_shared(T* local, unsigned rank, emulation::Site site = emulation::Site::here()) {
    emulation::Block& own = *emulation::current().block;
    if (!own.holds(local)) emulation::scheduler().fail(site, "the pointer is not in this block's shared memory");
    emulation::Block& block = emulation::peer(rank, site, "an access to");
    return reinterpret_cast<T*>(block.shared.get() + (own.address(local) - emulation::FIRST_SHARED_ADDRESS));
}

}  // namespace llama4_kernels::hopper
