#pragma once

#include "device.h"
#include "indices.h"

namespace llama4_kernels {

__device__ inline int64_t at(const Indices& indices, int64_t i) {
    return indices.is_int64 ? static_cast<const int64_t*>(indices.values)[i] : static_cast<const int32_t*>(indices.values)[i];
}

}  // namespace llama4_kernels
