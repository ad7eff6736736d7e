// The tensor memory accelerator: copies of boxes of a tensor, and of plain bytes, between global and shared memory, by one thread.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/tensor_map.h"

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/copies.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

namespace llama4_kernels::hopper {

// A kernel takes it as `const __grid_constant__ TensorMap`.
using TensorMap = CUtensorMap;

template <class Function>
Function driver_function(const char* name, unsigned version) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found) != cudaSuccess || !function)
        throw std::runtime_error(std::string("this CUDA driver has no ") + name);
    return reinterpret_cast<Function>(function);
}

// The driver may want a context of whoever calls it. A thread has none before its first call of the runtime that needs one.
inline void ensure_context() {
    static const auto current = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent", 4000);
    CUcontext context = nullptr;
    if (current(&context) == CUDA_SUCCESS && context) return;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess)
        throw std::runtime_error("CUDA gives this thread no context");
}

// std::invalid_argument where TMA cannot take the tensor. Elements out of bounds are loaded as zeros, and not stored.
template <int RANK>
TensorMap make_tensor_map(const TensorShape<RANK>& shape) {
    check(shape);
    ensure_context();
    static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
    constexpr CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                             CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
    constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B,
                                               CU_TENSOR_MAP_SWIZZLE_128B};
    cuuint32_t steps[RANK];
    for (cuuint32_t& step : steps) step = 1;
    TensorMap map;
    const CUresult result = encode(&map, types[int(shape.type)], RANK, const_cast<void*>(shape.data), shape.sizes.data(),
                                   shape.strides.data(), shape.box.data(), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   swizzles[int(shape.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error(std::string("tensor map of ") + shape.name + ": the driver gives error " + std::to_string(result));
    return map;
}

__device__ inline void prefetch_tensor_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Copy the box whose first element has these coordinates (dimension 0 first, a multiple of 16 bytes; they may lie out of bounds) to shared
// memory: 128-byte aligned, or 8 spans of the swizzle. `barrier` gets the whole box's bytes.
template <L2 HINT = L2::normal, class... Coordinates>
__device__ inline void tma_load(void* to, const TensorMap& map, Barrier& barrier, Coordinates... coordinates) {
    static_assert(sizeof...(coordinates) >= 2 && sizeof...(coordinates) <= 4);
    const int at[] = {int(coordinates)...};
    if constexpr (sizeof...(coordinates) == 2) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
            "l"(&map), "r"(at[0]), "r"(at[1]), "r"(shared_address(&barrier)), "l"(uint64_t(HINT))
            : "memory");
    } else if constexpr (sizeof...(coordinates) == 3) {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
            "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(shared_address(&barrier)), "l"(uint64_t(HINT))
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(to)),
            "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(&barrier)), "l"(uint64_t(HINT))
            : "memory");
    }
}

// The same in every block of the cluster whose bit is set in `blocks`: the box goes to the place of `to` in each, and its bytes to the
// barrier in the place of `barrier`. Two or three dimensions.
template <L2 HINT = L2::normal, class... Coordinates>
__device__ inline void tma_load_multicast(void* to, const TensorMap& map, Barrier& barrier, uint16_t blocks, Coordinates... coordinates) {
    static_assert(sizeof...(coordinates) >= 2 && sizeof...(coordinates) <= 3);
    const int at[] = {int(coordinates)...};
    if constexpr (sizeof...(coordinates) == 2) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
            "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(shared_address(to)),
            "l"(&map), "r"(at[0]), "r"(at[1]), "r"(shared_address(&barrier)), "h"(blocks), "l"(uint64_t(HINT))
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
            "[%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(shared_address(to)),
            "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(shared_address(&barrier)), "h"(blocks), "l"(uint64_t(HINT))
            : "memory");
    }
}

// Bring the box into L2.
template <class... Coordinates>
__device__ inline void tma_prefetch(const TensorMap& map, Coordinates... coordinates) {
    static_assert(sizeof...(coordinates) >= 2 && sizeof...(coordinates) <= 4);
    const int at[] = {int(coordinates)...};
    if constexpr (sizeof...(coordinates) == 2) {
        asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map), "r"(at[0]), "r"(at[1]) : "memory");
    } else if constexpr (sizeof...(coordinates) == 3) {
        asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2])
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(at[0]), "r"(at[1]),
                     "r"(at[2]), "r"(at[3])
                     : "memory");
    }
}

// Copy a box from shared memory to the tensor, as part of this thread's open bulk group. The coordinates are tma_load's, but none may be
// negative: the hardware takes that for an illegal instruction. Plain writes to `from` need a fence_async_proxy first.
template <class... Coordinates>
__device__ inline void tma_store(const TensorMap& map, const void* from, Coordinates... coordinates) {
    static_assert(sizeof...(coordinates) >= 2 && sizeof...(coordinates) <= 4);
    const int at[] = {int(coordinates)...};
    if constexpr (sizeof...(coordinates) == 2) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(at[0]), "r"(at[1]),
                     "r"(shared_address(from))
                     : "memory");
    } else if constexpr (sizeof...(coordinates) == 3) {
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map), "r"(at[0]),
                     "r"(at[1]), "r"(at[2]), "r"(shared_address(from))
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map), "r"(at[0]),
                     "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(from))
                     : "memory");
    }
}

// Copy plain bytes; addresses and `bytes` are multiples of 16. `barrier` gets the bytes.
template <L2 HINT = L2::normal>
__device__ inline void bulk_load(void* to, const void* from, unsigned bytes, Barrier& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(&barrier)), "l"(uint64_t(HINT))
                 : "memory");
}

// Bring plain bytes into L2; the address and `bytes` are multiples of 16.
__device__ inline void bulk_prefetch(const void* from, unsigned bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// End this thread's bulk group of stores.
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until all but this thread's PENDING latest bulk groups are complete: written, and visible to this thread.
template <int PENDING>
__device__ inline void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace llama4_kernels::hopper

#endif
