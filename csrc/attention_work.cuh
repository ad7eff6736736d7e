// How a batch becomes items of work, from sequence lengths on the device: each block counts every request's items, takes the one of its own
// number, and then draws from a counter whichever is next: a block of short items takes more of them.
//
// A request of many queries has an item per block of 128 rows, a row being a query and one of the heads of a KV head, and, where all of them
// see many keys, per split of these, or else the items of a long prefix would be few and equally long; a request of few
// queries has its keys split, and an item per run of splits. Which it is, and how its keys are split, follows from the request alone, so that
// its bits do not depend on its neighbours; how many splits a run has follows from the batch.
#pragma once

#include "attention.h"
#include "device.h"
#include "hopper/barrier.cuh"
#include "indices.cuh"
#include "warp.cuh"

namespace llama4_kernels {

constexpr int ATTENTION_MAX_RUN = 32;  // splits that an item of few queries takes at most: each lane weighs one number of them
// What such an item costs beside its keys and values, in bytes of these that a block could read meanwhile.
constexpr float ATTENTION_ITEM_BYTES = 160 << 10;

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

// Splits of the keys of each block of rows, where there are many queries.
__device__ inline int row_splits(const AttentionArguments& a, const Request& request) {
    const bool one_chunk = chunk_start(request.before, a.chunk_size) == chunk_start(request.before + request.queries - 1, a.chunk_size);
    const int least_tiles = one_chunk ? KeyRange(a, request, 0, 0).tiles : 1;
    return max(1, min(least_tiles / ATTENTION_ROW_SPLIT_TILES, a.max_row_splits));
}

// How the keys of few queries are split.
struct Splits {
    int count, tiles;  // tiles of each, a multiple of ATTENTION_PARTS, save for the last

    // Both in a number below 0.
    __device__ int packed() const { return -int(unsigned(tiles) / ATTENTION_PARTS << 8 | unsigned(count)); }
    __device__ static Splits of(int packed) { return {-packed & 0xff, int(unsigned(-packed) >> 8) * ATTENTION_PARTS}; }
};
static_assert(ATTENTION_MAX_SPLITS <= 0xff);

// Splits of few queries, packed, or items of many, of one KV head.
__device__ inline int pieces_of(const AttentionArguments& a, int index) {
    const Request request(a, index);
    if (request.queries <= 0) return 0;
    if (!has_few_queries(a, request.queries))
        return divide_up(request.queries * (a.num_heads / a.num_kv_heads), ATTENTION_ROWS) * row_splits(a, request);
    const int tiles = KeyRange(a, request, 0, request.queries - 1).tiles, of_split = tiles_per_split(a, tiles);
    return Splits{divide_up(tiles, of_split), of_split}.packed();
}

__device__ inline int items_of(int pieces, int run) { return pieces < 0 ? divide_up(Splits::of(pieces).count, run) : pieces; }

// The batch's items of few queries, of one KV head, where each takes up to so many splits. Each split leaves the same part, whoever
// computes it; but what an item costs beside its keys is paid less often where items are few, and blocks are left idle.
struct Run {
    int items;
    int longest;  // of them, in tiles

    // About as many tiles as the busiest block has, with what items cost: at most as if all items were as long as the longest. Where they
    // differ, blocks end within an item of each other: a time of three quarters of the longest behind the mean led nearest to the best choice in
    // the batches of tests/test_attention_balance.py.
    __device__ float busiest(const AttentionArguments& a, float tiles, bool only_few, int blocks) const {
        const float tile_bytes = 2 * ATTENTION_TILE * a.head_dim * (a.kv_dtype == Dtype::float8_e4m3fn ? 1 : 2);
        const float of_item = ATTENTION_ITEM_BYTES / tile_bytes, all_items = float(items) * a.num_kv_heads;
        const float behind_mean = (tiles * a.num_kv_heads + all_items * of_item) / blocks + 0.75f * (longest + of_item);
        return only_few ? fminf(behind_mean, ceilf(all_items / blocks) * (longest + of_item)) : behind_mean;
    }
};

// ends[b]: items of requests 0 to b. By all threads of the block, with barriers.
__device__ inline void count_all_items(const AttentionArguments& a, int* ends, Run (&runs)[ATTENTION_MAX_RUN]) {
    constexpr int WARP = ATTENTION_MAX_RUN;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (int b = threadIdx.x; b < a.requests; b += blockDim.x) ends[b] = pieces_of(a, b);
    if (warp == 0) runs[lane] = {0, 0};
    __syncthreads();
    int items = 0, longest = 0;
    const int reciprocal = (1 << 16) / (lane + 1) + 1;  // exact for so few splits, and quicker than a division for each request
    for (int b = warp; b < a.requests; b += warps) {
        if (ends[b] >= 0) continue;
        const Splits splits = Splits::of(ends[b]);
        items += (splits.count + lane) * reciprocal >> 16;
        longest = max(longest, min(splits.count, lane + 1) * splits.tiles);
    }
    if (items > 0) {
        atomicAdd(&runs[lane].items, items);
        atomicMax(&runs[lane].longest, longest);
    }
    __syncthreads();
    if (warp == 0) {
        float tiles = 0.0f;
        bool only_few = true;
        for (int b = lane; b < a.requests; b += WARP) {
            const Splits splits = Splits::of(min(ends[b], 0));
            tiles += float(splits.count) * splits.tiles;
            only_few = only_few && ends[b] <= 0;
        }
        for (int distance = WARP / 2; distance > 0; distance /= 2) tiles += __shfl_xor_sync(ALL_LANES, tiles, distance);
        only_few = __all_sync(ALL_LANES, only_few);
        const unsigned time = __float_as_uint(runs[lane].busiest(a, tiles, only_few, gridDim.x));  // as a float above 0 has its order
        const int run = __ffs(__ballot_sync(ALL_LANES, time == __reduce_min_sync(ALL_LANES, time)));
        int before = 0;
        for (int first = 0; first < a.requests; first += WARP) {
            const int b = first + lane;
            const int sum = inclusive_sum(b < a.requests ? items_of(ends[b], run) : 0);
            if (b < a.requests) ends[b] = before + sum;
            before += __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
    }
    __syncthreads();
}

struct Item {
    Request request;
    int kv_head;
    bool few;
    int first_row, rows;  // of request.queries · group
    KeyRange keys;           // those of its tiles and of all its rows
    int split, split_tiles;  // the first of the run, and how many tiles each has, save for the last
    int splits, runs;        // of the request, or of the block of rows, whose runs are of one split
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
    const int of_rows = few ? 1 : row_splits(a, request);
    const int first_row = few ? 0 : (items - 1 - place) / of_rows * ATTENTION_ROWS;
    const int rows = min(request.queries * group - first_row, ATTENTION_ROWS);
    KeyRange keys(a, request, first_row / group, (first_row + rows - 1) / group);
    const int size = few ? tiles_per_split(a, keys.tiles) : divide_up(keys.tiles, of_rows);
    const int splits = few ? divide_up(keys.tiles, size) : of_rows;
    const int per_run = few ? divide_up(splits, items) : 1;  // runs of one length, save for the last
    const int first_split = few ? place * per_run : place % of_rows;
    keys.first_tile += first_split * size;
    keys.tiles = min(per_run * size, keys.tiles - first_split * size);
    return {request, item % a.num_kv_heads, few, first_row, rows, keys, first_split, size, splits, few ? items : of_rows};
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

// What the splits of an item's rows leave.
struct Parts {
    float* lse;
    float* partial;
    int64_t first_token, per_row;

    __device__ Parts(const AttentionArguments& a, const Item& item) {
        const bool by_token = !item.few || a.tokens <= int64_t(a.requests) * ATTENTION_FEW_QUERIES;
        lse = item.few ? a.lse : a.row_lse;
        partial = item.few ? a.partial : a.row_partial;
        first_token = by_token ? item.request.first_token : int64_t(item.request.index) * ATTENTION_FEW_QUERIES;
        per_row = item.few ? a.max_splits * ATTENTION_PARTS : a.max_row_splits;
    }

    // Where, in lse, those of a row of the item begin.
    __device__ int64_t start(const AttentionArguments& a, const Item& item, int row) const {
        const int group = a.num_heads / a.num_kv_heads, of_request = item.first_row + row;
        return ((first_token + of_request / group) * a.num_heads + item.kv_head * group + of_request % group) * per_row;
    }
};

__device__ inline int parts_per_split(const Item& item) { return item.few ? ATTENTION_PARTS : 1; }

__device__ inline unsigned* ticket_of(const AttentionArguments& a, const Item& item) {
    if (item.few) return &a.tickets[item.request.index * a.num_kv_heads + item.kv_head];
    const int64_t first = int64_t(item.request.first_token) * (a.num_heads / a.num_kv_heads) / ATTENTION_ROWS + item.request.index;
    return &a.row_tickets[(first + item.first_row / ATTENTION_ROWS) * a.num_kv_heads + item.kv_head];
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
