// Which keys the queries of a request see.
#pragma once

#include "attention.h"
#include "device.h"

namespace llama4_kernels {

// Query heads that share a KV head.
__device__ inline int group_size(const AttentionArguments& a) { return a.num_heads / a.num_kv_heads; }

__device__ inline int chunk_start(int position, int chunk_size) { return position / chunk_size * chunk_size; }

struct Request {
    int index;
    int first_token;
    int queries;
    int before;  // keys that precede its first query; lengths that are too small may give wrong answers, but no item without tiles

    __device__ Request(const AttentionArguments& a, int request) : index(request), first_token(a.query_start_loc[request]) {
        queries = a.query_start_loc[request + 1] - first_token;
        before = max(a.seq_lens[request] - queries, 0);
    }
};

// Keys that some query from `first` to `last` of a request sees, and the tiles that hold them: tile i holds positions from
// i · ATTENTION_TILE on.
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
    return queries <= ATTENTION_FEW_QUERIES && queries * group_size(a) <= ATTENTION_FEW_ROWS;
}

}  // namespace llama4_kernels
