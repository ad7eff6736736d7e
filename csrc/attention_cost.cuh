// How long a batch takes, by the number of splits that an item of few queries takes. Each split leaves the same part, whoever computes it;
// but what an item costs beside its keys is paid less often where items are few, and then blocks are left idle.
#pragma once

#include "attention.h"
#include "device.h"

namespace llama4_kernels {

// What an item of few queries costs beside its keys and values, in bytes of these that a block could read meanwhile: 5 us at 33 bytes a
// nanosecond, fitted to contexts of 8192 and 65,536 keys on an H200 (docs/attention.md).
constexpr float ATTENTION_ITEM_BYTES = 160 << 10;

// Blocks end within an item of each other: by how much of the longest one the last block is behind the mean. Fitted to the batches of
// tests/test_attention_balance.py, where it leads nearest to the best choice.
constexpr float ATTENTION_LAST_BLOCK = 0.75f;

// The batch's items of few queries, of one KV head, where each takes up to a certain number of splits.
struct Run {
    int items;
    int longest;  // of them, in tiles

    // About as many tiles as the busiest block has, with what items cost. tiles: of all few queries, of one KV head; only_few: whether the
    // batch has no others. Then it is at most as if all items were as long as the longest.
    __device__ float busiest(const AttentionArguments& a, float tiles, bool only_few, int blocks) const {
        const float tile_bytes = 2 * ATTENTION_TILE * a.head_dim * (a.kv_dtype == Dtype::float8_e4m3fn ? 1 : 2);
        const float of_item = ATTENTION_ITEM_BYTES / tile_bytes, all_items = float(items) * a.num_kv_heads;
        const float mean = (tiles * a.num_kv_heads + all_items * of_item) / blocks;
        const float last = mean + ATTENTION_LAST_BLOCK * (longest + of_item);
        return only_few ? fminf(last, ceilf(all_items / blocks) * (longest + of_item)) : last;
    }
};

}  // namespace llama4_kernels
