// How a batch becomes items of work, from sequence lengths on the device: each block counts every request's items, takes the one of its own
// number, and then draws from a counter whichever is next: a block of short items takes more of them.
//
// A request of many queries has an item per block of 128 rows, a row being a query and one of the heads of a KV head; a request of few
// queries has an item per split of its keys. Which it is, and how its keys are split, follows from the request alone, so that its bits do
// not depend on its neighbours.
#pragma once

#include "attention.h"
#include "device.h"
#include "hopper/barrier.cuh"
#include "indices.cuh"

namespace llama4_kernels {

constexpr int ATTENTION_ROWS = 128;

__device__ inline int divide_up(int a, int b) { return (a + b - 1) / b; }

__device__ inline int chunk_start(int position, int chunk_size) { return position / chunk_size * chunk_size; }

struct Request {
    int index;
    int first_token;
    int queries;
    int before;  // keys that precede its first query

    __device__ Request(const AttentionArguments& a, int request) : index(request), first_token(a.query_start_loc[request]) {
        queries = a.query_start_loc[request + 1] - first_token;
        before = a.seq_lens[request] - queries;
    }
};

// Keys that some query from `first` to `last` of a request sees, and the tiles that hold them: tile i holds positions i · ATTENTION_TILE
// on.
struct KeyRange {
    int begin, end;
    int first_tile, tiles;

    __device__ KeyRange(const AttentionArguments& a, const Request& request, int first, int last) {
        begin = chunk_start(request.before + first, a.chunk_size);
        end = request.before + last + 1;
        first_tile = begin / ATTENTION_TILE;
        tiles = (end - 1) / ATTENTION_TILE + 1 - first_tile;
    }
};

__device__ inline bool has_few_queries(const AttentionArguments& a, int queries) {
    return queries <= ATTENTION_FEW_QUERIES && queries * (a.num_heads / a.num_kv_heads) <= ATTENTION_FEW_ROWS;
}

__device__ inline int tiles_per_split(const AttentionArguments& a, int tiles) {
    const int even_split = divide_up(tiles, a.max_splits * ATTENTION_PARTS) * ATTENTION_PARTS;
    return max(ATTENTION_SPLIT_TILES, even_split);
}

// Items of one KV head.
__device__ inline int count_items(const AttentionArguments& a, int index) {
    const Request request(a, index);
    if (request.queries <= 0) return 0;
    if (!has_few_queries(a, request.queries)) return divide_up(request.queries * (a.num_heads / a.num_kv_heads), ATTENTION_ROWS);
    const int tiles = KeyRange(a, request, 0, request.queries - 1).tiles;
    return divide_up(tiles, tiles_per_split(a, tiles));
}

// ends[b]: items of requests 0 to b. By all threads of the block, with barriers.
__device__ inline void count_all_items(const AttentionArguments& a, int* ends) {
    constexpr int WARP = 32;
    for (int b = threadIdx.x; b < a.requests; b += blockDim.x) ends[b] = count_items(a, b);
    __syncthreads();
    if (threadIdx.x < WARP) {
        int before = 0;
        for (int first = 0; first < a.requests; first += WARP) {
            const int b = first + threadIdx.x;
            int sum = b < a.requests ? ends[b] : 0;
            for (int distance = 1; distance < WARP; distance *= 2) {
                const int other = __shfl_up_sync(~0u, sum, distance);
                if (int(threadIdx.x) >= distance) sum += other;
            }
            if (b < a.requests) ends[b] = before + sum;
            before += __shfl_sync(~0u, sum, WARP - 1);
        }
    }
    __syncthreads();
}

struct Item {
    Request request;
    int kv_head;
    bool few;
    int first_row, rows;  // of request.queries · group
    KeyRange keys;        // of a split: those of its tiles and of all its rows
    int split, splits;
};

__device__ inline int first_request_past(const int* ends, int requests, int index) {
    int low = 0, high = requests - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > index) high = middle;
        else low = middle + 1;
    }
    return low;
}

__device__ inline Item item_of(const AttentionArguments& a, const int* ends, int item) {
    const int index = item / a.num_kv_heads;
    const int b = first_request_past(ends, a.requests, index);
    const int group = a.num_heads / a.num_kv_heads;
    const Request request(a, b);
    const int items = ends[b] - (b ? ends[b - 1] : 0);
    const int place = index - (ends[b] - items);
    const bool few = has_few_queries(a, request.queries);
    // the last rows see the most keys: begin with them
    const int first_row = few ? 0 : (items - 1 - place) * ATTENTION_ROWS;
    const int rows = min(request.queries * group - first_row, ATTENTION_ROWS);
    KeyRange keys(a, request, first_row / group, (first_row + rows - 1) / group);
    if (few) {
        const int size = tiles_per_split(a, keys.tiles);
        keys.first_tile += place * size;
        keys.tiles = min(size, keys.tiles - place * size);
    }
    return {request, item % a.num_kv_heads, few, first_row, rows, keys, few ? place : 0, few ? items : 1};
}

// ---- rows

// Element of q and out where row `row` of an item begins.
__device__ inline int64_t row_start(const AttentionArguments& a, const Item& item, int row) {
    const int group = a.num_heads / a.num_kv_heads;
    return ((int64_t(item.request.first_token) + row / group) * a.num_heads + item.kv_head * group + row % group) * a.head_dim;
}

// Rows past the request's have the last one's.
__device__ inline int position_of(const AttentionArguments& a, const Item& item, int row) {
    const int group = a.num_heads / a.num_kv_heads;
    return item.request.before + min((item.first_row + row) / group, item.request.queries - 1);
}

// Where, in lse, the parts of a row begin.
__device__ inline int64_t parts_start(const AttentionArguments& a, const Item& item, int row) {
    const int group = a.num_heads / a.num_kv_heads;
    const bool by_token = a.tokens <= int64_t(a.requests) * ATTENTION_FEW_QUERIES;
    const int64_t first = by_token ? item.request.first_token : int64_t(item.request.index) * ATTENTION_FEW_QUERIES;
    return ((first + row / group) * a.num_heads + item.kv_head * group + row % group) * (a.max_splits * ATTENTION_PARTS);
}

// ---- who takes which item

// Whether this thread draws for its block, one of those that load.
__device__ inline bool draws() { return threadIdx.x == 0; }

// Once for each item of the block: so there are as many draws as items, and the last one turns the counter back to 0. (atomicAdd would
// make the thread wait at once, for the shuffle that ptxas puts behind it.) What the block does next is item gridDim.x + draw.
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
