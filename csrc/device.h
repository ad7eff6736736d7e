// What a kernel file uses of CUDA beside the language, in two builds: nvcc's, and the host's (emulation/device.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

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
    unsigned cluster_blocks = 1;  // blocks of a cluster, along the grid's x
    bool dependent = false;       // programmatic dependent launch: see hopper/dependent_launch.cuh
};

#ifdef LLAMA4_KERNELS_EMULATION

template <class T>
T* shared_memory() {
    return static_cast<T*>(emulation::shared_memory());
}

template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments... arguments) {
    emulation::run(config.op, config.grid, config.block, config.shared_bytes, config.cluster_blocks, config.dependent,
                   [=] { kernel(arguments...); });
}

inline int multiprocessors() { return emulation::multiprocessors(); }

#else

// The block's dynamic shared memory. Kernels use no other, so that the emulation can watch all of it.
template <class T>
__device__ T* shared_memory() {
    extern __shared__ __align__(1024) uint8_t dynamic_shared_memory[];
    return reinterpret_cast<T*>(dynamic_shared_memory);
}

inline void check(cudaError_t error, const char* op, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(op) + ": CUDA refused " + what + ": " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
}

// Throws std::runtime_error where the launch is refused.
template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments... arguments) {
    constexpr size_t DEFAULT_SHARED_BYTES = 48 << 10;
    constexpr int MAX_SHARED_BYTES = 227 << 10;  // the limit is the kernel's, not this launch's: another thread's may need more
    if (config.shared_bytes > DEFAULT_SHARED_BYTES) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MAX_SHARED_BYTES), config.op, "the shared memory");
    }
    constexpr unsigned PORTABLE_CLUSTER_BLOCKS = 8;
    if (config.cluster_blocks > PORTABLE_CLUSTER_BLOCKS) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), config.op, "the cluster's size");
    }
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {config.cluster_blocks, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t cuda_config{};
    cuda_config.gridDim = config.grid;
    cuda_config.blockDim = config.block;
    cuda_config.dynamicSmemBytes = config.shared_bytes;
    cuda_config.stream = config.stream;
    cuda_config.attrs = attributes;
    cuda_config.numAttrs = config.dependent ? 2 : 1;
    check(cudaLaunchKernelEx(&cuda_config, kernel, Parameters(arguments)...), config.op, "the launch");
}

// Of the current device.
inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "multiprocessors", "the current device");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors", "their number");
    return count;
}

#endif

template <class T>
__host__ __device__ constexpr T ceil_div(T a, std::common_type_t<T> b) {
    return (a + b - 1) / b;
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline dim3 grid_of(int64_t blocks) {
    if (blocks > std::numeric_limits<int32_t>::max()) throw std::length_error(std::to_string(blocks) + " blocks exceed CUDA's grid");
    return dim3(unsigned(blocks));
}

}  // namespace llama4_kernels
