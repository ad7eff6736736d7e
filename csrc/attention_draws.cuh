// Who takes which item: a block begins with that of its own number, and then draws from a counter whichever is next.
#pragma once

#include "attention.h"
#include "device.h"
#include "hopper/barrier.cuh"

namespace llama4_kernels {

// Whether this thread, one of those that load, draws for its block.
__device__ inline bool draws() { return threadIdx.x == 0; }

// A block draws once for each of its items, to know the next: item gridDim.x + draw. So the grid makes as many draws as there are items,
// and the last one turns the counter back to 0. (atomicAdd would make the thread wait at once, for the shuffle that ptxas puts behind it.)
__device__ inline unsigned draw(const AttentionArguments& a, int items) { return atomicInc(a.drawn, unsigned(items) - 1); }

// Drawn items on their way from the thread that draws to the block's warps, which take each in turn.
struct DrawnItems {
    static constexpr int SLOTS = 2;

    int items[SLOTS];
    hopper::Barrier full[SLOTS], empty[SLOTS];

    // By one thread, which then calls fence_barrier_init before the block's next barrier.
    __device__ void init(unsigned warps) {
        for (int slot = 0; slot < SLOTS; ++slot) {
            full[slot].init(1);
            empty[slot].init(warps);
        }
    }

    __device__ void wait_empty(int count) { empty[count % SLOTS].wait(count / SLOTS & 1 ^ 1); }

    __device__ void put(int count, int item) {
        items[count % SLOTS] = item;
        full[count % SLOTS].arrive();
    }

    // By a whole warp.
    __device__ int take(int count) {
        full[count % SLOTS].wait(count / SLOTS & 1);
        const int item = items[count % SLOTS];
        __syncwarp();
        if (threadIdx.x % 32 == 0) empty[count % SLOTS].arrive();
        return item;
    }
};

}  // namespace llama4_kernels
