// What it costs to launch a kernel and to wait for others: nothing but launches and barriers, and time spent on purpose.

#include <cstdint>

#include "entry.h"
#include "hopper/cluster.cuh"
#include "hopper/dependent_launch.cuh"
#include "hopper/memory.cuh"

namespace llama4_kernels::calibration {
namespace {

__global__ void empty_kernel() {}

__device__ inline void spend(int64_t cycles) {
    const int64_t start = clock64();
    while (clock64() - start < cycles) {}
}

// A link of a chain: a prologue that needs nothing of the kernel before it, and a body that does.
__global__ void link_kernel(int64_t prologue_cycles, int64_t body_cycles, bool early) {
    spend(prologue_cycles);
    hopper::wait_for_dependencies();
    if (early) hopper::launch_dependents();
    spend(body_cycles);
}

__global__ void block_barriers_kernel(int64_t repeats) {
    for (int64_t i = 0; i < repeats; ++i) __syncthreads();
}

__global__ void cluster_barriers_kernel(int64_t repeats) {
    for (int64_t i = 0; i < repeats; ++i) hopper::cluster_sync();
}

// All blocks must be resident at once. counter: zero at first; each block adds one per barrier, and waits until all have.
__global__ void grid_barriers_kernel(int64_t repeats, unsigned* counter) {
    for (int64_t i = 0; i < repeats; ++i) {
        __syncthreads();
        if (threadIdx.x == 0) {
            hopper::add_acquire_release(counter, 1);
            while (hopper::load_acquire(counter) < gridDim.x * unsigned(i + 1)) {}
        }
        __syncthreads();
    }
}

LaunchConfig config(const char* op, int64_t blocks, int64_t threads, cudaStream_t stream) {
    return {op, grid_of(blocks), dim3(unsigned(threads)), 0, stream};
}

}  // namespace

CALIBRATION_ENTRY empty_launch(int64_t threads, int64_t blocks, cudaStream_t stream) {
    return guarded([=] { launch(config("empty_launch", blocks, threads, stream), empty_kernel); });
}

// dependent: launched so that it may start before the kernel ahead of it has ended. early: lets the next start once its own prologue is done.
CALIBRATION_ENTRY link_launch(int64_t prologue_cycles, int64_t body_cycles, int64_t dependent, int64_t early, int64_t blocks, cudaStream_t stream) {
    return guarded([=] {
        LaunchConfig link = config("link_launch", blocks, 128, stream);
        link.dependent = dependent;
        launch(link, link_kernel, prologue_cycles, body_cycles, early != 0);
    });
}

CALIBRATION_ENTRY block_barriers(int64_t repeats, int64_t threads, int64_t blocks, cudaStream_t stream) {
    return guarded([=] { launch(config("block_barriers", blocks, threads, stream), block_barriers_kernel, repeats); });
}

CALIBRATION_ENTRY cluster_barriers(int64_t repeats, int64_t cluster, int64_t threads, int64_t blocks, cudaStream_t stream) {
    return guarded([=] {
        LaunchConfig clusters = config("cluster_barriers", blocks, threads, stream);
        clusters.cluster_blocks = unsigned(cluster);
        launch(clusters, cluster_barriers_kernel, repeats);
    });
}

// counter: one word.
CALIBRATION_ENTRY grid_barriers(int64_t repeats, unsigned* counter, int64_t threads, int64_t blocks, cudaStream_t stream) {
    return guarded([=] {
        if (cudaMemsetAsync(counter, 0, sizeof(unsigned), stream) != cudaSuccess) throw std::runtime_error("grid_barriers: the counter cannot be set");
        launch(config("grid_barriers", blocks, threads, stream), grid_barriers_kernel, repeats, counter);
    });
}

}  // namespace llama4_kernels::calibration
