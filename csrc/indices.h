#pragma once

#include <cstdint>

namespace llama4_kernels {

// A tensor of int32 or int64 on the device, as the caller happens to hold it.
struct Indices {
    const void* values;
    bool is_int64;
};

}  // namespace llama4_kernels
