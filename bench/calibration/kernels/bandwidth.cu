// Memory bandwidth: copy, read and write once, or read again and again to stay in L2. Each block walks over tiles of THREADS · UNROLL
// pieces of 16 bytes; a thread's UNROLL loads are issued before the first is used, so that an SM keeps 128 KB in flight.

#include <cstdint>

#include "entry.h"

namespace llama4_kernels::calibration {
namespace {

constexpr int THREADS = 256;
constexpr int BLOCKS_PER_SM = 8;
constexpr int UNROLL = 4;
constexpr int64_t TILE = THREADS * UNROLL;

__device__ inline unsigned words_xor(uint4 piece) { return piece.x ^ piece.y ^ piece.z ^ piece.w; }

// A word per warp: stores without contention, whose exclusive or tells whether every piece was read an odd number of times.
__device__ inline void store_checksum(unsigned* checksums, unsigned value) {
    value = __reduce_xor_sync(0xffffffffu, value);
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread % 32 == 0) checksums[thread / 32] = value;
}

__device__ inline unsigned read_tile(const uint4* from, int64_t tile, int64_t pieces) {
    uint4 held[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
        const int64_t piece = tile * TILE + i * THREADS + threadIdx.x;
        held[i] = piece < pieces ? __ldcg(from + piece) : uint4{0, 0, 0, 0};
    }
    unsigned value = 0;
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) value ^= words_xor(held[i]);
    return value;
}

// In pass p a block reads the tiles that the block p · shift before it read in pass 0: 0, its own again; else another SM's.
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    read_kernel(const uint4* __restrict__ from, int64_t pieces, int64_t passes, int64_t shift, unsigned* __restrict__ checksums) {
    const int64_t tiles = (pieces + TILE - 1) / TILE;
    unsigned value = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = (blockIdx.x + pass * shift) % gridDim.x;
        for (int64_t tile = first; tile < tiles; tile += gridDim.x) value ^= read_tile(from, tile, pieces);
    }
    store_checksum(checksums, value);
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) copy_kernel(const uint4* __restrict__ from, uint4* __restrict__ to, int64_t pieces) {
    for (int64_t tile = blockIdx.x; tile * TILE < pieces; tile += gridDim.x) {
        uint4 held[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int64_t piece = tile * TILE + i * THREADS + threadIdx.x;
            if (piece < pieces) held[i] = __ldcg(from + piece);
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int64_t piece = tile * TILE + i * THREADS + threadIdx.x;
            if (piece < pieces) to[piece] = held[i];
        }
    }
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) write_kernel(uint4* __restrict__ to, int64_t pieces, unsigned seed) {
    for (int64_t piece = int64_t(blockIdx.x) * THREADS + threadIdx.x; piece < pieces; piece += int64_t(gridDim.x) * THREADS) {
        const unsigned word = (unsigned(piece) ^ seed) * 2654435761u;
        to[piece] = uint4{word, word ^ 0x9e3779b9u, word ^ 0x7f4a7c15u, word ^ 0x85ebca6bu};
    }
}

LaunchConfig config(const char* op, int64_t blocks, cudaStream_t stream) { return {op, grid_of(blocks), dim3(THREADS), 0, stream}; }

}  // namespace

// checksums: blocks · 8 words.
CALIBRATION_ENTRY bandwidth_read(const uint4* from, int64_t bytes, int64_t passes, int64_t shift, unsigned* checksums, int64_t blocks, cudaStream_t stream) {
    return guarded([=] { launch(config("bandwidth_read", blocks, stream), read_kernel, from, bytes / int64_t(sizeof(uint4)), passes, shift, checksums); });
}

CALIBRATION_ENTRY bandwidth_copy(const uint4* from, uint4* to, int64_t bytes, int64_t blocks, cudaStream_t stream) {
    return guarded([=] { launch(config("bandwidth_copy", blocks, stream), copy_kernel, from, to, bytes / int64_t(sizeof(uint4))); });
}

CALIBRATION_ENTRY bandwidth_write(uint4* to, int64_t bytes, int64_t seed, int64_t blocks, cudaStream_t stream) {
    return guarded([=] { launch(config("bandwidth_write", blocks, stream), write_kernel, to, bytes / int64_t(sizeof(uint4)), unsigned(seed)); });
}

}  // namespace llama4_kernels::calibration
