// What a kernel file uses of CUDA beside the language, in two builds: nvcc's, and the host's (emulation/device.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/device.h"
#else
#include <cuda_runtime.h>
#endif

namespace llama4_kernels {

struct LaunchConfig {
    const char* op;
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
    cudaStream_t stream;
};

#ifdef LLAMA4_KERNELS_EMULATION

template <class T>
T* shared_memory() {
    return static_cast<T*>(emulation::shared_memory());
}

template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments... arguments) {
    emulation::run(config.op, config.grid, config.block, config.shared_bytes, [=] { kernel(arguments...); });
}

#else

// The block's dynamic shared memory. Kernels use no other, so that the emulation can watch all of it.
template <class T>
__device__ T* shared_memory() {
    extern __shared__ uint4 dynamic_shared_memory[];
    return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Throws std::runtime_error where the launch is refused.
template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments... arguments) {
    cudaLaunchConfig_t cuda_config{};
    cuda_config.gridDim = config.grid;
    cuda_config.blockDim = config.block;
    cuda_config.dynamicSmemBytes = config.shared_bytes;
    cuda_config.stream = config.stream;
    const cudaError_t error = cudaLaunchKernelEx(&cuda_config, kernel, Parameters(arguments)...);
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(config.op) + ": CUDA refused the launch: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
    }
}

#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline dim3 grid_of(int64_t blocks) {
    if (blocks > std::numeric_limits<int32_t>::max()) throw std::length_error(std::to_string(blocks) + " blocks exceed CUDA's grid");
    return dim3(unsigned(blocks));
}

}  // namespace llama4_kernels
