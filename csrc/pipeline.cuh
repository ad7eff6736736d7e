// The ring of shared-memory stages between the warps that load and the warpgroups that multiply.
#pragma once

#include "hopper/barrier.cuh"

namespace llama4_kernels {

// The stage in turn, and the parity of its round.
template <int STAGES>
struct PipelinePosition {
    int stage = 0;
    unsigned parity = 0;

    __device__ void advance() {
        if (++stage < STAGES) return;
        stage = 0;
        parity ^= 1;
    }
};

template <int STAGES>
struct Pipeline {
    hopper::Barrier full[STAGES], empty[STAGES];

    // Arrivals per round: of loaders at `full`, of consumers at `empty`. By one thread, before a barrier of the block.
    __device__ void init(unsigned full_arrivals, unsigned empty_arrivals) {
        for (int stage = 0; stage < STAGES; ++stage) {
            full[stage].init(full_arrivals);
            empty[stage].init(empty_arrivals);
        }
        hopper::fence_barrier_init();
    }

    __device__ void wait_until_empty(PipelinePosition<STAGES> at) { empty[at.stage].wait(at.parity ^ 1); }
    __device__ void wait_until_full(PipelinePosition<STAGES> at) { full[at.stage].wait(at.parity); }
};

}  // namespace llama4_kernels
