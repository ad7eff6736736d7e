// The rate at which warpgroups issue wgmma: products of tiles that lie in shared memory (A also in registers), over and over.

#include <cstdint>

#include "entry.h"
#include "tile.h"

namespace llama4_kernels::calibration {
namespace {

constexpr unsigned M = 64;
constexpr int B_TILES = 4;
constexpr unsigned MOST_THREADS = 2 * hopper::WARPGROUP;

// a [64, 128 bytes] of each warpgroup; b [4][N, 128 bytes] of all. out [warpgroups of the block, 64, N]: the sum over repeats of A · Bᵀ, with each B
// in turn, of block 0. cycles: of each block.
template <Dtype DTYPE, bool REGISTERS, int N>
__global__ void __launch_bounds__(MOST_THREADS) rate_kernel(const uint8_t* __restrict__ a, const uint8_t* __restrict__ b, int64_t repeats,
                                                            float* __restrict__ out, int64_t* __restrict__ cycles) {
    const unsigned warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / hopper::WARPGROUP, 0), warpgroups = blockDim.x / hopper::WARPGROUP;
    uint8_t* a_tiles = shared_memory<uint8_t>();
    uint8_t* b_tiles = a_tiles + warpgroups * M * SPAN;
    load_tile(a_tiles, a, warpgroups * M, SPAN);
    load_tile(b_tiles, b, B_TILES * N, SPAN);
    hopper::fence_async_proxy();
    __syncthreads();

    const uint64_t a_descriptor = hopper::k_major(a_tiles + warpgroup * M * SPAN, hopper::Swizzle::bytes_128);
    uint64_t b_descriptors[B_TILES];
#pragma unroll
    for (int i = 0; i < B_TILES; ++i) b_descriptors[i] = hopper::k_major(b_tiles + i * N * SPAN, hopper::Swizzle::bytes_128);
    uint32_t a_registers[K_STEPS][4];
    if constexpr (REGISTERS) {
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step) load_operand(a_registers[step], a + warpgroup * M * SPAN, step);
    }
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;

    const int64_t before = clock64();
    for (int64_t repeat = 0; repeat < repeats; repeat += B_TILES) {
#pragma unroll
        for (int tile = 0; tile < B_TILES; ++tile) {
            hopper::wgmma_fence();
#pragma unroll
            for (int step = 0; step < K_STEPS; ++step) {
                const uint64_t offset = step * K_STEP / 16;
                if constexpr (REGISTERS) {
                    multiply<DTYPE, N>(d, a_registers[step], b_descriptors[tile] + offset, true);
                } else {
                    multiply<DTYPE, N>(d, a_descriptor + offset, b_descriptors[tile] + offset, true);
                }
            }
            hopper::wgmma_commit();
            hopper::wgmma_wait<1>();
        }
    }
    hopper::wgmma_wait<0>();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - before;
    if (blockIdx.x == 0) store_accumulators<N>(out + warpgroup * M * N, d);
}

using Launch = void (*)(const LaunchConfig&, const uint8_t*, const uint8_t*, int64_t, float*, int64_t*);

template <Dtype DTYPE, bool REGISTERS, int N>
void launch_rate(const LaunchConfig& config, const uint8_t* a, const uint8_t* b, int64_t repeats, float* out, int64_t* cycles) {
    launch(config, rate_kernel<DTYPE, REGISTERS, N>, a, b, repeats, out, cycles);
}

template <int N>
Launch find(bool bf16, bool registers) {
    if (bf16) return registers ? launch_rate<Dtype::bf16, true, N> : launch_rate<Dtype::bf16, false, N>;
    return registers ? launch_rate<Dtype::e4m3, true, N> : launch_rate<Dtype::e4m3, false, N>;
}

Launch find(int64_t n, bool bf16, bool registers) {
    switch (n) {
        case 8: return find<8>(bf16, registers);
        case 16: return find<16>(bf16, registers);
        case 32: return find<32>(bf16, registers);
        case 64: return find<64>(bf16, registers);
        case 128: return find<128>(bf16, registers);
        case 256: return find<256>(bf16, registers);
    }
    throw std::invalid_argument("wgmma_rate: n is " + std::to_string(n) + ", needs 8, 16, 32, 64, 128 or 256");
}

}  // namespace

// repeats: a multiple of 4, each four wgmma per warpgroup; warpgroups of each block: 1 or 2. See rate_kernel.
CALIBRATION_ENTRY wgmma_rate(const uint8_t* a, const uint8_t* b, int64_t n, int64_t bf16, int64_t registers, int64_t repeats, int64_t warpgroups,
                             float* out, int64_t* cycles, int64_t blocks, cudaStream_t stream) {
    return guarded([=] {
        const size_t shared = size_t(warpgroups * M + B_TILES * n) * SPAN;
        const LaunchConfig config{"wgmma_rate", grid_of(blocks), dim3(unsigned(warpgroups * hopper::WARPGROUP)), shared, stream};
        find(n, bf16, registers)(config, a, b, repeats, out, cycles);
    });
}

}  // namespace llama4_kernels::calibration
