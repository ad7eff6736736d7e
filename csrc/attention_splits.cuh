// How a request's keys are split. It follows from the request alone, so that its bits do not depend on its neighbours.
#pragma once

#include "attention_geometry.cuh"

namespace llama4_kernels {

struct Splits {
    int count, tiles;  // tiles of each, save for the last
};

// Of few queries, whose tiles are a multiple of ATTENTION_FEW_PARTS.
__device__ inline Splits few_splits(const AttentionArguments& a, int tiles) {
    const int even_split = ceil_div(tiles, a.few_max_splits * ATTENTION_FEW_PARTS) * ATTENTION_FEW_PARTS;
    const int split_tiles = max(ATTENTION_FEW_SPLIT_TILES, even_split);
    return {ceil_div(tiles, split_tiles), split_tiles};
}

// Splits of the keys of each block of rows of many queries. Only where all blocks of rows see many keys: then the items are few and equally
// long.
__device__ inline int many_splits(const AttentionArguments& a, const Request& request) {
    const bool one_chunk = chunk_start(request.before, a.chunk_size) == chunk_start(request.before + request.queries - 1, a.chunk_size);
    const int least_tiles = one_chunk ? KeyRange(a, request, 0, 0).tiles : 1;
    return max(1, min(least_tiles / ATTENTION_MANY_SPLIT_TILES, a.many_max_splits));
}

// What one KV head of a request is to blocks, in a word of shared memory:
//
//     31  30                       8   7          0
//     ┌───┬─────────────────────────┬──────────────┐
//     │ 1 │ splits.tiles / PARTS    │ splits.count │  few queries
//     ├───┼─────────────────────────┴──────────────┤
//     │ 0 │ items                                  │  many queries, or none
//     └───┴────────────────────────────────────────┘
struct RequestWork {
    unsigned bits;

    __device__ static RequestWork of(const AttentionArguments& a, int index) {
        const Request request(a, index);
        if (request.queries <= 0) return {0};
        if (!has_few_queries(a, request.queries)) {
            return {unsigned(ceil_div(request.queries * group_size(a), ATTENTION_MANY_ROWS) * many_splits(a, request))};
        }
        return encode(few_splits(a, KeyRange(a, request, 0, request.queries - 1).tiles));
    }

    __device__ bool has_few() const { return bits & FEW; }

    // Of few queries.
    __device__ Splits splits() const { return {int(bits & MOST_SPLITS), int((bits & ~FEW) >> SPLIT_BITS) * ATTENTION_FEW_PARTS}; }

    // Where an item of few queries takes up to `run` splits.
    __device__ int items(int run) const { return has_few() ? ceil_div(splits().count, run) : int(bits); }

private:
    static constexpr unsigned FEW = 1u << 31;
    static constexpr int SPLIT_BITS = 8;
    static constexpr unsigned MOST_SPLITS = (1u << SPLIT_BITS) - 1;
    static_assert(ATTENTION_FEW_MAX_SPLITS <= MOST_SPLITS);

    __device__ static RequestWork encode(Splits splits) {
        return {FEW | unsigned(splits.tiles) / ATTENTION_FEW_PARTS << SPLIT_BITS | unsigned(splits.count)};
    }
};

}  // namespace llama4_kernels
