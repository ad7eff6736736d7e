// The last step of route_top1: one block, the grid's last to end or with a single slice the first, sorts all tokens by their experts.
#pragma once

#include <limits>

#include "hopper/layout.cuh"
#include "routing.h"
#include "routing_key.cuh"
#include "tickets.cuh"
#include "warp.cuh"

namespace llama4_kernels::routing {

constexpr int IDS_AT_ONCE = 8;  // expert ids that a thread has under way from L2

// Whether this block is the last of `blocks`, in all of its threads. What the sort reads is written before, by thread 0 or ahead of a
// barrier of the block. flag: in shared memory.
__device__ inline bool is_last_block(unsigned* tickets, int& flag, unsigned blocks) {
    if (threadIdx.x == 0) flag = is_last_ticket(tickets, blocks);
    __syncthreads();
    return flag;
}

// A token and its expert as an integer, in the order of the sort; NO_ENTRY is past all of them.
__device__ inline int sort_entry(int expert, int token) { return expert * ROUTE_FEW_TOKENS + token; }
constexpr int NO_ENTRY = std::numeric_limits<int>::max();

// In shared memory, of each token; each thread writes its own, and all wait for the block before place_few_tokens.
struct alignas(16) SortEntries {
    int values[ROUTE_FEW_TOKENS];
};

// A token's place is how many entries are below its own, and an expert's offset how many are below the expert's first.
__device__ inline void place_few_tokens(const SortEntries& entries, const RouteArguments& a) {
    constexpr int AT_ONCE = 4;  // of four entries
    for (int i = threadIdx.x; i <= ROUTE_FEW_TOKENS + a.experts; i += blockDim.x) {
        const int expert = i - ROUTE_FEW_TOKENS, limit = expert < 0 ? entries.values[i] : sort_entry(expert, 0);
        int below = 0;
        for (int first = 0; first < a.tokens; first += 4 * AT_ONCE) {
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const int4 four = reinterpret_cast<const int4*>(entries.values + first)[j];
                below += (four.x < limit) + (four.y < limit) + (four.z < limit) + (four.w < limit);
            }
        }
        if (expert >= 0) {
            a.offsets[expert] = below;
        } else if (i < a.tokens) {
            a.order[below] = i;
        }
    }
}

// Each token's best key of each slice of the experts is in a.best. By at least ROUTE_FEW_TOKENS threads.
__device__ inline void sort_few_tokens(SortEntries& entries, const RouteArguments& a, int slices) {
    const int thread = threadIdx.x;
    if (thread < a.tokens) {
        Key best = 0;
        for (int slice = 0; slice < slices; ++slice) best = max(best, __ldcg(a.best + thread * slices + slice));
        entries.values[thread] = sort_entry(expert_of(best), thread);
        a.expert_ids[thread] = expert_of(best);
        a.scores[thread] = score_of(best);
    } else if (thread < ROUTE_FEW_TOKENS) {
        entries.values[thread] = NO_ENTRY;
    }
    __syncthreads();
    place_few_tokens(entries, a);
}

constexpr int64_t count_bytes(int warps, int experts) { return int64_t(warps + 1) * (experts + 1) * sizeof(int); }

// A counting sort. Each warp takes a range of the tokens twice: to count them by expert, and to place them.
// memory: count_bytes of the block's warps, in shared memory.
__device__ inline void sort_many_tokens(int* memory, const RouteArguments& a) {
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = blockDim.x / WARP;
    const int range = ceil_div(unsigned(a.tokens), warps * WARP) * WARP, begin = warp * range, end = min(begin + range, a.tokens);
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
            // A ballot for each bit: __match_any_sync takes a turn for each different id
            unsigned peers[IDS_AT_ONCE];
#pragma unroll
            for (unsigned& lanes : peers) lanes = ALL_LANES;
            for (int bit = 1; bit <= a.experts; bit *= 2) {
#pragma unroll
                for (int i = 0; i < IDS_AT_ONCE; ++i) {
                    const unsigned lanes = __ballot_sync(ALL_LANES, ids[i] & bit);
                    peers[i] &= ids[i] & bit ? lanes : ~lanes;
                }
            }
#pragma unroll
            for (int i = 0; i < IDS_AT_ONCE; ++i) {
                if (start + i * int(WARP) >= end) break;
                const int ahead = __popc(peers[i] & ((1u << lane) - 1)), place = own[ids[i]] + ahead;
                __syncwarp();
                if (ahead == 0) own[ids[i]] = place + __popc(peers[i]);
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
            const int sum = inclusive_sum(count);
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
