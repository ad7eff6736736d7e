// A small warp-specialised GEMM, C [M, N] bf16 = A [M, K] · B [N, K]ᵀ of e4m3, and the bugs that such a kernel may have, each by its name.
// One block per 64 × 64 tile: a warpgroup multiplies and stores, one more warp loads; A by TMA, or gathered row by row with cp.async.

#include <string_view>

#include <cuda_bf16.h>

#include "device.h"
#include "hopper/cp_async.cuh"
#include "hopper/matrix.cuh"
#include "hopper/registers.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace {

using namespace llama4_kernels;
using namespace llama4_kernels::hopper;

constexpr int TILE = 64;
constexpr int BLOCK_K = 128;
constexpr int STAGES = 2;
constexpr int TILE_BYTES = TILE * BLOCK_K;
constexpr Swizzle SWIZZLE = Swizzle::bytes_128;

std::string_view planted;

bool has(std::string_view bug) { return planted == bug; }

struct SharedMemory {
    alignas(1024) uint8_t a[STAGES][TILE_BYTES];
    alignas(1024) uint8_t b[STAGES][TILE_BYTES];
    alignas(1024) __nv_bfloat16 c[TILE * TILE];
    Barrier full[STAGES], empty[STAGES];
};

template <bool GATHER>
__device__ void load_tiles(SharedMemory& shared, const TensorMap& map_a, const TensorMap& map_b, const uint8_t* a, const int* rows, int k) {
    const int lane = threadIdx.x % WARP;
    for (int step = 0; step < k / BLOCK_K; ++step) {
        const int stage = step % STAGES;
        shared.empty[stage].wait(has("an inverted parity") ? step / STAGES % 2 : step / STAGES % 2 ^ 1);
        if (GATHER) {
            for (int chunk = lane; chunk < TILE_BYTES / 16; chunk += WARP) {
                const int row = chunk / 8, byte = chunk % 8 * 16;
                cp_async_16(shared.a[stage] + swizzled(SWIZZLE, row * BLOCK_K + byte),
                            a + int64_t(rows[blockIdx.y * TILE + row]) * k + step * BLOCK_K + byte);
            }
            if (has("an arrival before cp.async")) {
                shared.full[stage].arrive();
            } else {
                cp_async_arrive(shared.full[stage]);
            }
        }
        if (lane == 0) {
            const int tiles = has("more bytes expected than come") ? 3 : GATHER || has("fewer bytes expected than come") ? 1 : 2;
            shared.full[stage].arrive_expect(tiles * TILE_BYTES);
            const int shift = has("a misaligned coordinate") ? 8 : 0;
            if (!GATHER) tma_load(shared.a[stage], map_a, shared.full[stage], step * BLOCK_K + shift, blockIdx.y * TILE);
            uint8_t* to = shared.b[stage] + (has("a misaligned destination") ? 128 : has("a destination past the end") ? 20480 : 0);
            tma_load(to, map_b, shared.full[stage], step * BLOCK_K, blockIdx.x * TILE);
        }
    }
}

template <bool GATHER>
__device__ inline void multiply(SharedMemory& shared, float (&sums)[TILE / 2], int k) {
    const bool fences = has("a proxy fence after cp.async by one warp alone") ? threadIdx.x < WARP : !has("no proxy fence after cp.async");
    for (int step = 0; step < k / BLOCK_K; ++step) {
        const int stage = step % STAGES;
        if (!has("no wait for the data")) shared.full[stage].wait(has("a parity that never turns") ? 0 : step / STAGES % 2);
        if (GATHER && fences) fence_async_proxy();
        if (!has("no fence before wgmma")) wgmma_fence();
        for (int byte = 0; byte < BLOCK_K; byte += 32) {
            const uint64_t a = k_major(shared.a[stage] + byte, SWIZZLE),
                           b = k_major(shared.b[stage] + byte + (has("unequal descriptors") ? threadIdx.x % 2 * 32 : 0), SWIZZLE);
            if (has("a product that one thread leaves out") && byte == 96 && threadIdx.x == 5) continue;
            wgmma_e4m3<TILE>(sums, a, b, step > 0 || byte > 0);
        }
        wgmma_commit();
        if (has("release before the wait for wgmma") && threadIdx.x == 0) shared.empty[stage].arrive();
        if (has("release before the wait for wgmma")) named_barrier_sync(2, WARPGROUP);
        if (!has("no wait for wgmma")) wgmma_wait<0>();
        if (has("more arrivals than expected") || (threadIdx.x == 0 && !has("no arrival") && !has("release before the wait for wgmma"))) {
            shared.empty[stage].arrive();
        }
    }
}

__device__ inline void store(SharedMemory& shared, const TensorMap& map_c, const float (&sums)[TILE / 2]) {
    const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane % 16;
    for (int column = 0; column < TILE; column += 16) {
        uint32_t pairs[4];
        for (int i = 0; i < 4; ++i) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(sums[column / 2 + 2 * i], sums[column / 2 + 2 * i + 1]);
            memcpy(&pairs[i], &pair, sizeof pair);
        }
        store_matrices(reinterpret_cast<uint8_t*>(shared.c) + swizzled(SWIZZLE, row * 2 * TILE + (column + lane / 16 * 8) * 2), pairs);
    }
    if (has("a write past the end")) reinterpret_cast<uint8_t*>(&shared)[sizeof(SharedMemory) + threadIdx.x] = 0;
    if (!has("plain writes before a store")) fence_async_proxy();
    const unsigned threads = has("a barrier of another size") ? WARPGROUP + WARP
                             : has("a barrier of two sizes")  ? WARP * (1 + threadIdx.x / WARP)
                                                              : WARPGROUP;
    named_barrier_sync(1, threads);
    if (threadIdx.x == 0) {
        const int column = has("a store with a negative coordinate") ? -TILE : blockIdx.x * TILE;
        tma_store(map_c, shared.c, column, blockIdx.y * TILE);
        bulk_commit();
        if (!has("a store that nobody waits for")) bulk_wait<0>();
    }
}

template <bool GATHER>
__global__ void __launch_bounds__(WARPGROUP + WARP)
    gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_c,
         const uint8_t* a, const int* rows, int k) {
    SharedMemory& shared = *shared_memory<SharedMemory>();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            shared.full[stage].init(GATHER ? WARP + 1 : 1);
            (has("a barrier initialised twice") ? shared.full : shared.empty)[stage].init(1);
        }
        if (!has("barriers invisible to copies")) fence_barrier_init();
    }
    if (threadIdx.x == 0 && has("an mbarrier written over")) shared.full[1].state = 0;
    if (has("more registers than there are")) increase_registers<256>();
    __syncthreads();
    if (threadIdx.x >= WARPGROUP) {
        load_tiles<GATHER>(shared, map_a, map_b, a, rows, k);
    } else {
        float sums[TILE / 2];
        multiply<GATHER>(shared, sums, k);
        store(shared, map_c, sums);
    }
}

TensorMap map_of(const char* name, const void* data, ElementType type, uint64_t rows, uint64_t columns, uint32_t box_columns) {
    return make_tensor_map<2>({name, data, type, {columns, rows}, {columns * element_bytes(type)}, {box_columns, TILE}, SWIZZLE});
}

}  // namespace

// a [a_rows, K], b [N, K] e4m3; c [M, N] bf16; rows [M], or null with a_rows = M; bug: its name or "". "" or an error.
extern "C" __attribute__((visibility("default"))) const char* run_gemm(const uint8_t* a, const uint8_t* b, void* c, const int* rows,
                                                                       int a_rows, int m, int n, int k, const char* bug) {
    static std::string error;
    planted = bug;
    try {
        const TensorMap map_a = map_of("a", a, ElementType::uint8, a_rows, k, BLOCK_K),
                        map_b = map_of("b", b, ElementType::uint8, n, k, BLOCK_K);
        const TensorMap map_c = map_of("c", c, ElementType::bfloat16, m, n, TILE);
        const LaunchConfig config{"gemm", dim3(n / TILE, m / TILE), dim3(WARPGROUP + WARP),
                                  sizeof(SharedMemory) - (has("too little shared memory") ? 1024 : 0), nullptr};
        launch(config, rows ? &gemm<true> : &gemm<false>, map_a, map_b, map_c, a, rows, k);
        error.clear();
    } catch (const std::exception& caught) {
        error = caught.what();
    }
    return error.c_str();
}
