// Codes in e4m3: what a scale is made of, and what is divided by it.
#pragma once

#include "device.h"

namespace llama4_kernels {

constexpr float E4M3_MAX = 448.0f;

// |value| as an integer: the order of the floats, with infinity above them and NaN on top, so that a NaN reaches the scale.
__device__ inline unsigned magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// What becomes a code: value / scale, or 0 where the scale is 0, as it is of zeros alone and of magnitudes too small for it.
__device__ inline float divide(float value, float scale) { return scale == 0.0f ? 0.0f : value / scale; }

// value / scale from the reciprocal, to its last bit where nothing on the way overflows or is below the least normal number: a product and
// one correction.
__device__ inline float quotient(float value, float scale, float reciprocal) {
    const float product = value * reciprocal;
    return fmaf(fmaf(-product, scale, value), reciprocal, product);
}

// The same, but infinite where the quotient is too large for a float. With reciprocal_of's reciprocal, 0 where the scale is below the least
// normal number.
__device__ inline float divide(float value, float scale, float reciprocal) {
    const float product = value * reciprocal;
    return magnitude(product) == 0x7f800000u ? product : quotient(value, scale, reciprocal);
}

__device__ inline float reciprocal_of(float scale) { return scale < 0x1p-126f ? 0.0f : 1.0f / scale; }

}  // namespace llama4_kernels
