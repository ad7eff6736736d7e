// grouped_gemm: a persistent grid whose blocks, or clusters of two, walk the output tiles of all groups. In a block, a loader warpgroup
// fills a ring of stages, with TMA or where rows are gathered with cp.async, and runs ahead over the ends of tiles; two consumer warpgroups
// multiply, scale and store.

#include "grouped_gemm.h"

#include <cstddef>

#include "device.h"
#include "epilogue.cuh"
#include "gemm_tile.cuh"
#include "hopper/cluster.cuh"
#include "hopper/registers.cuh"
#include "tile_scheduler.cuh"
#include "warp.cuh"

namespace llama4_kernels {
namespace {

using namespace hopper;

struct Scale {
    const float* values;
    ScaleForm form;
};

struct Problem {
    const uint8_t* a;
    int64_t row_bytes;
    int n, steps, groups;
    const int* offsets;
    const int* rows;
    Scale a_scale, b_scale;
    void* out;
    bool out_is_bf16;

    __device__ int source_row(int row) const { return rows ? rows[row] : row; }

    // Of the group's rows up to `end`: what a row's codes are scaled by as a whole.
    __device__ float token_scale(int row, int end) const {
        if (a_scale.form == ScaleForm::per_tensor) return *a_scale.values;
        return a_scale.form == ScaleForm::per_row && row < end ? a_scale.values[source_row(row)] : 1.0f;
    }
};

// What a tile has in common with that of the cluster's other block.
enum class Shared { nothing, weights, tokens };

struct BlockTile {
    int group, first_row, end_row, column_tile;
    Shared shared;
};

template <class Shape>
struct SharedMemory {
    GemmStages<Shape> stages;
    BlockTile tiles[Shape::STAGES];  // where the stage is a tile's first
    static constexpr int STAGED_TOKENS = Shape::TOKENS < 64 ? Shape::TOKENS : 64;
    alignas(128) __nv_bfloat16 staging[Shape::CONSUMERS / WARPGROUP][STAGED_TOKENS * Shape::SET_CHANNELS];
    int first_tile[];  // of each group, and their number
};

// ---- which tile

// The tiles of this block. A cluster of two blocks takes two tiles of a group at a time, in pairs of column tiles. Two row tiles are one
// for each block, which share the weights of the first column tile and then of the second. A last row tile without a partner is both
// blocks', with a column tile for each.
template <class Shape>
class BlockTiles {
public:
    // first_tile: shared memory of groups + 1 elements, for fill.
    __device__ BlockTiles(const Problem& problem, int* first_tile)
        : offsets_(problem.offsets), tiles_(problem.offsets, problem.groups, ceil_div(problem.n, WIDTH), first_tile) {}

    // By all lanes of one warp, before a barrier of the block.
    __device__ void fill() { tiles_.fill(); }

    // index from `first` to `count` in steps of `step`.
    __device__ static int64_t first() { return blockIdx.x / Shape::CLUSTER; }
    __device__ static int64_t step() { return gridDim.x / Shape::CLUSTER; }
    __device__ int64_t count() const { return tiles_.count(); }

    __device__ BlockTile operator[](int64_t index) const {
        const GroupTile tile = tiles_[index];
        if constexpr (Shape::CLUSTER == 1) {
            return {tile.group, tile.first_row, tile.end_row, tile.column_tile, Shared::nothing};
        } else {
            const int rank = cluster_rank(), turn = (tile.first_row - offsets_[tile.group]) / Shape::TOKENS % 2;
            if (turn == 0 && tile.first_row + Shape::TOKENS >= tile.end_row)
                return {tile.group, tile.first_row, tile.end_row, tile.column_tile * 2 + rank, Shared::tokens};
            return {tile.group, tile.first_row + (rank - turn) * Shape::TOKENS, tile.end_row, tile.column_tile * 2 + turn, Shared::weights};
        }
    }

private:
    static constexpr int WIDTH = Shape::CLUSTER * Shape::CHANNELS;

    const int* offsets_;
    GroupTiles<Shape::TOKENS> tiles_;
};

// ---- the loader warpgroup

// ROWS rows of a stage by TMA, in as many parts as the cluster has blocks. Where they are shared, each block loads a part for all.
template <class Shape, int ROWS, L2 HINT, class... Group>
__device__ inline void load_rows(uint8_t* to, const TensorMap& map, Barrier& full, bool shared, int step, int first_row, Group... group) {
    constexpr int PART = ROWS / Shape::CLUSTER;
#pragma unroll
    for (int part = 0; part < Shape::CLUSTER; ++part) {
        const int k = step * Shape::STAGE_K, row = first_row + part * PART;
        uint8_t* part_to = to + part * PART * Shape::ROW_BYTES;
        if (Shape::CLUSTER == 1 || !shared) {
            tma_load<HINT>(part_to, map, full, k, row, group...);
        } else if (part == int(cluster_rank())) {
            tma_load_multicast<HINT>(part_to, map, full, (1 << Shape::CLUSTER) - 1, k, row, group...);
        }
    }
}

// By one thread, one arrival at `full`: a stage's weights, unless they are gathered its activations, and which tile it begins.
template <class Shape, bool GATHER, L2 WEIGHT_HINT, L2 TOKEN_HINT>
__device__ inline void load_stage(SharedMemory<Shape>& shared, int stage, const BlockTile& tile, int step, const TensorMap& weights,
                                  const TensorMap& tokens) {
    GemmStages<Shape>& stages = shared.stages;
    Barrier& full = stages.pipeline.full[stage];
    if (step == 0) shared.tiles[stage] = tile;
    full.arrive_expect(Shape::WEIGHT_BYTES + (GATHER ? 0 : Shape::TOKEN_BYTES));
    load_rows<Shape, Shape::CHANNELS, WEIGHT_HINT>(stages.weights[stage], weights, full, tile.shared == Shared::weights, step,
                                                   tile.column_tile * Shape::CHANNELS, tile.group);
    if constexpr (!GATHER) {
        load_rows<Shape, Shape::TOKENS, TOKEN_HINT>(stages.tokens[stage], tokens, full, tile.shared == Shared::tokens, step,
                                                    tile.first_row);
    }
}

// One warp: weights and activations of every step by TMA, and with GemmKind::fp8 the tokens' scales beside the last. Each lane arrives for
// what it stores, although lane 0's arrival behind __syncwarp would do: compute-sanitizer's racecheck seems to count the arriving lane's
// stores alone.
template <class Shape>
__device__ void load_with_tma(SharedMemory<Shape>& shared, const BlockTiles<Shape>& tiles, const TensorMap& weights,
                              const TensorMap& tokens, const Problem& problem) {
    GemmStages<Shape>& stages = shared.stages;
    constexpr L2 WEIGHT_HINT = Shape::TOKENS <= 16 ? L2::evict_first : L2::normal;
    constexpr int SHARE = Shape::KIND == GemmKind::fp8 ? ceil_div(Shape::TOKENS, WARP) : 0;  // a lane's tokens
    const int lane = threadIdx.x % WARP;
    PipelinePosition<Shape::STAGES> at;
    for (int64_t index = tiles.first(); index < tiles.count(); index += tiles.step()) {
        const BlockTile tile = tiles[index];
        float scales[SHARE + 1];  // under way while the stages before the last are loaded
#pragma unroll
        for (int i = 0; i < SHARE; ++i) scales[i] = problem.token_scale(tile.first_row + i * WARP + lane, tile.end_row);
        for (int step = 0; step < problem.steps; ++step, at.advance()) {
            stages.pipeline.wait_until_empty(at);
            if (SHARE > 0 && step + 1 == problem.steps) {
#pragma unroll
                for (int i = 0; i < SHARE; ++i) {
                    if (i * WARP + lane < Shape::TOKENS) stages.token_scales[at.stage][i * WARP + lane] = scales[i];
                }
            }
            __syncwarp();  // no lane still waits for this stage when lane 0 has gone round the ring, and all arrive at once
            if (SHARE > 0) stages.pipeline.full[at.stage].arrive();
            if (lane == 0) load_stage<Shape, false, WEIGHT_HINT, L2::evict_last>(shared, at.stage, tile, step, weights, tokens);
        }
    }
}

// All threads of the warpgroup: they gather rows and fetch the tokens' scales, and one of them loads what TMA can. Copies arrive by
// themselves once they have landed, and the loaders go on, or end: the consumers wait for every stage. That says nothing of plain stores:
// who stores scales arrives once more.
template <class Shape, bool GATHER>
__device__ void load_with_all_threads(SharedMemory<Shape>& shared, const BlockTiles<Shape>& tiles, const TensorMap& weights,
                                      const TensorMap& tokens, const Problem& problem) {
    GemmStages<Shape>& stages = shared.stages;
    const int thread = threadIdx.x % WARPGROUP;
    PipelinePosition<Shape::STAGES> at;
    for (int64_t index = tiles.first(); index < tiles.count(); index += tiles.step()) {
        const BlockTile tile = tiles[index];
        const int row = tile.first_row + thread;
        const bool has_scale = Shape::FP8 && thread < Shape::TOKENS;
        const bool per_block = Shape::KIND == GemmKind::fp8_scaled_steps && problem.a_scale.form == ScaleForm::per_block;
        const bool has_block_scale = has_scale && per_block && row < tile.end_row;
        const float* block_scales = has_block_scale ? problem.a_scale.values + int64_t(problem.source_row(row)) * problem.steps : nullptr;
        float scale = has_block_scale ? *block_scales : has_scale && !per_block ? problem.token_scale(row, tile.end_row) : 0.0f;
        const RowGather<Shape> gather(problem.a, problem.row_bytes, problem.rows, tile.first_row, GATHER ? tile.end_row : 0);
        for (int step = 0; step < problem.steps; ++step, at.advance()) {
            stages.pipeline.wait_until_empty(at);
            if (thread == 0) load_stage<Shape, GATHER, L2::normal, L2::normal>(shared, at.stage, tile, step, weights, tokens);
            if (has_scale && (Shape::KIND == GemmKind::fp8_scaled_steps || step + 1 == problem.steps))
                stages.token_scales[at.stage][thread] = scale;
            if (has_block_scale && step + 1 < problem.steps) scale = block_scales[step + 1];  // under way until the next stage is empty
            if (GATHER) gather.copy(stages.tokens[at.stage], step);
            __syncwarp();  // so that a warp's lanes arrive at once, not one after the other
            if (GATHER) cp_async_arrive(stages.pipeline.full[at.stage]);
            if (Shape::FP8) stages.pipeline.full[at.stage].arrive();
        }
    }
}

// ---- the consumer warpgroups

// The scale of the block of channels and of K that this channel and step lie in.
template <class Shape>
__device__ inline float weight_step_scale(const Problem& problem, int group, int channel, int step) {
    if (problem.b_scale.form != ScaleForm::per_block) return 1.0f;
    static_assert(!Shape::FP8 || Shape::STAGE_K == SCALE_BLOCK);
    const int blocks = ceil_div(problem.n, SCALE_BLOCK);
    const int block = min(channel / SCALE_BLOCK, blocks - 1);  // a tile may end past the last one
    return problem.b_scale.values[(int64_t(group) * blocks + block) * problem.steps + step];
}

__device__ inline float channel_scale(const Problem& problem, int group, int channel) {
    if (problem.b_scale.form == ScaleForm::per_tensor) return problem.b_scale.values[group];
    if (problem.b_scale.form == ScaleForm::per_row && channel < problem.n)
        return problem.b_scale.values[int64_t(group) * problem.n + channel];
    return 1.0f;
}

template <class Shape, bool GATHER>
__device__ void multiply_and_store(SharedMemory<Shape>& shared, const BlockTiles<Shape>& tiles, const Problem& problem) {
    static_assert(SCALE_BLOCK % Shape::WARPGROUP_CHANNELS == 0, "a warpgroup's channels share the scales of their block");
    // The same in all lanes, as the compiler then knows: descriptors stay in uniform registers.
    const int warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    GemmConsumer<Shape, GATHER> consumer(shared.stages, warpgroup);
    for (int64_t index = tiles.first(); index < tiles.count(); index += tiles.step()) {
        const BlockTile tile = shared.tiles[consumer.first_stage()];
        __syncwarp();  // all lanes have read it before one hands the stage back
        const int first_channel = tile.column_tile * Shape::CHANNELS + warpgroup * Shape::WARPGROUP_CHANNELS;
        float channel_scales[Shape::SETS][2];  // under way while the tile is summed
        if constexpr (Shape::FP8) {
#pragma unroll
            for (int i = 0; i < 2 * Shape::SETS; ++i) {
                const int channel = first_channel + i / 2 * Shape::SET_CHANNELS + accumulator_row(threadIdx.x % WARPGROUP, i % 2 * 2);
                channel_scales[i / 2][i % 2] = channel_scale(problem, tile.group, channel);
            }
        }
        GemmSums<Shape> sums;
        consumer.sum(problem.steps, sums, [&](int step) { return weight_step_scale<Shape>(problem, tile.group, first_channel, step); });
        if constexpr (Shape::KIND == GemmKind::fp8) {
#pragma unroll
            for (int set = 0; set < Shape::SETS; ++set) scale_tokens(sums[set], consumer.token_scales());
        }
        consumer.hand_back();
        if constexpr (Shape::FP8) {
#pragma unroll
            for (int set = 0; set < Shape::SETS; ++set) scale_channels(sums[set], channel_scales[set][0], channel_scales[set][1]);
        }

        const int rows = tile.end_row - tile.first_row;
        constexpr int STAGED = SharedMemory<Shape>::STAGED_TOKENS;
#pragma unroll
        for (int set = 0; set < Shape::SETS; ++set) {
            const int channel = first_channel + set * Shape::SET_CHANNELS, columns = problem.n - channel;
            const int64_t first = int64_t(tile.first_row) * problem.n + channel;
            if (problem.out_is_bf16) {
                const OutputTile<__nv_bfloat16> out{static_cast<__nv_bfloat16*>(problem.out) + first, problem.n, rows, columns};
                store_tile<Shape::TOKENS, STAGED>(sums[set], out, shared.staging[warpgroup], 1 + warpgroup);
            } else {
                const OutputTile<float> out{static_cast<float*>(problem.out) + first, problem.n, rows, columns};
                store_tile<Shape::TOKENS, STAGED>(sums[set], out, nullptr, 0);
            }
        }
    }
    consumer.finish();
}

// ---- the kernel

template <class Shape, bool GATHER>
__global__ void __launch_bounds__(Shape::CONSUMERS + Shape::LOADERS, 1)
    grouped_gemm_kernel(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap tokens,
                        const __grid_constant__ Problem problem) {
    constexpr bool ALL_LOAD = GATHER || Shape::KIND == GemmKind::fp8_scaled_steps;
    // Arrivals at `full`: 1 (who asks TMA) + each thread that copies by cp.async + each thread that stores scales.
    constexpr int FULL_ARRIVALS = 1 + (GATHER ? Shape::LOADERS : 0) + (!Shape::FP8 ? 0 : ALL_LOAD ? Shape::LOADERS : WARP);
    // Of the 3 · 168 that a thread of each warpgroup has at launch, together.
    constexpr int LOADER_REGISTERS = Shape::SETS == 1 ? 56 : 40, CONSUMER_REGISTERS = (504 - LOADER_REGISTERS) / 2;
    auto& shared = *shared_memory<SharedMemory<Shape>>();
    BlockTiles<Shape> tiles(problem, shared.first_tile);
    if (threadIdx.x < WARP) tiles.fill();
    if (threadIdx.x == Shape::CONSUMERS) {
        shared.stages.pipeline.init(FULL_ARRIVALS, Shape::CLUSTER * Shape::CONSUMERS / WARP);
        prefetch_tensor_map(weights);
        prefetch_tensor_map(tokens);
    }
    if constexpr (Shape::CLUSTER > 1) {
        __syncwarp();
        cluster_sync();
    } else {
        __syncthreads();
    }

    if (threadIdx.x >= Shape::CONSUMERS) {
        decrease_registers<LOADER_REGISTERS>();
        if constexpr (ALL_LOAD) {
            load_with_all_threads<Shape, GATHER>(shared, tiles, weights, tokens, problem);
        } else if (threadIdx.x < Shape::CONSUMERS + WARP) {
            load_with_tma<Shape>(shared, tiles, weights, tokens, problem);
        }
    } else {
        increase_registers<CONSUMER_REGISTERS>();
        multiply_and_store<Shape, GATHER>(shared, tiles, problem);
    }
    if constexpr (Shape::CLUSTER > 1) {
        __syncwarp();
        cluster_sync();  // the other block may still arrive here
    }
}

// ---- launch

template <class Shape>
void launch_shape(const GroupedGemmArguments& a, const Problem& problem, cudaStream_t stream) {
    const auto type = Shape::FP8 ? ElementType::uint8 : ElementType::bfloat16;
    const uint64_t row_bytes = problem.row_bytes, k = a.k, n = a.n;
    const TensorMap weights = make_tensor_map<3>({"b",
                                                  a.b,
                                                  type,
                                                  {k, n, uint64_t(a.groups)},
                                                  {row_bytes, n * row_bytes},
                                                  {Shape::STAGE_K, Shape::CHANNELS / Shape::CLUSTER, 1},
                                                  Shape::SWIZZLE});
    const TensorMap tokens = make_tensor_map<2>(
        {"a", a.a, type, {k, uint64_t(a.a_rows)}, {row_bytes}, {Shape::STAGE_K, Shape::TOKENS / Shape::CLUSTER}, Shape::SWIZZLE});
    constexpr size_t BEFORE_FIRST_TILE = offsetof(SharedMemory<Shape>, first_tile);
    static_assert(BEFORE_FIRST_TILE + (MAX_GEMM_GROUPS + 1) * sizeof(int) <= 227 << 10, "a block's shared memory");
    const int64_t tiles = most_row_tiles(a.m, a.groups, Shape::TOKENS) * ceil_div(a.n, Shape::CHANNELS * Shape::CLUSTER);
    const int64_t clusters = std::min<int64_t>(tiles, std::max(1, multiprocessors() / Shape::CLUSTER));
    const size_t shared_bytes = BEFORE_FIRST_TILE + (a.groups + 1) * sizeof(int);
    const LaunchConfig config{"grouped_gemm", grid_of(clusters * Shape::CLUSTER), dim3(Shape::CONSUMERS + Shape::LOADERS),
                              shared_bytes, stream, Shape::CLUSTER};
    launch(config, a.rows ? &grouped_gemm_kernel<Shape, true> : &grouped_gemm_kernel<Shape, false>, weights, tokens, problem);
}

template <GemmKind KIND>
void launch_kind(const GroupedGemmArguments& a, const Problem& problem, cudaStream_t stream) {
    const GemmTile tile = grouped_gemm_tile(a.m, a.n, a.groups, multiprocessors());
    if (tile.tokens == 16) return launch_shape<GemmShape<16, 1, KIND>>(a, problem, stream);
    if (tile.tokens == 64) return launch_shape<GemmShape<64, 1, KIND>>(a, problem, stream);
    if (tile.channels == 128) return launch_shape<GemmShape<128, 1, KIND>>(a, problem, stream);
    launch_shape<GemmShape<128, 2, KIND>>(a, problem, stream);
}

}  // namespace

GemmTile grouped_gemm_tile(int64_t m, int64_t n, int groups, int multiprocessors) {
    const int64_t rows = std::min(m, 2 * ceil_div(m, groups));  // room for groups twice the mean, at most all rows
    if (rows <= 64) return {rows <= 16 ? 16 : 64, 128};
    // Tiles wait for L2, and a block of two that share 256 channels of weights brings as much as one of 128 channels alone: a round takes
    // as long with either. Groups end anywhere: half a tile each is empty.
    constexpr int TOKENS = 128;
    const int64_t row_tiles = std::max<int64_t>(1, m / TOKENS + groups / 2);
    const int64_t rounds = ceil_div(row_tiles * ceil_div(n, 128), multiprocessors);
    const int64_t cluster_rounds = ceil_div(row_tiles * ceil_div(n, 2 * 256), std::max(1, multiprocessors / 2));
    return {TOKENS, cluster_rounds < rounds ? 256 : 128};
}

void grouped_gemm(const GroupedGemmArguments& a, cudaStream_t stream) {
    if (a.m == 0 || a.n == 0 || a.groups == 0 || a.a_rows == 0) return;
    const bool fp8 = a.dtype == Dtype::float8_e4m3fn;
    const auto form = [&](int dimensions, int blocks) {
        return !fp8                       ? ScaleForm::none
               : dimensions == blocks     ? ScaleForm::per_block
               : dimensions == blocks - 1 ? ScaleForm::per_row
                                          : ScaleForm::per_tensor;
    };
    const Scale a_scale{a.a_scale, form(a.a_scale_dimensions, 2)}, b_scale{a.b_scale, form(a.b_scale_dimensions, 3)};
    const bool scaled_steps = a_scale.form == ScaleForm::per_block || b_scale.form == ScaleForm::per_block;
    const int64_t row_bytes = a.k * (fp8 ? 1 : 2);
    const Problem problem{static_cast<const uint8_t*>(a.a),
                          row_bytes,
                          int(a.n),
                          int(ceil_div(row_bytes, 128)),
                          a.groups,
                          a.offsets,
                          a.rows,
                          a_scale,
                          b_scale,
                          a.out,
                          a.out_dtype == Dtype::bfloat16};
    const auto launch_dtype = !fp8           ? &launch_kind<GemmKind::bf16>
                              : scaled_steps ? &launch_kind<GemmKind::fp8_scaled_steps>
                                             : &launch_kind<GemmKind::fp8>;
    launch_dtype(a, problem, stream);
}

}  // namespace llama4_kernels
