// From a consumer warpgroup's accumulators, 64 channels × TOKENS tokens, to rows of the output.
#pragma once

#include <cuda_bf16.h>

#include "floats.cuh"
#include "hopper/barrier.cuh"
#include "hopper/matrix.cuh"

namespace llama4_kernels {

// How an operand is scaled as a whole: activations per row, weights per output channel.
enum class ScaleForm { none, per_tensor, per_row, per_block };

constexpr int SCALE_BLOCK = 128;  // channels, and columns of K, of a block

// Where a warpgroup's part of a tile goes: `rows` rows of `columns` elements in an output whose rows are `stride` elements apart. What lies
// beyond in the tile is not written.
template <class T>
struct OutputTile {
    T* first;
    int64_t stride;
    int rows, columns;
};

// Multiply this thread's accumulators by its two channels' scales.
template <int VALUES>
__device__ inline void scale_channels(float (&sums)[VALUES], float low_channel, float high_channel) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) sums[i] *= i / 2 % 2 ? high_channel : low_channel;
}

// Multiply this thread's accumulators by the scales of the tile's tokens, which stand in shared memory.
template <int VALUES>
__device__ inline void scale_tokens(float (&sums)[VALUES], const float* token_scales) {
#pragma unroll
    for (int i = 0; i < VALUES; i += 4) {
        const int token = hopper::accumulator_column(threadIdx.x % hopper::WARPGROUP, i);
        const float2 scales = *reinterpret_cast<const float2*>(token_scales + token);
        sums[i] *= scales.x;
        sums[i + 1] *= scales.y;
        sums[i + 2] *= scales.x;
        sums[i + 3] *= scales.y;
    }
}

// fp32: straight from the registers, 32 contiguous bytes for every 8 lanes.
template <int TOKENS, int PASS>
__device__ inline void store_tile(const float (&sums)[TOKENS / 2], OutputTile<float> out, void*, unsigned) {
    const int thread = threadIdx.x % hopper::WARPGROUP;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
        const int token = hopper::accumulator_column(thread, i), channel = hopper::accumulator_row(thread, i);
        if (token < out.rows && channel < out.columns) out.first[token * out.stride + channel] = sums[i];
    }
}

// bf16: transposed through `staging`, shared memory of PASS · 64 elements of this warpgroup alone, PASS tokens at a time, then 16 bytes per
// thread at a time. barrier: a named barrier of this warpgroup's.
template <int TOKENS, int PASS>
__device__ inline void store_tile(const float (&sums)[TOKENS / 2], OutputTile<__nv_bfloat16> out, void* staging, unsigned barrier) {
    constexpr int CHUNKS = 8;  // of 8 channels in a row of the staging tile
    static_assert(TOKENS % PASS == 0 && PASS % 16 == 0);
    const int thread = threadIdx.x % hopper::WARPGROUP, warp = thread / hopper::WARP, lane = thread % hopper::WARP;
    const auto chunk_at = [&](int token, int chunk) { return static_cast<uint4*>(staging) + token * CHUNKS + (chunk ^ token % CHUNKS); };
    const int channel = thread % CHUNKS * 8;
    const bool whole = out.stride % 8 == 0 && reinterpret_cast<uintptr_t>(out.first) % 16 == 0 && channel + 8 <= out.columns;

#pragma unroll
    for (int first = 0; first < TOKENS; first += PASS) {
        hopper::named_barrier_sync(barrier, hopper::WARPGROUP);  // what was staged last has left
#pragma unroll
        for (int i = 0; i < PASS / 16; ++i) {
            uint32_t matrices[4];  // channels 0–7 and 8–15 of the warp's 16, for 8 tokens and for the next 8
#pragma unroll
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int at = first / 2 + i * 8 + matrix * 2;
                matrices[matrix] = bfloat16_pair(sums[at], sums[at + 1]);
            }
            hopper::store_matrices<true>(chunk_at(i * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), matrices);
        }
        hopper::named_barrier_sync(barrier, hopper::WARPGROUP);

        for (int token = thread / CHUNKS; token < min(PASS, out.rows - first); token += hopper::WARPGROUP / CHUNKS) {
            const uint4* chunk = chunk_at(token, thread % CHUNKS);
            __nv_bfloat16* to = out.first + (first + token) * out.stride + channel;
            if (whole) {
                *reinterpret_cast<uint4*>(to) = *chunk;
            } else {
                const auto* values = reinterpret_cast<const __nv_bfloat16*>(chunk);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (channel + i < out.columns) to[i] = values[i];
                }
            }
        }
    }
}

}  // namespace llama4_kernels
