#pragma once

#include <cstdint>

#include <driver_types.h>

#include "dtype.h"
#include "indices.h"

namespace llama4_kernels {

constexpr int ATTENTION_TILE = 128;  // keys
constexpr int ATTENTION_MAX_REQUESTS = 4096;
constexpr int ATTENTION_NO_CHUNK = 1 << 30;

// A row is a query and one of the heads of a KV head. A request of at most so many queries, and so many rows of a KV head, has few:
constexpr int ATTENTION_FEW_QUERIES = 8;
constexpr int ATTENTION_FEW_ROWS = 64;
constexpr int ATTENTION_FEW_SPLIT_TILES = 2;  // of a split of its keys, at least
constexpr int ATTENTION_FEW_MAX_SPLITS = 128;
constexpr int ATTENTION_FEW_PARTS = 2;  // of a split: each warpgroup leaves one

// Any other has many:
constexpr int ATTENTION_MANY_ROWS = 128;        // of an item
constexpr int ATTENTION_MANY_SPLIT_TILES = 64;  // of a split of its keys, at least
constexpr int ATTENTION_MANY_MAX_SPLITS = 4;

// q, out [tokens, num_heads, head_dim] bfloat16; caches [slots, num_kv_heads, head_dim] bfloat16 or float8_e4m3fn; head_dim 64 or 128.
// These four pointers are multiples of 16. The rest, and what is computed: llama4_kernels/ops/attention.py.
struct AttentionArguments {
    const void* q;
    const void* k_cache;
    const void* v_cache;
    Dtype kv_dtype;
    void* out;
    int tokens, num_heads, num_kv_heads, head_dim;
    int64_t slots;
    int page_size;
    bool holds_slots;  // the page table, of each key; else pages
    const int* page_table;
    int64_t page_table_stride;  // elements from one row to the next
    int requests;
    Indices page_table_rows;  // [requests], or null values: row b for request b
    Indices slot_map;         // or null values
    const int* seq_lens;
    const int* query_start_loc;
    int chunk_size;        // at most ATTENTION_NO_CHUNK
    float scale;           // above 0, of natural logarithms
    const float* k_scale;  // of fp8 caches, or null: 1
    const float* v_scale;
    // What the splits of few queries leave for the last of them to combine. A row is a token where tokens are at most ATTENTION_FEW_QUERIES
    // per request, else request · ATTENTION_FEW_QUERIES + query; there are min(tokens, requests · ATTENTION_FEW_QUERIES).
    float* few_partial;      // [rows, num_heads, few_max_splits · ATTENTION_FEW_PARTS, head_dim]
    float* few_lse;          // [rows, num_heads, few_max_splits · ATTENTION_FEW_PARTS]: logarithms of base 2
    unsigned* few_tickets;   // [requests · num_kv_heads], zeros before and after
    int few_max_splits;      // 1 to ATTENTION_FEW_MAX_SPLITS
    // The same of many queries, whose rows are tokens; not used where many_max_splits is 1.
    float* many_partial;     // [tokens, num_heads, many_max_splits, head_dim]
    float* many_lse;         // [tokens, num_heads, many_max_splits]
    unsigned* many_tickets;  // [tokens · (num_heads / num_kv_heads) / ATTENTION_MANY_ROWS + requests, num_kv_heads], zeros before and after
    int many_max_splits;     // 1 to ATTENTION_MANY_MAX_SPLITS
    unsigned* drawn;         // items of work that blocks have drawn, 0 before and after
};

void chunked_attention(const AttentionArguments& arguments, cudaStream_t stream);

}  // namespace llama4_kernels
