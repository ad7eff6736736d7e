// CUDA on the host, for tests without a GPU: the clusters of a grid run one after another in random order, or as many together as a test
// asks for, each thread as a fiber. What a GPU leaves undefined shows: shared memory starts as NaNs and is exactly as large as asked for,
// so that AddressSanitizer guards it.
#pragma once

#include "emulation/stream.h"
#include "emulation/warp.h"

#undef __device__
#undef __host__
#undef __global__
#undef __grid_constant__
#undef __launch_bounds__
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulation {

constexpr int MULTIPROCESSORS = 3;  // few, so that a persistent kernel has more work than blocks

inline unsigned clusters_together = 1;  // take turns, before the next of the grid begin

// Launches that are noted instead of run, as a GPU of so many multiprocessors would get them.
struct Recording {
    struct Launch {
        std::string op;
        dim3 grid, block;
        unsigned cluster_blocks;
        size_t shared_bytes;
    };
    int multiprocessors;
    std::vector<Launch> launches;
};
inline Recording* recording = nullptr;

inline int multiprocessors() { return recording ? recording->multiprocessors : MULTIPROCESSORS; }

inline void* shared_memory() { return current().block->shared.get(); }

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster_blocks, bool dependent,
                     const std::function<void()>& kernel) {
    gridDim = grid;
    blockDim = block;
    std::vector<Cluster> clusters;
    const auto run_all = [&] { scheduler().run(std::exchange(clusters, {}), kernel); };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (const unsigned cluster : scheduler().shuffled(grid.x / cluster_blocks)) {
                std::vector<std::unique_ptr<Block>>& blocks = clusters.emplace_back().blocks;
                for (unsigned rank = 0; rank < cluster_blocks; ++rank) {
                    blocks.push_back(std::make_unique<Block>(dim3(cluster * cluster_blocks + rank, y, z), block.x, shared_bytes));
                    blocks.back()->must_wait = dependent;
                }
                if (clusters.size() == clusters_together) run_all();
            }
        }
    }
    if (!clusters.empty()) run_all();
    scheduler().give_back_stacks();
}

inline void run(const char* op, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster_blocks, bool dependent,
                std::function<void()> kernel) {
    const auto refuse = [&](const std::string& why) { throw std::runtime_error(std::string(op) + ": CUDA refused the launch: " + why); };
    if (block.x % WARP || block.x == 0 || block.x > 1024 || block.y * block.z != 1)
        refuse("the emulation needs 1-D blocks of whole warps, at most 1024 threads");
    if (shared_bytes > MAX_SHARED_BYTES)
        refuse(std::to_string(shared_bytes) + " bytes of shared memory exceed " + std::to_string(MAX_SHARED_BYTES));
    if (cluster_blocks == 0 || cluster_blocks > 8 || grid.x % cluster_blocks)
        refuse("clusters of " + std::to_string(cluster_blocks) + " blocks do not divide the grid");
    if (recording) return recording->launches.push_back({op, grid, block, cluster_blocks, shared_bytes});
    stream.submit(dependent, [=] { run_grid(grid, block, shared_bytes, cluster_blocks, dependent, kernel); });
}

}  // namespace emulation
