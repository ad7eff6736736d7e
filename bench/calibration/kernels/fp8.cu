// e4m3 in hardware: how floats are rounded to it, and how many bits of a long sum of its products wgmma keeps.

#include <cstdint>

#include <cuda_fp8.h>

#include "entry.h"
#include "tile.h"

namespace llama4_kernels::calibration {
namespace {

constexpr int M = 64, N = 64;
constexpr int CONVERT_THREADS = 256;

__global__ void convert_kernel(const float* __restrict__ from, int64_t count, uint8_t* __restrict__ codes) {
    for (int64_t i = int64_t(blockIdx.x) * CONVERT_THREADS + threadIdx.x; i < count; i += int64_t(gridDim.x) * CONVERT_THREADS) {
        codes[i] = uint8_t(__nv_cvt_float_to_fp8(from[i], __NV_SATFINITE, __NV_E4M3));
    }
}

// out [64, 64] = a [64, K] · b [64, K]ᵀ of each block. Every `promote` tiles of 128 bytes the sum so far is added to one in plain fp32 and begins anew.
template <Dtype DTYPE>
__global__ void __launch_bounds__(hopper::WARPGROUP)
    accumulate_kernel(const uint8_t* __restrict__ a, const uint8_t* __restrict__ b, int64_t row_bytes, int promote, float* __restrict__ out) {
    uint8_t* a_tile = shared_memory<uint8_t>();
    uint8_t* b_tile = a_tile + M * SPAN;
    a += blockIdx.x * M * row_bytes;
    b += blockIdx.x * N * row_bytes;

    float total[N / 2], sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) total[i] = sum[i] = 0.0f;
    int held = 0;  // tiles in `sum`
    for (int64_t at = 0; at < row_bytes; at += SPAN) {
        load_tile(a_tile, a + at, M, row_bytes);
        load_tile(b_tile, b + at, N, row_bytes);
        hopper::fence_async_proxy();
        __syncthreads();
        hopper::wgmma_fence();
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step) {
            const uint64_t offset = step * K_STEP / 16;
            multiply<DTYPE, N>(sum, hopper::k_major(a_tile, hopper::Swizzle::bytes_128) + offset,
                               hopper::k_major(b_tile, hopper::Swizzle::bytes_128) + offset, held > 0 || step > 0);
        }
        hopper::wgmma_commit();
        hopper::wgmma_wait<0>();
        __syncthreads();
        if (++held == promote || at + SPAN == row_bytes) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) total[i] += sum[i];
            held = 0;
        }
    }
    store_accumulators<N>(out + blockIdx.x * M * N, total);
}

}  // namespace

// codes: of the e4m3 values nearest to each float, at most 448 in magnitude.
CALIBRATION_ENTRY fp8_convert(const float* from, int64_t count, uint8_t* codes, int64_t blocks, cudaStream_t stream) {
    return guarded([=] { launch({"fp8_convert", grid_of(blocks), dim3(CONVERT_THREADS), 0, stream}, convert_kernel, from, count, codes); });
}

// a, b [products, 64, row_bytes] -> out [products, 64, 64]. promote: in tiles of 128 bytes of K; 0: never.
CALIBRATION_ENTRY fp8_accumulate(const uint8_t* a, const uint8_t* b, int64_t products, int64_t row_bytes, int64_t promote, int64_t bf16, float* out,
                                 cudaStream_t stream) {
    return guarded([=] {
        const auto kernel = bf16 ? accumulate_kernel<Dtype::bf16> : accumulate_kernel<Dtype::e4m3>;
        launch({"fp8_accumulate", grid_of(products), dim3(hopper::WARPGROUP), (M + N) * SPAN, stream}, kernel, a, b, row_bytes, int(promote), out);
    });
}

}  // namespace llama4_kernels::calibration
