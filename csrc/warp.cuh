// What the lanes of a warp do together. All of them call.
#pragma once

#include "device.h"
#include "hopper/layout.cuh"

namespace llama4_kernels {

using hopper::WARP;
using hopper::WARPGROUP;

constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum of `value` over the lanes up to this one.
__device__ inline int inclusive_sum(int value) {
    const int lane = threadIdx.x % WARP;
    for (int distance = 1; distance < int(WARP); distance *= 2) {
        const int lower = __shfl_up_sync(ALL_LANES, value, distance);
        if (lane >= distance) value += lower;
    }
    return value;
}

}  // namespace llama4_kernels
