// Operands of wgmma in shared memory, K-major with a swizzle of 128 bytes, brought there by plain loads.
#pragma once

#include "device.h"
#include "hopper/cp_async.cuh"
#include "hopper/wgmma.cuh"

namespace llama4_kernels::calibration {

enum class Dtype { e4m3, bf16 };

constexpr unsigned SPAN = 128;   // bytes of K in a tile
constexpr unsigned K_STEP = 32;  // bytes of K in a product
constexpr int K_STEPS = SPAN / K_STEP;

// rows · 128 bytes, of rows `pitch` bytes apart; by all threads of the block, each of which then calls fence_async_proxy before a barrier.
__device__ inline void load_tile(uint8_t* to, const uint8_t* from, unsigned rows, int64_t pitch) {
    for (unsigned chunk = threadIdx.x; chunk < rows * (SPAN / 16); chunk += blockDim.x) {
        const unsigned row = chunk / (SPAN / 16), byte = chunk % (SPAN / 16) * 16;
        const unsigned at = hopper::swizzled(hopper::Swizzle::bytes_128, row * SPAN + byte);
        *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + row * pitch + byte);
    }
}

// This thread's registers of A for K step `step` of a tile of 64 rows, 128 bytes each.
__device__ inline void load_operand(uint32_t (&registers)[4], const uint8_t* tile, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int thread = threadIdx.x % hopper::WARPGROUP;
        const int row = hopper::operand_row(1, thread, 4 * i), byte = hopper::operand_k(1, thread, 4 * i);
        registers[i] = *reinterpret_cast<const uint32_t*>(tile + row * SPAN + step * K_STEP + byte);
    }
}

// D += A · Bᵀ over one product's bytes of K. A: a descriptor, or registers.
template <Dtype DTYPE, int N, class A>
__device__ inline void multiply(float (&d)[N / 2], const A& a, uint64_t b, bool accumulate) {
    if constexpr (DTYPE == Dtype::e4m3) {
        hopper::wgmma_e4m3<N>(d, a, b, accumulate);
    } else {
        hopper::wgmma_bf16<N>(d, a, b, accumulate);
    }
}

// To out [64, N].
template <int N>
__device__ inline void store_accumulators(float* out, const float (&d)[N / 2]) {
    const int thread = threadIdx.x % hopper::WARPGROUP;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) out[hopper::accumulator_row(thread, i) * N + hopper::accumulator_column(thread, i)] = d[i];
}

}  // namespace llama4_kernels::calibration
