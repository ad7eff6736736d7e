// Counters in global memory by which those who share a task learn who of them is last. The launches of a stream share them: a kernel that
// may start before the one ahead of it has ended draws no ticket before hopper::wait_for_dependencies.
#pragma once

#include "device.h"
#include "hopper/memory.cuh"

namespace llama4_kernels {

// By one thread of each of `count`: whether it is the last, which turns the counter back to 0 for the next launch. What the others wrote
// before, each of them ahead of its ticket, is seen by the last one's thread.
__device__ inline bool is_last_ticket(unsigned* counter, unsigned count) {
    const bool is_last = hopper::add_acquire_release(counter, 1) == count - 1;
    if (is_last) *counter = 0;
    return is_last;
}

}  // namespace llama4_kernels
