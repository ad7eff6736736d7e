// How route_top1 compares logits with their experts: as integers.
#pragma once

#include "e4m3.cuh"

namespace llama4_kernels::routing {

using Key = unsigned long long;

// Its order is that of the logits, NaN on top; among equal ones the lowest expert's is the largest. 0 is below all of them.
__device__ inline Key rank_key(float logit, int expert) {
    const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
    const unsigned ordered = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    return Key(ordered) << 32 | (~0u - unsigned(expert));
}

__device__ inline int expert_of(Key key) { return int(~0u - unsigned(key)); }

__device__ inline float score_of(Key key) {
    const unsigned ordered = unsigned(key >> 32);
    const float logit = __uint_as_float(ordered == ~0u ? 0x7fffffffu : ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
    return 1.0f / (1.0f + expf(-logit));
}

}  // namespace llama4_kernels::routing
