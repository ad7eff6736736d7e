// What of a buffer is in L2: lines are loaded one at a time, and a hit takes about half as long as a miss.

#include <cstdint>

#include "entry.h"
#include "hopper/tma.cuh"

namespace llama4_kernels::calibration {
namespace {

constexpr unsigned PREFETCH_BYTES = 4096;

__global__ void prefetch_kernel(const uint8_t* from, int64_t bytes) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x * PREFETCH_BYTES;
    for (int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * PREFETCH_BYTES; at < bytes; at += step) {
        hopper::bulk_prefetch(from + at, unsigned(min(int64_t(PREFETCH_BYTES), bytes - at)));
    }
}

// One thread per block. Storing the word that was loaded waits for it, and volatile accesses keep their order. A word half a stride further is
// loaded first, so that the page's translation is at hand in a hit and in a miss alike.
__global__ void probe_kernel(const uint8_t* from, int64_t lines, int64_t stride, unsigned* __restrict__ cycles) {
    volatile unsigned* landed = shared_memory<unsigned>();
    for (int64_t line = blockIdx.x; line < lines; line += gridDim.x) {
        const auto* word = reinterpret_cast<const volatile unsigned*>(from + line * stride);
        *landed = word[stride / 2 / int64_t(sizeof(unsigned))];
        const int64_t before = clock64();
        *landed = *word;
        cycles[line] = unsigned(clock64() - before);
    }
}

}  // namespace

CALIBRATION_ENTRY l2_prefetch(const uint8_t* from, int64_t bytes, int64_t blocks, cudaStream_t stream) {
    return guarded([=] { launch({"l2_prefetch", grid_of(blocks), dim3(32), 0, stream}, prefetch_kernel, from, bytes); });
}

// cycles: of the load of each line, `stride` bytes apart.
CALIBRATION_ENTRY l2_probe(const uint8_t* from, int64_t lines, int64_t stride, unsigned* cycles, int64_t blocks, cudaStream_t stream) {
    return guarded([=] { launch({"l2_probe", grid_of(blocks), dim3(1), sizeof(unsigned), stream}, probe_kernel, from, lines, stride, cycles); });
}

}  // namespace llama4_kernels::calibration
