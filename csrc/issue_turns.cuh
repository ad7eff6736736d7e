// Whose turn it is to issue products, of a block with two multiplying warpgroups.
#pragma once

#include "hopper/barrier.cuh"

namespace llama4_kernels {

// Two warpgroups issue their products by turns, so that the tensor cores have the one's while the other adds up what it has. Both take
// equally many turns.
template <bool ENABLED>
class IssueTurns {
public:
    __device__ explicit IssueTurns(int warpgroup) : warpgroup_(warpgroup) {
        if (warpgroup_ == 1) pass();
    }

    __device__ void take() {
        if (ENABLED) hopper::named_barrier_sync(FIRST_BARRIER + warpgroup_, 2 * hopper::WARPGROUP);
    }

    __device__ void pass() {
        if (ENABLED) hopper::named_barrier_arrive(FIRST_BARRIER + 1 - warpgroup_, 2 * hopper::WARPGROUP);
    }

    // No barrier is left with half of its threads.
    __device__ void finish() {
        if (warpgroup_ == 0) take();
    }

private:
    static constexpr unsigned FIRST_BARRIER = 3;  // behind those of the epilogues

    int warpgroup_;
};

}  // namespace llama4_kernels
