// The codes of bfloat16 rows in e4m3: quotients by a row's scale, with the bits of a division.
#pragma once

#include <cuda_fp8.h>

#include "e4m3.cuh"

namespace llama4_kernels::routing {

// The larger magnitudes of 8 columns of x and of `most`, as bfloat16 bits: of even columns below, of odd ones above.
__device__ inline unsigned larger(unsigned most, uint4 x) {
    for (const unsigned pair : {x.x, x.y, x.z, x.w}) most = __vmaxu2(most, pair & 0x7fff7fffu);
    return most;
}

// The 8 codes of 8 columns of x.
template <class Divide>
__device__ inline uint2 codes_of(uint4 x, Divide divide) {
    const unsigned pairs[] = {x.x, x.y, x.z, x.w};
    unsigned codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 values = make_float2(divide(__uint_as_float(pairs[i] << 16)), divide(__uint_as_float(pairs[i] & 0xffff0000u)));
        codes[i] = __nv_cvt_float2_to_fp8x2(values, __NV_SATFINITE, __NV_E4M3);
    }
    return make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
}

// Call `write` with the division of x by its row's scale.
template <class Write>
__device__ inline void divide_by(float scale, Write write) {
    // Far from what overflows or loses bits below the least normal number, one correction of the product gives the quotient's own bits
    if (scale > 0x1p-60f && scale < 0x1p60f) {
        const float reciprocal = 1.0f / scale;
        write([=](float value) { return quotient(value, scale, reciprocal); });
    } else {
        write([=](float value) { return scale == 0.0f ? 0.0f : value / scale; });
    }
}

}  // namespace llama4_kernels::routing
