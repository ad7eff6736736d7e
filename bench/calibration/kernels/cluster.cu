// How fast a block reads the shared memory of the other blocks of its cluster, through plain 16-byte loads.

#include <cstdint>

#include "entry.h"
#include "hopper/cluster.cuh"

namespace llama4_kernels::calibration {
namespace {

constexpr int THREADS = 512;
constexpr int UNROLL = 8;

// Each block fills its shared memory with words that depend on its rank, and then reads that of each other block of the cluster in turn; its own
// where it is alone.
__global__ void __launch_bounds__(THREADS) read_remote_kernel(unsigned pieces, int64_t repeats, unsigned* __restrict__ checksums, int64_t* __restrict__ cycles) {
    uint4* mine = shared_memory<uint4>();
    const unsigned rank = hopper::cluster_rank(), size = hopper::cluster_size();
    for (unsigned piece = threadIdx.x; piece < pieces; piece += THREADS) {
        const unsigned word = (rank << 20 | piece) * 2654435761u;
        mine[piece] = uint4{word, word * 3, word * 5, word * 7};
    }
    hopper::cluster_sync();
    unsigned value = 0, distance = 0;
    const int64_t before = clock64();
    for (int64_t repeat = 0; repeat < repeats; ++repeat) {
        distance = distance + 1 < size ? distance + 1 : size > 1;
        const uint4* theirs = hopper::remote_shared(mine, (rank + distance) % size);
        for (unsigned first = threadIdx.x; first < pieces; first += THREADS * UNROLL) {
            uint4 held[UNROLL];
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) held[i] = theirs[first + i * THREADS];
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) value ^= held[i].x ^ held[i].y ^ held[i].z ^ held[i].w;
        }
    }
    checksums[blockIdx.x * THREADS + threadIdx.x] = value;
    hopper::cluster_sync();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - before;
}

}  // namespace

// bytes: of each block's shared memory, a multiple of 64 KiB. checksums: blocks · 512 words, the exclusive or of what each thread read. cycles: of each
// block, until its cluster was done.
CALIBRATION_ENTRY cluster_read(int64_t bytes, int64_t repeats, int64_t cluster, unsigned* checksums, int64_t* cycles, int64_t blocks,
                               cudaStream_t stream) {
    return guarded([=] {
        LaunchConfig config{"cluster_read", grid_of(blocks), dim3(THREADS), size_t(bytes), stream};
        config.cluster_blocks = unsigned(cluster);
        launch(config, read_remote_kernel, unsigned(bytes / sizeof(uint4)), repeats, checksums, cycles);
    });
}

}  // namespace llama4_kernels::calibration
