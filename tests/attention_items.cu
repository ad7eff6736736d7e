// The items of work of a batch by csrc/attention_schedule.cuh itself, for test_attention_balance.py.
#include "attention_schedule.cuh"
#include "device.h"

using namespace llama4_kernels;

namespace {

struct Result {
    int* tiles;  // of each item, in the order of their numbers; more than `capacity` are not written
    int capacity, count;
};

// run: splits that an item of few queries takes at most, or 0 for the kernel's own choice. One block counts for a grid of as many as there are.
__global__ void count_kernel(const AttentionArguments a, int run, Result* result) {
    struct SharedMemory {
        Run runs[ATTENTION_MAX_RUN];
        ScheduleEntry entries[ATTENTION_MAX_REQUESTS];
    };
    auto& shared = *shared_memory<SharedMemory>();
    if (blockIdx.x > 0) return;
    Schedule schedule(a, shared.entries, shared.runs);
    if (run == 0) {
        schedule.make();
    } else {
        schedule.classify();
        __syncthreads();
        if (threadIdx.x < hopper::WARP) schedule.number_items(run);
        __syncthreads();
    }
    if (threadIdx.x > 0) return;
    result->count = schedule.items();
    for (int i = 0; i < min(result->count, result->capacity); ++i) result->tiles[i] = schedule.item(i).keys.tiles;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int attention_items(int requests, const int* seq_lens, const int* query_start_loc,
                                                                      int num_heads, int num_kv_heads, int fp8, int chunk_size,
                                                                      int max_splits, int run, int blocks, int* tiles, int capacity) {
    AttentionArguments a{};
    a.requests = requests;
    a.seq_lens = seq_lens;
    a.query_start_loc = query_start_loc;
    a.num_heads = num_heads;
    a.num_kv_heads = num_kv_heads;
    a.head_dim = 128;
    a.kv_dtype = fp8 ? Dtype::float8_e4m3fn : Dtype::bfloat16;
    a.chunk_size = chunk_size;
    a.few_max_splits = max_splits;
    a.many_max_splits = ATTENTION_MANY_MAX_SPLITS;
    Result result{tiles, capacity, 0};
    const size_t shared_bytes = ATTENTION_MAX_RUN * sizeof(Run) + ATTENTION_MAX_REQUESTS * sizeof(ScheduleEntry);
    launch(LaunchConfig{"attention_items", dim3(unsigned(blocks)), dim3(64), shared_bytes, nullptr}, &count_kernel, a, run, &result);
    return result.count;
}
