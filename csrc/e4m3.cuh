// Codes in e4m3: what a scale is made of.
#pragma once

#include "device.h"

namespace llama4_kernels {

constexpr float E4M3_MAX = 448.0f;

// |value| as an integer: the order of the floats, with infinity above them and NaN on top, so that a NaN reaches the scale.
__device__ inline unsigned magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

}  // namespace llama4_kernels
