// The items of work of a batch by csrc/attention_work.cuh itself, for test_attention_balance.py.
#include "attention_work.cuh"

using namespace llama4_kernels;

// tiles: of each item, in the order of their numbers. Gives how many items there are; more than `capacity` are not written.
extern "C" __attribute__((visibility("default"))) int attention_items(int requests, const int* seq_lens, const int* query_start_loc,
                                                                      int num_heads, int num_kv_heads, int chunk_size, int max_splits,
                                                                      int blocks, int* tiles, int capacity) {
    AttentionArguments a{};
    a.requests = requests;
    a.seq_lens = seq_lens;
    a.query_start_loc = query_start_loc;
    a.num_heads = num_heads;
    a.num_kv_heads = num_kv_heads;
    a.chunk_size = chunk_size;
    a.max_splits = max_splits;
    a.max_row_splits = ATTENTION_MAX_ROW_SPLITS;
    std::vector<int> ends(requests);
    int64_t splits = 0;
    for (int b = 0; b < requests; ++b) splits -= std::min(count_pieces(a, b), 0) * int64_t(num_kv_heads);
    const int run = splits_per_run(splits, blocks);
    int end = 0;
    for (int b = 0; b < requests; ++b) ends[b] = end += items_of_pieces(count_pieces(a, b), run);
    const int items = end * num_kv_heads;
    for (int i = 0; i < std::min(items, capacity); ++i) tiles[i] = item_of(a, ends.data(), run, i).keys.tiles;
    return items;
}
