// What both halves of the MoE layer share: one tile of weights · activationsᵀ, summed along K over one or several segments. A segment is a
// weight matrix, of the shared expert or of a routed one, with the activations that it is multiplied with; segments may differ in
// precision.
//
// Weights are on the M side of wgmma, SETS tiles of 128 channels per stage; TOKENS rows of activations are on its N side. A loader
// warpgroup fills a ring of stages and two consumer warpgroups multiply, each 64 channels of every set. A stage's products are scaled as
// they move from wgmma's sums to fp32 registers: its own sums of e4m3 products keep fewer bits than fp32, and scales may change every 128
// of K.
#pragma once

#include <cuda_bf16.h>

#include "device.h"
#include "epilogue.cuh"
#include "hopper/cp_async.cuh"
#include "hopper/memory.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "issue_turns.cuh"
#include "moe.h"
#include "moe_runs.cuh"
#include "pipeline.cuh"
#include "tickets.cuh"
#include "warp.cuh"

namespace llama4_kernels {

template <int TOKENS_, int SETS_>
struct MoeShape {
    static constexpr int TOKENS = TOKENS_;
    static constexpr int SETS = SETS_;
    static constexpr int SET_CHANNELS = 128;
    static constexpr int CONSUMERS = 2 * hopper::WARPGROUP;
    static constexpr int CONSUMER_WARPS = CONSUMERS / hopper::WARP;
    static constexpr int LOADERS = hopper::WARPGROUP;
    static constexpr int THREADS = CONSUMERS + LOADERS;
    static constexpr int ROW_BYTES = 128;  // of K per stage and row, one span of the swizzle
    static constexpr int SET_BYTES = SET_CHANNELS * ROW_BYTES;
    static constexpr int TOKEN_BYTES = TOKENS * ROW_BYTES;
    static constexpr int STAGE_BYTES = SETS * SET_BYTES + TOKEN_BYTES;
    static constexpr int STAGES = (206 << 10) / (STAGE_BYTES + TOKENS * int(sizeof(float)));
    static constexpr int LOADER_REGISTERS = TOKENS > 64 ? 72 : 88, CONSUMER_REGISTERS = TOKENS > 64 ? 216 : 208;
    // Arrivals at `full`: 1 (who asks TMA for weights) + each loader's copies by cp.async + each loader's plain stores.
    static constexpr int FULL_ARRIVALS = 1 + 2 * LOADERS;
    static constexpr hopper::Swizzle SWIZZLE = hopper::Swizzle::bytes_128;
    static constexpr int PASS = TOKENS < 32 ? TOKENS : 32;  // tokens that the epilogue transposes at a time
    static_assert(TOKENS % 16 == 0);
};

// This thread's accumulators of one tile, per set.
template <class Shape>
using Sums = float[Shape::SETS][Shape::TOKENS / 2];

template <class Shape>
struct MoeStages {
    alignas(1024) uint8_t weights[Shape::STAGES][Shape::SETS][Shape::SET_BYTES];
    alignas(1024) uint8_t tokens[Shape::STAGES][Shape::TOKEN_BYTES];
    float token_scales[Shape::STAGES][Shape::TOKENS];
    Pipeline<Shape::STAGES> pipeline;
    Work work;
    int is_last;
};

// One expert kind's operands.
struct MoePath {
    MoeOperand x;
    MoeWeight w;
    ScaleForm form;  // of the weight's scale
    bool fp8;
    int k, n, steps;  // of the weight; steps: stages along K

    __device__ int stage_k() const { return fp8 ? 128 : 64; }

    // Whether no scale changes along K.
    __device__ bool steady() const {
        return form != ScaleForm::per_block && x.conversion != MoeConversion::per_block && x.scale_step_stride == 0;
    }
};

// Part of a tile's sum: rows first_row to end_row are multiplied with channels first_channel + set · set_stride … of weight `group`.
struct Segment {
    int group;
    int first_channel, set_stride;
    int tile_row;  // the tile's first row
    int first_row, end_row;
};

// What comes first in a kernel, before it depends on the one ahead.
template <class Shape>
__device__ inline void prepare(MoeStages<Shape>& stages, const hopper::TensorMap& shared_weights, const hopper::TensorMap& routed_weights) {
    if (threadIdx.x != 0) return;
    stages.pipeline.init(Shape::FULL_ARRIVALS, Shape::CONSUMER_WARPS);
    hopper::prefetch_tensor_map(shared_weights);
    hopper::prefetch_tensor_map(routed_weights);
}

// ---- consumers

// Scale of one channel of the weight for one step.
__device__ inline float weight_scale(const MoePath& path, int group, int channel, int step) {
    const int row = min(channel, path.n - 1);
    const int64_t blocks = ceil_div(path.n, SCALE_BLOCK);
    switch (path.form) {
        case ScaleForm::per_tensor: return path.w.scale[group];
        case ScaleForm::per_row: return path.w.scale[int64_t(group) * path.n + row];
        case ScaleForm::per_block: return path.w.scale[(group * blocks + row / SCALE_BLOCK) * path.steps + step];
        default: return 1.0f;
    }
}

// A consumer warpgroup's end of the ring.
template <class Shape>
class StageConsumer {
public:
    __device__ explicit StageConsumer(MoeStages<Shape>& stages)
        : stages_(stages), warpgroup_(__shfl_sync(ALL_LANES, warpgroup(), 0)), turns_(warpgroup_) {}

    // After the last piece.
    __device__ void finish() { turns_.finish(); }

    // Channel, within its set, of this thread's accumulator i.
    static __device__ int channel_of(int i) { return warpgroup() * 64 + hopper::accumulator_row(threadIdx.x % hopper::WARPGROUP, i); }
    static __device__ int token_of(int i) { return hopper::accumulator_column(threadIdx.x % hopper::WARPGROUP, i); }

    // The sums of a segment's steps. Rows of the tile that are not the segment's hold anything.
    __device__ void sum(const MoePath& path, const Segment& segment, int begin, int end, Sums<Shape>& total) {
#pragma unroll
        for (int i = 0; i < Shape::SETS * Shape::TOKENS / 2; ++i) total[i % Shape::SETS][i / Shape::SETS] = 0.0f;
        path.fp8 ? sum_rows<true>(path, segment, begin, end, total) : sum_rows<false>(path, segment, begin, end, total);
    }

    // Add a segment's steps to `total`. Rows of the tile that are not its own stay as they are; is_whole: no other segment has any of them.
    __device__ void add(const MoePath& path, const Segment& segment, bool is_whole, int begin, int end, Sums<Shape>& total) {
        path.fp8 ? add_rows<true>(path, segment, is_whole, begin, end, total) : add_rows<false>(path, segment, is_whole, begin, end, total);
    }

private:
    static __device__ int warpgroup() { return threadIdx.x / hopper::WARPGROUP; }

    // What becomes of a segment's products: they are the sum; they are added to all rows, or to the segment's alone.
    enum class Into { sum, all_rows, own_rows };

    // As few columns as hold the segment's rows: a handful of tokens in a large tile costs no more than in a small one.
    template <bool FP8>
    __device__ void sum_rows(const MoePath& path, const Segment& segment, int begin, int end, Sums<Shape>& total) {
        const int rows = segment.end_row - segment.tile_row;
        if constexpr (Shape::TOKENS > 16) {
            if (rows <= 16) return add_columns<16, Into::sum, FP8>(path, segment, 0, begin, end, total);
        }
        if constexpr (Shape::TOKENS > 64) {
            if (rows <= 32) return add_columns<32, Into::sum, FP8>(path, segment, 0, begin, end, total);
        }
        add_columns<Shape::TOKENS, Into::sum, FP8>(path, segment, 0, begin, end, total);
    }

    template <bool FP8>
    __device__ void add_rows(const MoePath& path, const Segment& segment, bool is_whole, int begin, int end, Sums<Shape>& total) {
        if constexpr (Shape::TOKENS > 16) {
            if (in_window<16>(segment)) return add_window<16, FP8>(path, segment, begin, end, total);
        }
        if constexpr (Shape::TOKENS > 64) {
            if (in_window<32>(segment)) return add_window<32, FP8>(path, segment, begin, end, total);
        }
        if (is_whole) return add_columns<Shape::TOKENS, Into::all_rows, FP8>(path, segment, 0, begin, end, total);
        add_columns<Shape::TOKENS, Into::own_rows, FP8>(path, segment, 0, begin, end, total);
    }

    // Index, in groups of 8 of the tile's rows, of a window of COLUMNS rows that covers the segment, if one does: in_window.
    template <int COLUMNS>
    static __device__ int window_of(const Segment& segment) {
        return min((segment.first_row - segment.tile_row) / 8, (Shape::TOKENS - COLUMNS) / 8);
    }

    template <int COLUMNS>
    static __device__ bool in_window(const Segment& segment) {
        return segment.end_row - segment.tile_row <= window_of<COLUMNS>(segment) * 8 + COLUMNS;
    }

    template <int COLUMNS, bool FP8>
    __device__ void add_window(const MoePath& path, const Segment& segment, int begin, int end, Sums<Shape>& total) {
        const int window = window_of<COLUMNS>(segment);
        const int first = segment.first_row - segment.tile_row, last = segment.end_row - segment.tile_row;
        float part[Shape::SETS][COLUMNS / 2] = {};
        add_columns<COLUMNS, Into::sum, FP8>(path, segment, window * 8, begin, end, part);
#pragma unroll
        for (int group = 0; group < Shape::TOKENS / 8; ++group) {
#pragma unroll
            for (int i = 0; i < Shape::SETS * 4; ++i) {
                float sum = 0.0f;
#pragma unroll
                for (int from = 0; from < COLUMNS / 8; ++from) {
                    if (group == window + from) sum = part[i / 4][from * 4 + i % 4];
                }
                const int row = token_of(group * 4) + i % 2;
                if (row >= first && row < last) total[i / 4][group * 4 + i % 4] += sum;
            }
        }
    }

    // wgmma's columns are the tile's rows from first_column to first_column + COLUMNS; their sums are the first of `total`, and with
    // Into::sum zeros on entry.
    template <int COLUMNS, Into INTO, bool FP8, int VALUES>
    __device__ void add_columns(const MoePath& path, const Segment& segment, int first_column, int begin, int end,
                                float (&total)[Shape::SETS][VALUES]) {
        constexpr bool TOGETHER = Shape::SETS * (Shape::TOKENS + COLUMNS) <= 256;  // registers for the products of all sets at once
        const bool steady = INTO == Into::sum && path.steady();
        const int first = segment.first_row - segment.tile_row, last = segment.end_row - segment.tile_row;
        float scales[Shape::SETS][2], sums[TOGETHER ? Shape::SETS : 1][COLUMNS / 2];
        for (int step = begin; step < end; ++step, at_.advance()) {
            stages_.pipeline.wait_until_full(at_);
            hopper::fence_async_proxy();  // behind the wait this thread sees what loaders copied and stored, behind the fence its wgmma
            if (step == begin || path.form == ScaleForm::per_block) {  // not before the fence, which would wait for these reads
#pragma unroll
                for (int set = 0; set < Shape::SETS; ++set) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int channel = segment.first_channel + set * segment.set_stride + channel_of(half * 2);
                        scales[set][half] = weight_scale(path, segment.group, channel, step);
                    }
                }
            }
            if constexpr (TOGETHER) {
                hopper::wgmma_fence();
#pragma unroll
                for (int set = 0; set < Shape::SETS; ++set) {
                    multiply<COLUMNS, FP8>(set, first_column, sums[set]);
                    hopper::wgmma_commit();
                }
            }
            const float* token_scales = stages_.token_scales[at_.stage] + first_column;
#pragma unroll
            for (int set = 0; set < Shape::SETS; ++set) {
                float(&products)[COLUMNS / 2] = sums[TOGETHER ? set : 0];
                if constexpr (TOGETHER) {
                    set + 1 < Shape::SETS ? hopper::wgmma_wait<1>() : hopper::wgmma_wait<0>();
                } else {
                    turns_.take();
                    hopper::wgmma_fence();
                    multiply<COLUMNS, FP8>(set, first_column, products);
                    hopper::wgmma_commit();
                    turns_.pass();
                    hopper::wgmma_wait<0>();
                }
                if (steady) {
#pragma unroll
                    for (int i = 0; i < COLUMNS / 2; ++i) total[set][i] += products[i];
                    continue;
                }
#pragma unroll
                for (int i = 0; i < COLUMNS / 8; ++i) {
                    const float2 token = *reinterpret_cast<const float2*>(token_scales + token_of(i * 4));
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const int row = token_of(i * 4) + j % 2;
                        const float sum = total[set][i * 4 + j] + products[i * 4 + j] * (scales[set][j / 2] * (j % 2 ? token.y : token.x));
                        if (INTO != Into::own_rows || (row >= first && row < last)) total[set][i * 4 + j] = sum;
                    }
                }
            }
            if (steady && step + 1 == end) {
#pragma unroll
                for (int i = 0; i < COLUMNS / 8; ++i) {
                    const float2 token = *reinterpret_cast<const float2*>(token_scales + token_of(i * 4));
#pragma unroll
                    for (int j = 0; j < Shape::SETS * 4; ++j) {
                        total[j / 4][i * 4 + j % 4] *= scales[j / 4][j % 4 / 2] * (j % 2 ? token.y : token.x);
                    }
                }
            }
            __syncwarp();
            if (threadIdx.x % hopper::WARP == 0) stages_.pipeline.empty[at_.stage].arrive();
        }
    }

    // Between wgmma_fence and wgmma_commit.
    template <int COLUMNS, bool FP8>
    __device__ void multiply(int set, int first_column, float (&sums)[COLUMNS / 2]) {
        const uint64_t weights = hopper::k_major(stages_.weights[at_.stage][set] + warpgroup_ * 64 * Shape::ROW_BYTES, Shape::SWIZZLE);
        const uint64_t tokens = hopper::k_major(stages_.tokens[at_.stage] + first_column * Shape::ROW_BYTES, Shape::SWIZZLE);
#pragma unroll
        for (int byte = 0; byte < Shape::ROW_BYTES; byte += 32) {
            const uint64_t a = hopper::advanced(weights, byte), b = hopper::advanced(tokens, byte);
            if constexpr (FP8) {
                hopper::wgmma_e4m3<COLUMNS>(sums, a, b, byte > 0);
            } else {
                hopper::wgmma_bf16<COLUMNS>(sums, a, b, byte > 0);
            }
        }
    }

    MoeStages<Shape>& stages_;
    const int warpgroup_;  // from a shuffle, so that ptxas knows it to be the same in all lanes and keeps descriptors in uniform registers
    PipelinePosition<Shape::STAGES> at_;
    IssueTurns<(Shape::TOKENS > 64)> turns_;  // where registers hold the products of one set at a time
};

// A barrier of all consumers.
template <class Shape>
__device__ inline void consumers_sync() {
    hopper::named_barrier_sync(1, Shape::CONSUMERS);
}

// Of a tile that blocks share: each leaves its sums in `parts`, and the last one to do so gets, in `total`, the sum of all in the order of
// the blocks. True in that block, and where one block has the whole tile. Of 8 tokens each, only those with is_wanted(first token) count.
template <class Shape, class Tiles, class IsWanted>
__device__ bool combine_pieces(MoeStages<Shape>& stages, const MoeSharing& sharing, const Tiles& tiles, const Piece& piece,
                               IsWanted is_wanted, Sums<Shape>& total) {
    const int steps = tiles.steps(piece.tile);
    if (piece.end - piece.begin == steps) return true;
    constexpr int VALUES = Shape::TOKENS / 2, PART = Shape::SETS * VALUES * Shape::CONSUMERS;
    constexpr int CHUNK = Shape::SETS * VALUES <= 64 ? Shape::SETS * VALUES : 48;  // values on their way from L2, of so many parts
    constexpr int AT_ONCE = 64 / CHUNK;
    static_assert(Shape::SETS * VALUES % CHUNK == 0);
    const StageRuns& runs = stages.work.runs;
    const int first_stage = tiles.first_stage(piece.tile);
    int first = blockIdx.x, last = blockIdx.x;  // the blocks that share the tile; not by a division, for which ptxas would make a call
    while (runs.begin(first) > first_stage) --first;
    while (runs.begin(last + 1) < first_stage + steps) ++last;
    // A block's first part is of the tile that its run begins in, its second of the one that it ends in.
    const auto part_of = [&](int block) {
        return sharing.parts + (2 * block + (runs.begin(block) < first_stage)) * int64_t(PART) + threadIdx.x;
    };
    const auto wanted = [&](int i) { return is_wanted(i % VALUES / 4 * 8); };

    float* own = part_of(blockIdx.x);
#pragma unroll
    for (int i = 0; i < Shape::SETS * VALUES; ++i) {
        if (wanted(i)) own[i * Shape::CONSUMERS] = total[i / VALUES][i % VALUES];
    }
    consumers_sync<Shape>();
    if (threadIdx.x == 0) stages.is_last = is_last_ticket(sharing.tickets + piece.tile, last - first + 1);
    consumers_sync<Shape>();
    if (!stages.is_last) return false;

#pragma unroll
    for (int i = 0; i < Shape::SETS * VALUES; ++i) total[i / VALUES][i % VALUES] = 0.0f;
#pragma unroll 1
    for (int block = first; block <= last; block += AT_ONCE) {
#pragma unroll
        for (int chunk = 0; chunk < Shape::SETS * VALUES; chunk += CHUNK) {
            float parts[AT_ONCE][CHUNK];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const float* part = part_of(block + j);
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) {
                    parts[j][i] = wanted(chunk + i) && block + j <= last ? __ldcg(part + (chunk + i) * Shape::CONSUMERS) : 0.0f;
                }
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) total[(chunk + i) / VALUES][(chunk + i) % VALUES] += parts[j][i];
            }
        }
    }
    return true;
}

// Write a tile with the channels contiguous: value(set, i) is accumulator i's element, row_at(token) where a row of `channels` elements
// goes. staging: PASS rows of SETS sets and 16 bytes. By all consumers; a row's bytes are a multiple of 16.
template <class Shape, int SETS, class T, class Value, class RowAt>
__device__ inline void store_rows(void* staging, int tokens, int channels, Value value, RowAt row_at) {
    constexpr int STRIDE = SETS * Shape::SET_CHANNELS + 16 / int(sizeof(T)), PER_CHUNK = 16 / int(sizeof(T));
    constexpr int CHUNKS = SETS * Shape::SET_CHANNELS / PER_CHUNK;
    T* rows = static_cast<T*>(staging);
#pragma unroll
    for (int pass = 0; pass < Shape::TOKENS / Shape::PASS; ++pass) {
        if (pass * Shape::PASS >= tokens) break;
        consumers_sync<Shape>();
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
#pragma unroll
            for (int i = 0; i < Shape::PASS / 2; ++i) {
                if (pass * Shape::PASS + i / 4 * 8 >= tokens) continue;
                rows[StageConsumer<Shape>::token_of(i) * STRIDE + set * Shape::SET_CHANNELS + StageConsumer<Shape>::channel_of(i)] =
                    value(set, pass * Shape::PASS / 2 + i);
            }
        }
        consumers_sync<Shape>();
        const int left = min(tokens - pass * Shape::PASS, Shape::PASS);
        for (int i = threadIdx.x; i < left * CHUNKS; i += Shape::CONSUMERS) {
            const int token = i / CHUNKS, channel = i % CHUNKS * PER_CHUNK;
            if (channel >= channels) continue;
            auto* to = reinterpret_cast<uint4*>(row_at(pass * Shape::PASS + token) + channel);
            *to = *reinterpret_cast<const uint4*>(rows + token * STRIDE + channel);
        }
    }
    consumers_sync<Shape>();
}

// ---- host

inline MoePath moe_path(const MoeOperand& x, const MoeWeight& w, int64_t n, int64_t k) {
    const bool fp8 = w.dtype == Dtype::float8_e4m3fn;
    constexpr ScaleForm FORMS[] = {ScaleForm::per_tensor, ScaleForm::per_row, ScaleForm::per_block};
    return {x, w, fp8 ? FORMS[w.scale_dimensions] : ScaleForm::none, fp8, int(k), int(n), int(ceil_div(k, fp8 ? 128 : 64))};
}

template <class Shape>
hopper::TensorMap weight_map(const char* name, const MoePath& path, int groups) {
    const auto type = path.fp8 ? hopper::ElementType::uint8 : hopper::ElementType::bfloat16;
    const uint64_t row_bytes = uint64_t(path.k) * (path.fp8 ? 1 : 2), k = path.k, n = path.n;
    const uint32_t box_k = path.fp8 ? 128 : 64, box_n = Shape::SET_CHANNELS;
    return hopper::make_tensor_map<3>(
        {name, path.w.values, type, {k, n, uint64_t(groups)}, {row_bytes, n * row_bytes}, {box_k, box_n, 1}, Shape::SWIZZLE});
}

}  // namespace llama4_kernels
