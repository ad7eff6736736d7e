#pragma once

#include <cstdint>

#include <driver_types.h>

#include "dtype.h"
#include "indices.h"

namespace llama4_kernels {

constexpr int ATTENTION_TILE = 128;             // keys
constexpr int ATTENTION_SPLIT_TILES = 2;        // at least, of one split: a request with few queries has its keys split among blocks
constexpr int ATTENTION_MAX_SPLITS = 128;
constexpr int ATTENTION_PARTS = 2;              // per split: each warpgroup leaves one
constexpr int ATTENTION_ROWS = 128;             // of an item of many queries, a row being a query and one of the heads of a KV head
constexpr int ATTENTION_ROW_SPLIT_TILES = 64;   // at least, of one split of such an item's keys
constexpr int ATTENTION_MAX_ROW_SPLITS = 4;
constexpr int ATTENTION_FEW_QUERIES = 8;        // per request, at most; as rows, with the heads of a KV head:
constexpr int ATTENTION_FEW_ROWS = 64;
constexpr int ATTENTION_MAX_REQUESTS = 4096;
constexpr int ATTENTION_NO_CHUNK = 1 << 30;

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
    bool holds_slots;
    const int* page_table;
    int64_t row_stride;
    int requests;
    Indices page_table_rows;  // [requests], or null values: row b for request b
    Indices slot_map;         // or null values
    const int* seq_lens;
    const int* query_start_loc;
    int chunk_size;       // at most ATTENTION_NO_CHUNK
    float scale;          // above 0, of natural logarithms
    const float* k_scale;  // of fp8 caches, or null: 1
    const float* v_scale;
    // What the splits of requests with few queries leave for the last of them to combine. A row is a token where tokens are at most
    // ATTENTION_FEW_QUERIES per request, else request · ATTENTION_FEW_QUERIES + query; there are min(tokens, requests ·
    // ATTENTION_FEW_QUERIES).
    float* partial;  // [rows, num_heads, max_splits · ATTENTION_PARTS, head_dim]
    float* lse;      // [rows, num_heads, max_splits · ATTENTION_PARTS]: logarithms of base 2
    unsigned* tickets;  // [requests · num_kv_heads], zeros before and after
    // The same of the splits of many queries, unless max_row_splits is 1.
    float* row_partial;     // [tokens, num_heads, max_row_splits, head_dim]
    float* row_lse;         // [tokens, num_heads, max_row_splits]
    unsigned* row_tickets;  // [tokens · (num_heads / num_kv_heads) / ATTENTION_ROWS + requests, num_kv_heads], zeros before and after
    int max_row_splits;     // 1 to ATTENTION_MAX_ROW_SPLITS
    unsigned* drawn;    // items of work that blocks have drawn, 0 before and after
    int max_splits;     // 1 to ATTENTION_MAX_SPLITS
};

void chunked_attention(const AttentionArguments& arguments, cudaStream_t stream);

}  // namespace llama4_kernels
