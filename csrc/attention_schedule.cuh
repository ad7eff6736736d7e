// How a batch becomes items of work, from sequence lengths on the device. Each block makes the same schedule for itself.
//
// A request of many queries has an item per block of 128 rows and per split of their keys. A request of few queries has an item per run of
// splits; how many splits a run has follows from the batch.
#pragma once

#include "attention_cost.cuh"
#include "attention_item.cuh"
#include "attention_splits.cuh"
#include "search.cuh"
#include "warp.cuh"

namespace llama4_kernels {

constexpr int ATTENTION_MAX_RUN = 32;  // splits that an item of few queries takes at most
static_assert(ATTENTION_MAX_RUN == WARP, "a lane weighs each length of a run");

// Of each request; there is no room for both.
union ScheduleEntry {
    RequestWork work;  // until items are numbered
    int items_end;     // then: items of the requests up to this one, of one KV head
};

class Schedule {
public:
    // entries: of each request; these and runs in shared memory.
    __device__ Schedule(const AttentionArguments& a, ScheduleEntry* entries, Run (&runs)[ATTENTION_MAX_RUN])
        : a(a), entries(entries), runs(runs) {}

    // By all threads of the block, with barriers.
    __device__ void make() {
        classify();
        __syncthreads();
        count_runs();
        __syncthreads();
        if (warp() == 0) number_items(choose_run());
        __syncthreads();
    }

    // ---- the steps, with a barrier after each

    // By all threads.
    __device__ void classify() {
        for (int b = threadIdx.x; b < a.requests; b += blockDim.x) entries[b].work = RequestWork::of(a, b);
        if (warp() == 0) runs[lane()] = {0, 0};
    }

    // By all threads. Lane l counts the items of runs of l + 1 splits, in the requests of its warp.
    __device__ void count_runs() {
        int items = 0, longest = 0;
        const int reciprocal = (1 << 16) / (lane() + 1) + 1;  // exact for so few splits, and quicker than a division for each request
        for (int b = warp(); b < a.requests; b += blockDim.x / WARP) {
            const RequestWork work = entries[b].work;
            if (!work.has_few()) continue;
            const Splits splits = work.splits();
            items += (splits.count + lane()) * reciprocal >> 16;
            longest = max(longest, min(splits.count, lane() + 1) * splits.tiles);
        }
        if (items > 0) {
            atomicAdd(&runs[lane()].items, items);
            atomicMax(&runs[lane()].longest, longest);
        }
    }

    // By one warp: the splits of a run with which the batch takes the least time.
    __device__ int choose_run() const {
        float tiles = 0.0f;
        bool only_few = true;
        for (int b = lane(); b < a.requests; b += WARP) {
            const RequestWork work = entries[b].work;
            if (work.has_few()) tiles += float(work.splits().count) * work.splits().tiles;
            only_few = only_few && (work.has_few() || work.items(1) == 0);
        }
        for (int distance = WARP / 2; distance > 0; distance /= 2) tiles += __shfl_xor_sync(ALL_LANES, tiles, distance);
        only_few = __all_sync(ALL_LANES, only_few);
        const unsigned time = __float_as_uint(runs[lane()].busiest(a, tiles, only_few, gridDim.x));  // as a float above 0 has its order
        return __ffs(__ballot_sync(ALL_LANES, time == __reduce_min_sync(ALL_LANES, time)));
    }

    // By one warp.
    __device__ void number_items(int run) {
        int before = 0;
        for (int first = 0; first < a.requests; first += WARP) {
            const int b = first + lane();
            const int sum = inclusive_sum(b < a.requests ? entries[b].work.items(run) : 0);
            if (b < a.requests) entries[b].items_end = before + sum;
            before += __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
    }

    // ---- the schedule

    __device__ int items() const { return a.requests ? entries[a.requests - 1].items_end * a.num_kv_heads : 0; }

    __device__ Item item(int number) const {
        const int index = number / a.num_kv_heads;
        const int b = request_of(index), begin = b ? entries[b - 1].items_end : 0;
        const int items = entries[b].items_end - begin, place = index - begin;
        const int group = group_size(a);
        const Request request(a, b);
        const bool few = has_few_queries(a, request.queries);
        const int of_rows = few ? 1 : many_splits(a, request);
        const int block = few ? 0 : (items - 1 - place) / of_rows;  // the last rows see the most keys: their items come first
        const int first_row = block * ATTENTION_MANY_ROWS;
        const int rows = min(request.queries * group - first_row, ATTENTION_MANY_ROWS);
        KeyRange keys(a, request, first_row / group, (first_row + rows - 1) / group);
        const Splits splits = few ? few_splits(a, keys.tiles) : Splits{of_rows, ceil_div(keys.tiles, of_rows)};
        const int run = few ? ceil_div(splits.count, items) : 1;  // the chosen one, made even: of 33 splits 17 and 16, not 32 and 1
        const int first_split = few ? place * run : place % of_rows;
        keys.first_tile += first_split * splits.tiles;
        keys.tiles = min(run * splits.tiles, keys.tiles - first_split * splits.tiles);
        const int runs = few ? items : of_rows;
        return {request, number % a.num_kv_heads, few, first_row, rows, keys, first_split, splits.tiles, splits.count, runs};
    }

private:
    __device__ static int lane() { return threadIdx.x % WARP; }
    __device__ static int warp() { return threadIdx.x / WARP; }

    // The first whose items end behind this one.
    __device__ int request_of(int index) const {
        return count_first(a.requests - 1, [&](int b) { return entries[b].items_end <= index; });
    }

    const AttentionArguments& a;
    ScheduleEntry* const entries;
    Run (&runs)[ATTENTION_MAX_RUN];
};

}  // namespace llama4_kernels
