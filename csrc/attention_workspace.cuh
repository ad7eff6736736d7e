// Where the splits of an item's rows leave what they have, and the counter by which the last of them knows to combine it.
#pragma once

#include "attention_item.cuh"

namespace llama4_kernels {

struct Parts {
    float* lse;
    float* partial;
    int64_t first_token, per_row;

    __device__ Parts(const AttentionArguments& a, const Item& item) {
        const bool by_token = !item.few || a.tokens <= int64_t(a.requests) * ATTENTION_FEW_QUERIES;
        lse = item.few ? a.few_lse : a.many_lse;
        partial = item.few ? a.few_partial : a.many_partial;
        first_token = by_token ? item.request.first_token : int64_t(item.request.index) * ATTENTION_FEW_QUERIES;
        per_row = item.few ? a.few_max_splits * ATTENTION_FEW_PARTS : a.many_max_splits;
    }

    // Where, in lse, those of a row of the item begin.
    __device__ int64_t start(const AttentionArguments& a, const Item& item, int row) const {
        const int group = group_size(a), of_request = item.first_row + row;
        return ((first_token + of_request / group) * a.num_heads + item.kv_head * group + of_request % group) * per_row;
    }
};

__device__ inline int parts_per_split(const Item& item) { return item.few ? ATTENTION_FEW_PARTS : 1; }

__device__ inline unsigned* ticket_of(const AttentionArguments& a, const Item& item) {
    if (item.few) return &a.few_tickets[item.request.index * a.num_kv_heads + item.kv_head];
    const int64_t first = int64_t(item.request.first_token) * group_size(a) / ATTENTION_MANY_ROWS + item.request.index;
    return &a.many_tickets[(first + item.first_row / ATTENTION_MANY_ROWS) * a.num_kv_heads + item.kv_head];
}

}  // namespace llama4_kernels
