// moe_gate_up: the gate and up projections of the shared expert, for all tokens in sorted order, and of the routed ones, each for its own
// tokens, in one launch. A stage holds 128 gate channels and the same 128 up channels, so that SwiGLU and the scales of 128 columns of h
// stay inside the block. Rows of x are gathered by routing.order as they are loaded.

#include "e4m3.cuh"
#include "floats.cuh"
#include "hopper/dependent_launch.cuh"
#include "hopper/registers.cuh"
#include "moe_load.cuh"
#include "moe_tile.cuh"
#include "tile_scheduler.cuh"

namespace llama4_kernels {
namespace {

using namespace hopper;

constexpr int H_COLUMNS = MOE_GATE_UP_COLUMNS;

struct Problem {
    MoeGateUpArguments a;
    MoePath shared, routed;
};

template <class Shape>
struct SharedMemory {
    MoeStages<Shape> stages;
    alignas(16) uint8_t staging[Shape::PASS * (H_COLUMNS * 2 + 16)];
    unsigned warp_largest[Shape::CONSUMER_WARPS][Shape::TOKENS];
    float h_scale[Shape::TOKENS], h_reciprocal[Shape::TOKENS];  // of each token's codes
    int first_tile[];  // of each routed expert, and their number
};

// ---- which tile

struct Tile {
    int column_tile;
    Segment segment;
};

// The shared expert's tiles come first.
template <class Shape>
struct Tiles {
    const Problem& problem;
    const MoeGateUpArguments& a;
    GroupTiles<Shape::TOKENS> routed_tiles;

    __device__ static int column_tiles(const MoeHidden& h) { return ceil_div(h.width, H_COLUMNS); }

    __device__ int shared_tiles() const { return ceil_div(a.tokens, Shape::TOKENS) * column_tiles(a.h_shared); }
    __device__ int count() const { return shared_tiles() + int(routed_tiles.count()); }
    __device__ bool is_shared(int tile) const { return tile < shared_tiles(); }
    __device__ int steps(int tile) const { return (is_shared(tile) ? problem.shared : problem.routed).steps; }

    __device__ int first_stage(int tile) const {
        const int shared = min(tile, shared_tiles());
        return shared * problem.shared.steps + (tile - shared) * problem.routed.steps;
    }
    __device__ int stages() const { return first_stage(count()); }

    __device__ int tile_of(int stage) const {
        const int shared = shared_tiles(), routed_stage = stage - first_stage(shared);
        return routed_stage < 0 ? stage / problem.shared.steps : shared + routed_stage / problem.routed.steps;
    }

    __device__ Tile operator[](int tile) const {
        const int shared = shared_tiles();
        if (is_shared(tile)) {
            const int columns = column_tiles(a.h_shared), column = tile % columns, first_row = tile / columns * Shape::TOKENS;
            return {column, segment(0, column, a.h_shared.width, first_row, a.tokens)};
        }
        const GroupTile routed = routed_tiles[tile - shared];
        const Segment part = segment(routed.group, routed.column_tile, a.h_routed.width, routed.first_row, routed.end_row);
        return {routed.column_tile, part};
    }

    __device__ static Segment segment(int group, int column_tile, int width, int first_row, int end_row) {
        return {group, column_tile * H_COLUMNS, width, first_row, first_row, min(end_row, first_row + Shape::TOKENS)};
    }
};

// ---- epilogue

// SwiGLU, into total[0], and h in the form that the second weight takes.
template <class Shape>
__device__ void store_hidden(SharedMemory<Shape>& shared, const MoeHidden& h, const Tile& tile, Sums<Shape>& total) {
    using Consumer = StageConsumer<Shape>;
    const int first_row = tile.segment.first_row, rows = tile.segment.end_row - first_row;
    const int first_column = tile.segment.first_channel, columns = min(h.width - first_column, H_COLUMNS);
    const int64_t first = int64_t(first_row) * h.width + first_column;
#pragma unroll
    for (int i = 0; i < Shape::TOKENS / 2; ++i) {
        if (i / 4 * 8 >= rows) continue;
        const float gate = total[0][i];
        total[0][i] = __fdividef(gate, 1.0f + __expf(-gate)) * total[1][i];
    }
    if (h.dtype == Dtype::bfloat16) {
        auto* out = static_cast<__nv_bfloat16*>(h.values) + first;
        store_rows<Shape, 1, __nv_bfloat16>(shared.staging, rows, columns, [&](int, int i) { return __float2bfloat16(total[0][i]); },
                                            [&](int token) { return out + int64_t(token) * h.width; });
        return;
    }

    if (!h.is_static) {
#pragma unroll
        for (int i = 0; i < Shape::TOKENS / 2; i += 4) {
            if (i / 4 * 8 >= rows) continue;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const unsigned low = magnitude(total[0][i + pair]), high = magnitude(total[0][i + pair + 2]);
                unsigned largest = max(Consumer::channel_of(i) < columns ? low : 0u, Consumer::channel_of(i + 2) < columns ? high : 0u);
                for (int lanes = 4; lanes < int(WARP); lanes *= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
                if (threadIdx.x % WARP < 4) shared.warp_largest[threadIdx.x / WARP][Consumer::token_of(i + pair)] = largest;
            }
        }
        consumers_sync<Shape>();
    }
    if (threadIdx.x < Shape::TOKENS) {
        float scale;
        if (h.is_static) {
            scale = *h.scale;
        } else {
            unsigned largest = 0;
            for (int warp = 0; warp < Shape::CONSUMER_WARPS; ++warp) largest = max(largest, shared.warp_largest[warp][threadIdx.x]);
            scale = __uint_as_float(largest) / E4M3_MAX;
            const int blocks = ceil_div(h.width, SCALE_BLOCK);
            if (int(threadIdx.x) < rows) h.scale[int64_t(first_row + threadIdx.x) * blocks + tile.column_tile] = scale;
        }
        shared.h_scale[threadIdx.x] = scale;
        shared.h_reciprocal[threadIdx.x] = reciprocal_of(scale);
    }
    consumers_sync<Shape>();
    auto* out = static_cast<uint8_t*>(h.values) + first;
    const auto code = [&](int, int i) {
        const int token = Consumer::token_of(i);
        const float scaled = divide(total[0][i], shared.h_scale[token], shared.h_reciprocal[token]);
        return from_float<__nv_fp8_storage_t>(scaled);
    };
    store_rows<Shape, 1, uint8_t>(shared.staging, rows, columns, code, [&](int token) { return out + int64_t(token) * h.width; });
}

// ---- the kernel

// This block's share of bytes that will be read soon.
__device__ inline void prefetch_share(const void* from, int64_t bytes, int thread, int threads) {
    constexpr int64_t PIECE = 4096;
    const int64_t stride = int64_t(gridDim.x) * threads * PIECE;
    for (int64_t at = (int64_t(blockIdx.x) * threads + thread) * PIECE; at < bytes; at += stride) {
        bulk_prefetch(static_cast<const uint8_t*>(from) + at, unsigned(min(bytes - at, PIECE)));
    }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) gate_up_kernel(const __grid_constant__ TensorMap shared_weights,
                                                                    const __grid_constant__ TensorMap routed_weights,
                                                                    const __grid_constant__ Problem problem) {
    const MoeGateUpArguments& a = problem.a;
    auto& shared = *shared_memory<SharedMemory<Shape>>();
    prepare(shared.stages, shared_weights, routed_weights);
    if (threadIdx.x >= Shape::CONSUMERS) {
        const int thread = threadIdx.x - Shape::CONSUMERS;
        const int64_t w_bytes = int64_t(problem.shared.n) * problem.shared.k * (problem.shared.fp8 ? 1 : 2);
        if (a.prefetch_w_shared) prefetch_share(a.w_shared.values, w_bytes, thread, Shape::LOADERS);
        if (a.prefetch_address) prefetch_share(a.prefetch_address, a.prefetch_bytes, thread, Shape::LOADERS);
    }
    wait_for_dependencies();
    launch_dependents();  // now, so that moe_down finds the routing complete before it waits
    Tiles<Shape> tiles{problem, a, {a.routing.offsets, a.experts, Tiles<Shape>::column_tiles(a.h_routed), shared.first_tile}};
    if (threadIdx.x < WARP) {
        tiles.routed_tiles.fill();
        __syncwarp();
        if (threadIdx.x == 0) shared.stages.work.plan(tiles);
    }
    __syncthreads();

    if (threadIdx.x >= Shape::CONSUMERS) {
        decrease_registers<Shape::LOADER_REGISTERS>();
        StageLoader<Shape> loader(shared.stages);
        const auto is_shared = [&](const Piece& piece) { return tiles.is_shared(piece.tile); };
        const auto path_of = [&](const Piece& piece) -> const MoePath& { return is_shared(piece) ? problem.shared : problem.routed; };
        const auto map_of = [&](const Piece& piece) -> const TensorMap& { return is_shared(piece) ? shared_weights : routed_weights; };
        if constexpr (Shape::TOKENS <= 64) {  // weights need not wait for the rows' order; with more tokens ptxas would spill
            shared.stages.work.for_first_piece(tiles, [&](const Piece& piece) {
                loader.load_weights_ahead(path_of(piece), map_of(piece), tiles[piece.tile].segment, piece.begin, piece.end);
            });
        }
        shared.stages.work.for_each_piece(tiles, [&](const Piece& piece) {
            loader.load(path_of(piece), map_of(piece), tiles[piece.tile].segment, a.routing.order, piece.begin, piece.end);
        });
    } else {
        increase_registers<Shape::CONSUMER_REGISTERS>();
        StageConsumer<Shape> consumer(shared.stages);
        shared.stages.work.for_each_piece(tiles, [&](const Piece& piece) {
            const Tile tile = tiles[piece.tile];
            Sums<Shape> total;
            consumer.sum(tiles.is_shared(piece.tile) ? problem.shared : problem.routed, tile.segment, piece.begin, piece.end, total);
            const auto is_real = [&](int token) { return token < tile.segment.end_row - tile.segment.first_row; };
            if (combine_pieces(shared.stages, a.sharing, tiles, piece, is_real, total)) {
                store_hidden(shared, tiles.is_shared(piece.tile) ? a.h_shared : a.h_routed, tile, total);
            }
        });
        consumer.finish();
    }
}

// ---- launch

template <class Shape>
void launch_shape(const MoeGateUpArguments& a, cudaStream_t stream) {
    const MoePath shared = moe_path(a.x_shared, a.w_shared, 2 * a.h_shared.width, a.hidden);
    const MoePath routed = moe_path(a.x_routed, a.w_routed, 2 * a.h_routed.width, a.hidden);
    static_assert(sizeof(SharedMemory<Shape>) + (MAX_MOE_EXPERTS + 1) * sizeof(int) <= 227 << 10, "a block's shared memory");
    const size_t shared_bytes = sizeof(SharedMemory<Shape>) + (a.experts + 1) * sizeof(int);
    const LaunchConfig config{"moe_gate_up", grid_of(a.sharing.blocks), dim3(Shape::THREADS), shared_bytes, stream, 1, a.dependent};
    const TensorMap shared_map = weight_map<Shape>("shared_w13", shared, 1), routed_map = weight_map<Shape>("w13", routed, a.experts);
    launch(config, &gate_up_kernel<Shape>, shared_map, routed_map, Problem{a, shared, routed});
}

}  // namespace

int moe_tile_tokens(int tokens) { return tokens <= 16 ? 16 : tokens <= 64 ? 64 : 96; }

int moe_multiprocessors() { return multiprocessors(); }

int moe_gate_up_part(int tokens) { return 2 * 128 * moe_tile_tokens(tokens); }

void moe_gate_up(const MoeGateUpArguments& a, cudaStream_t stream) {
    if (a.tokens == 0) return;
    switch (moe_tile_tokens(a.tokens)) {
        case 16: return launch_shape<MoeShape<16, 2>>(a, stream);
        case 64: return launch_shape<MoeShape<64, 2>>(a, stream);
        default: return launch_shape<MoeShape<96, 2>>(a, stream);
    }
}

}  // namespace llama4_kernels
