// The last step of route_top1: the block of the grid that ends last sorts all tokens by their experts.
#pragma once

#include "hopper/layout.cuh"
#include "hopper/memory.cuh"
#include "routing.h"
#include "routing_key.cuh"

namespace llama4_kernels::routing {

using hopper::WARP;

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int IDS_AT_ONCE = 8;  // that a thread asks L2 for

// Whether this block is the grid's last, in all of its threads. What the sort reads is written before, by thread 0 or ahead of a barrier of
// the block. flag: in shared memory.
__device__ inline bool is_last_block(unsigned* tickets, int& flag) {
    if (threadIdx.x == 0) {
        flag = hopper::add_acquire_release(tickets, 1) == gridDim.x * gridDim.y - 1;
        if (flag) *tickets = 0;
    }
    __syncthreads();
    return flag;
}

// ids: in shared memory. Each token's best key of each slice of the experts is in a.best.
__device__ inline void sort_few_tokens(int (&ids)[ROUTE_FEW_TOKENS], const RouteArguments& a, int slices) {
    const int thread = threadIdx.x;
    if (thread < a.tokens) {
        Key best = 0;
        for (int slice = 0; slice < slices; ++slice) best = max(best, __ldcg(a.best + thread * slices + slice));
        ids[thread] = expert_of(best);
        a.expert_ids[thread] = expert_of(best);
        a.scores[thread] = score_of(best);
    }
    __syncthreads();
    for (int expert = thread; expert <= a.experts; expert += blockDim.x) {
        int lower = 0;
        for (int token = 0; token < a.tokens; ++token) lower += ids[token] < expert;
        a.offsets[expert] = lower;
    }
    if (thread < a.tokens) {
        int ahead = 0;
        for (int token = 0; token < a.tokens; ++token) ahead += ids[token] < ids[thread] || (ids[token] == ids[thread] && token < thread);
        a.order[ahead] = thread;
    }
}

constexpr int64_t count_bytes(int warps, int experts) { return int64_t(warps + 1) * (experts + 1) * sizeof(int); }

// A counting sort. Each warp takes a range of the tokens twice: to count them by expert, and to place them.
// memory: count_bytes of the block's warps, in shared memory.
__device__ inline void sort_many_tokens(int* memory, const RouteArguments& a) {
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = blockDim.x / WARP;
    const int range = (a.tokens + warps * WARP - 1) / (warps * WARP) * WARP, begin = warp * range, end = min(begin + range, a.tokens);
    const int bins = a.experts + 1;             // one for lanes without a token
    int* const counts = memory;                 // [warps][bins], then the warp's next place for each expert
    int* const starts = counts + warps * bins;  // [bins]
    int* const own = counts + warp * bins;
    const auto walk = [&](int* order) {
        for (int start = begin; start < end; start += IDS_AT_ONCE * WARP) {
            int ids[IDS_AT_ONCE];
#pragma unroll
            for (int i = 0; i < IDS_AT_ONCE; ++i) {
                const int token = start + i * WARP + lane;
                ids[i] = token < end ? __ldcg(a.expert_ids + token) : a.experts;
            }
#pragma unroll
            for (int i = 0; i < IDS_AT_ONCE; ++i) {
                const unsigned peers = __match_any_sync(ALL_LANES, ids[i]);
                const int ahead = __popc(peers & ((1u << lane) - 1)), place = own[ids[i]] + ahead;
                __syncwarp();
                if (ahead == 0) own[ids[i]] = place + __popc(peers);
                __syncwarp();
                if (order && ids[i] < a.experts) order[place] = start + i * WARP + lane;
            }
        }
    };

    for (int i = thread; i < warps * bins; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    walk(nullptr);
    __syncthreads();
    for (int expert = thread; expert < bins; expert += blockDim.x) {
        int sum = 0;
        for (int i = 0; i < warps; ++i) sum += counts[i * bins + expert];
        starts[expert] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        int lower = 0;
        for (int first = 0; first < bins; first += WARP) {
            const int expert = first + lane, count = expert < bins ? starts[expert] : 0;
            int sum = count;
            for (int by = 1; by < WARP; by *= 2) {
                const int below = __shfl_up_sync(ALL_LANES, sum, by);
                if (lane >= by) sum += below;
            }
            if (expert < bins) a.offsets[expert] = starts[expert] = lower + sum - count;
            lower += __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
    }
    __syncthreads();
    for (int expert = thread; expert < bins; expert += blockDim.x) {
        int place = starts[expert];
        for (int i = 0; i < warps; ++i) {
            const int count = counts[i * bins + expert];
            counts[i * bins + expert] = place;
            place += count;
        }
    }
    __syncthreads();
    walk(a.order);
}

}  // namespace llama4_kernels::routing
