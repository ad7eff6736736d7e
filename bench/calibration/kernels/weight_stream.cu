// A persistent stream of weights through shared memory: each block takes an equal run of tiles through a ring of stages, so that
// stages · tile bytes are in flight. One warp issues copies; four warps read each tile whole and then free its stage.

#include <cstdint>

#include "entry.h"
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"

namespace llama4_kernels::calibration {
namespace {

using hopper::Barrier;

constexpr int CONSUMER_WARPS = 4;
constexpr int CONSUMERS = CONSUMER_WARPS * 32;
constexpr int THREADS = CONSUMERS + 32;
constexpr unsigned SPAN = 128;

// Tiles that lie one after another.
template <hopper::L2 HINT>
struct Contiguous {
    const uint8_t* from;
    unsigned tile_bytes;

    __device__ void load(void* to, int64_t tile, Barrier& barrier) const { hopper::bulk_load<HINT>(to, from + tile * tile_bytes, tile_bytes, barrier); }
};

// Tiles of a matrix [rows, columns] of bytes, 128 columns wide and swizzled, as wgmma takes them; those of the same rows follow one another.
template <hopper::L2 HINT>
struct Boxes {
    hopper::TensorMap map;
    int tile_rows;
    int tiles_per_row;

    __device__ void load(void* to, int64_t tile, Barrier& barrier) const {
        hopper::tma_load<HINT>(to, map, barrier, int(tile % tiles_per_row) * int(SPAN), int(tile / tiles_per_row) * tile_rows);
    }
};

template <class Source>
__global__ void __launch_bounds__(THREADS)
    stream_kernel(const __grid_constant__ Source source, int64_t tiles, unsigned tile_bytes, int stages, unsigned* __restrict__ checksums) {
    uint8_t* ring = shared_memory<uint8_t>();
    Barrier* full = reinterpret_cast<Barrier*>(ring + size_t(stages) * tile_bytes);
    Barrier* empty = full + stages;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < stages; ++stage) {
            full[stage].init(1);
            empty[stage].init(CONSUMER_WARPS);
        }
        hopper::fence_barrier_init();
    }
    __syncthreads();

    const int64_t first = tiles * blockIdx.x / gridDim.x, last = tiles * (blockIdx.x + 1) / gridDim.x;
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x > CONSUMERS) return;
        for (int64_t tile = first; tile < last; ++tile) {
            const int stage = int((tile - first) % stages), parity = int((tile - first) / stages % 2);
            empty[stage].wait(parity ^ 1);
            full[stage].arrive_expect(tile_bytes);
            source.load(ring + size_t(stage) * tile_bytes, tile, full[stage]);
        }
        return;
    }

    unsigned value = 0;
    for (int64_t tile = first; tile < last; ++tile) {
        const int stage = int((tile - first) % stages), parity = int((tile - first) / stages % 2);
        full[stage].wait(parity);
        const uint4* pieces = reinterpret_cast<const uint4*>(ring + size_t(stage) * tile_bytes);
        for (unsigned piece = threadIdx.x; piece < tile_bytes / sizeof(uint4); piece += CONSUMERS) {
            const uint4 words = pieces[piece];
            value ^= words.x ^ words.y ^ words.z ^ words.w;
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) empty[stage].arrive();
    }
    value = __reduce_xor_sync(0xffffffffu, value);
    if (threadIdx.x % 32 == 0) checksums[blockIdx.x * CONSUMER_WARPS + threadIdx.x / 32] = value;
}

template <class Source>
void stream(const Source& source, int64_t tiles, int64_t tile_bytes, int64_t stages, unsigned* checksums, int64_t blocks, cudaStream_t cuda_stream) {
    const size_t shared = size_t(stages * (tile_bytes + 2 * int64_t(sizeof(Barrier))));
    const LaunchConfig config{"weight_stream", grid_of(blocks), dim3(THREADS), shared, cuda_stream};
    launch(config, stream_kernel<Source>, source, tiles, unsigned(tile_bytes), int(stages), checksums);
}

template <hopper::L2 HINT>
void stream_matrix(const uint8_t* matrix, int64_t rows, int64_t columns, int64_t tile_rows, int64_t stages, bool boxes, unsigned* checksums,
                   int64_t blocks, cudaStream_t cuda_stream) {
    const int64_t tile_bytes = tile_rows * SPAN, tiles = rows * columns / tile_bytes;
    if (boxes) {
        if (rows % tile_rows || columns % SPAN) throw std::invalid_argument("weight_stream: boxes do not tile the matrix");
        const hopper::TensorShape<2> shape{"weights", matrix, hopper::ElementType::uint8, {uint64_t(columns), uint64_t(rows)}, {uint64_t(columns)},
                                           {SPAN, uint32_t(tile_rows)}, hopper::Swizzle::bytes_128};
        const Boxes<HINT> source{hopper::make_tensor_map(shape), int(tile_rows), int(columns / SPAN)};
        stream(source, tiles, tile_bytes, stages, checksums, blocks, cuda_stream);
    } else {
        stream(Contiguous<HINT>{matrix, unsigned(tile_bytes)}, tiles, tile_bytes, stages, checksums, blocks, cuda_stream);
    }
}

}  // namespace

// The bytes of a matrix [rows, columns] in tiles of tile_rows · 128 bytes: as boxes of the matrix, or one after another in memory. evict_first: whether
// they are to leave L2 first. checksums: blocks · 4 words, whose exclusive or is that of all words of the matrix.
CALIBRATION_ENTRY weight_stream(const uint8_t* matrix, int64_t rows, int64_t columns, int64_t tile_rows, int64_t stages, int64_t boxes,
                                int64_t evict_first, unsigned* checksums, int64_t blocks, cudaStream_t cuda_stream) {
    return guarded([=] {
        const auto run = evict_first ? stream_matrix<hopper::L2::evict_first> : stream_matrix<hopper::L2::normal>;
        run(matrix, rows, columns, tile_rows, stages, boxes, checksums, blocks, cuda_stream);
    });
}

}  // namespace llama4_kernels::calibration
