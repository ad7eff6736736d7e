#pragma once

#include <cstdint>

#include <driver_types.h>

#include "dtype.h"

namespace llama4_kernels {

// x [rows, columns] of `dtype` -> codes [rows, columns] e4m3, scale [rows]. No alignment is asked of any pointer beyond its element's.
struct QuantizeArguments {
    const void* x;
    Dtype dtype;
    int64_t rows, columns;
    uint8_t* codes;
    float* scale;
};

void quantize_per_token(const QuantizeArguments& arguments, cudaStream_t stream);

// x [elements] of `dtype`, scale [] -> codes [elements] e4m3, saturated to ±448. As to alignment, the same.
struct QuantizeStaticArguments {
    const void* x;
    Dtype dtype;
    int64_t elements;
    const float* scale;
    uint8_t* codes;
};

void quantize_static(const QuantizeStaticArguments& arguments, cudaStream_t stream);

}  // namespace llama4_kernels
