// An item of work: some rows of one KV head, a row being a query and one of the heads of the KV head, and some tiles of their keys.
#pragma once

#include "attention_geometry.cuh"

namespace llama4_kernels {

struct Item {
    Request request;
    int kv_head;
    bool few;
    int first_row, rows;           // of request.queries · group_size
    KeyRange keys;                 // those of its tiles and of all its rows
    int first_split, split_tiles;  // of the item's splits, and how many tiles each has, save for the last
    int splits, runs;              // of the request, or of the block of rows, whose runs are of one split
};

// Element of q and out where a row of the request begins.
__device__ inline int64_t row_start(const AttentionArguments& a, const Item& item, int row) {
    const int group = group_size(a);
    return ((int64_t(item.request.first_token) + row / group) * a.num_heads + item.kv_head * group + row % group) * a.head_dim;
}

// Of the item's row `row`; rows past the request's have the last one's.
__device__ inline int position_of(const AttentionArguments& a, const Item& item, int row) {
    return item.request.before + min((item.first_row + row) / group_size(a), item.request.queries - 1);
}

}  // namespace llama4_kernels
