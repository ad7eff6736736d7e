// moe_down: the down projections of both experts in one sum. A tile is TOKENS sorted rows, whoever their experts are, by SETS · 128
// channels. It is multiplied with the shared expert's weight and then with that of each expert that has rows in it, whose products are
// added to these rows only. So every weight is read once per tile of rows, and every row is written once, to its token's place.

#include "hopper/dependent_launch.cuh"
#include "hopper/registers.cuh"
#include "moe_load.cuh"
#include "moe_tile.cuh"
#include "search.cuh"

namespace llama4_kernels {
namespace {

using namespace hopper;

struct Problem {
    MoeDownArguments a;
    MoePath shared, routed;
};

template <class Shape>
struct SharedMemory {
    MoeStages<Shape> stages;
    alignas(16) uint8_t staging[Shape::PASS * (Shape::SETS * Shape::SET_CHANNELS * 2 + 16)];
    int tokens[Shape::TOKENS];  // of the rows of the consumers' tile
    int experts;                // that have tokens
    int lists[];  // see Tiles
};

// ---- which tile, which segments

template <class Shape>
__device__ inline int column_tiles(int hidden) {
    return ceil_div(hidden, Shape::SETS * Shape::SET_CHANNELS);
}

template <class Shape>
struct Tile {
    int first_row, end_row;
    int first_channel;
    int first_present;  // of the experts with rows in it
};

// Tiles by rows, and then by channels. Lists in shared memory: the experts that have tokens; the first row of each, and the end of the
// last; and where tiles are shared the first step of each row tile, as if it had a single column tile, and the end of the last.
template <class Shape>
class Tiles {
public:
    __device__ Tiles(const Problem& problem, SharedMemory<Shape>& shared)
        : problem_(problem),
          experts_(shared.experts),
          present_(shared.lists),
          starts_(present_ + problem.a.experts),
          first_step_(starts_ + problem.a.experts + 1) {}

    static size_t list_bytes(const MoeDownArguments& a) {
        const int64_t rows = ceil_div(a.tokens, Shape::TOKENS), columns = ceil_div(a.hidden, Shape::SETS * Shape::SET_CHANNELS);
        return (2 * a.experts + 1 + (whole_tiles(rows * columns, a.sharing.blocks) ? 0 : rows + 1)) * sizeof(int);
    }

    // Where tiles are shared there are less than MOE_MANY_ROUNDS for each block, and no more blocks than multiprocessors, 144 on the chip.
    static constexpr size_t MOST_LIST_BYTES = (2 * MAX_MOE_EXPERTS + 1 + MOE_MANY_ROUNDS * 144) * sizeof(int);

    // By one warp, before a barrier of the block.
    __device__ void fill() {
        const MoeDownArguments& a = problem_.a;
        const int lane = threadIdx.x % WARP;
        int present = 0;
        for (int start = 0; start < a.experts; start += WARP) {
            const int expert = start + lane;
            const int first = expert < a.experts ? __ldcg(a.routing.offsets + expert) : 0;
            const int end = expert < a.experts ? __ldcg(a.routing.offsets + expert + 1) : 0;
            const unsigned votes = __ballot_sync(ALL_LANES, first < end);
            const int place = present + __popc(votes & ((1u << lane) - 1));
            if (first < end) present_[place] = expert;
            if (first < end) starts_[place] = first;
            present += __popc(votes);
        }
        if (lane == 0) {
            experts_ = present;
            starts_[present] = a.tokens;
        }
        __syncwarp();
        if (whole_tiles(count(), gridDim.x)) return;
        int before = 0;
        for (int start = 0; start < row_tiles(); start += WARP) {
            const int row_tile = start + lane;
            const int steps = row_tile < row_tiles() ? steps_of(row_tile * Shape::TOKENS) : 0;
            const int through = inclusive_sum(steps);
            if (row_tile < row_tiles()) first_step_[row_tile] = before + through - steps;
            before += __shfl_sync(ALL_LANES, through, WARP - 1);
        }
        if (lane == 0) first_step_[row_tiles()] = before;
        __syncwarp();
    }

    __device__ int count() const { return row_tiles() * columns(); }
    __device__ int steps(int tile) const { return steps_of(tile / columns() * Shape::TOKENS); }

    __device__ int first_stage(int tile) const {
        const int row_tile = tile / columns(), column = tile % columns(), first = first_step_[row_tile];
        return first * columns() + column * (first_step_[row_tile + 1] - first);
    }
    __device__ int stages() const { return first_step_[row_tiles()] * columns(); }

    __device__ int tile_of(int stage) const {
        const int row_tile = below(first_step_ + 1, row_tiles(), stage / columns() + 1), first = first_step_[row_tile];
        return row_tile * columns() + (stage - first * columns()) / (first_step_[row_tile + 1] - first);
    }

    __device__ Tile<Shape> operator[](int tile) const {
        const int first_row = tile / columns() * Shape::TOKENS, first_channel = tile % columns() * Shape::SETS * Shape::SET_CHANNELS;
        return {first_row, end_row(first_row), first_channel, experts_before(first_row)};
    }

    // visit(is_shared, segment, first step, end step) for each segment of a piece.
    template <class Visit>
    __device__ void for_each_segment(const Tile<Shape>& tile, const Piece& piece, Visit visit) const {
        const int shared_steps = problem_.shared.steps, routed_steps = problem_.routed.steps;
        for (int at = piece.begin; at < piece.end;) {
            const bool is_shared = at < shared_steps;
            const int index = is_shared ? 0 : (at - shared_steps) / routed_steps;
            const int first = is_shared ? 0 : shared_steps + index * routed_steps;
            const int end = min(piece.end, is_shared ? shared_steps : first + routed_steps);
            const int present = tile.first_present + index;
            const int expert = is_shared ? 0 : present_[present];
            const int from = is_shared ? tile.first_row : max(starts_[present], tile.first_row);
            const int to = is_shared ? tile.end_row : min(starts_[present + 1], tile.end_row);
            visit(is_shared, Segment{expert, tile.first_channel, Shape::SET_CHANNELS, tile.first_row, from, to}, at - first, end - first);
            at = end;
        }
    }

private:
    __device__ int row_tiles() const { return ceil_div(problem_.a.tokens, Shape::TOKENS); }
    __device__ int columns() const { return column_tiles<Shape>(problem_.a.hidden); }
    __device__ int end_row(int first_row) const { return min(first_row + Shape::TOKENS, problem_.a.tokens); }

    // How many of `count` ascending numbers are less than `bound`.
    static __device__ int below(const int* numbers, int count, int bound) {
        return count_first(count, [&](int i) { return numbers[i] < bound; });
    }

    __device__ int experts_before(int row) const { return below(starts_ + 1, experts_, row + 1); }

    __device__ int steps_of(int first_row) const {
        const int experts = below(starts_, experts_, end_row(first_row)) - experts_before(first_row);
        return problem_.shared.steps + experts * problem_.routed.steps;
    }

    const Problem& problem_;
    int& experts_;
    int *present_, *starts_, *first_step_;
};

// ---- the kernel

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) down_kernel(const __grid_constant__ TensorMap shared_weights,
                                                                 const __grid_constant__ TensorMap routed_weights,
                                                                 const __grid_constant__ Problem problem) {
    const MoeDownArguments& a = problem.a;
    auto& shared = *shared_memory<SharedMemory<Shape>>();
    prepare(shared.stages, shared_weights, routed_weights);
    launch_dependents();
    ahead_has_waited();  // moe_gate_up, for route_top1: the routing may be read
    Tiles<Shape> tiles(problem, shared);
    if (threadIdx.x < WARP) {
        tiles.fill();
        if (threadIdx.x == 0) shared.stages.work.plan(tiles);
    }
    __syncthreads();

    if (threadIdx.x >= Shape::CONSUMERS) {
        decrease_registers<Shape::LOADER_REGISTERS>();
        StageLoader<Shape> loader(shared.stages);
        const auto path_of = [&](bool is_shared) -> const MoePath& { return is_shared ? problem.shared : problem.routed; };
        const auto map_of = [&](bool is_shared) -> const TensorMap& { return is_shared ? shared_weights : routed_weights; };
        shared.stages.work.for_first_piece(tiles, [&](const Piece& piece) {
            tiles.for_each_segment(tiles[piece.tile], piece, [&](bool is_shared, const Segment& segment, int begin, int end) {
                loader.load_weights_ahead(path_of(is_shared), map_of(is_shared), segment, begin, end);
            });
        });
        wait_for_dependencies();
        shared.stages.work.for_each_piece(tiles, [&](const Piece& piece) {
            tiles.for_each_segment(tiles[piece.tile], piece, [&](bool is_shared, const Segment& segment, int begin, int end) {
                loader.load(path_of(is_shared), map_of(is_shared), segment, nullptr, begin, end);
            });
        });
    } else {
        increase_registers<Shape::CONSUMER_REGISTERS>();
        wait_for_dependencies();
        StageConsumer<Shape> consumer(shared.stages);
        shared.stages.work.for_each_piece(tiles, [&](const Piece& piece) {
            const Tile<Shape> tile = tiles[piece.tile];
            if (threadIdx.x < tile.end_row - tile.first_row) shared.tokens[threadIdx.x] = a.routing.order[tile.first_row + threadIdx.x];
            Sums<Shape> total = {};
            tiles.for_each_segment(tile, piece, [&](bool is_shared, const Segment& segment, int begin, int end) {
                const bool is_whole = segment.first_row == tile.first_row && segment.end_row == tile.end_row;
                consumer.add(is_shared ? problem.shared : problem.routed, segment, is_whole, begin, end, total);
            });
            const int rows = tile.end_row - tile.first_row;
            // Large tiles are full, save the last; without the question ptxas keeps the sums in their registers over the loop above.
            const auto is_wanted = [&](int token) { return Shape::TOKENS > 64 || token < rows; };
            if (!combine_pieces(shared.stages, a.sharing, tiles, piece, is_wanted, total)) return;
            auto* out = static_cast<__nv_bfloat16*>(a.out) + tile.first_channel;
            store_rows<Shape, Shape::SETS, __nv_bfloat16>(
                shared.staging, rows, a.hidden - tile.first_channel, [&](int set, int i) { return __float2bfloat16(total[set][i]); },
                [&](int token) { return out + int64_t(shared.tokens[token]) * a.hidden; });
        });
        consumer.finish();
    }
}

// ---- launch

template <class Shape>
void launch_shape(const MoeDownArguments& a, cudaStream_t stream) {
    const Problem problem{
        a, moe_path(a.h_shared, a.w_shared, a.hidden, a.k_shared), moe_path(a.h_routed, a.w_routed, a.hidden, a.k_routed)};
    static_assert(sizeof(SharedMemory<Shape>) + Tiles<Shape>::MOST_LIST_BYTES <= 227 << 10, "a block's shared memory");
    const size_t shared_bytes = sizeof(SharedMemory<Shape>) + Tiles<Shape>::list_bytes(a);
    const LaunchConfig config{"moe_down", grid_of(a.sharing.blocks), dim3(Shape::THREADS), shared_bytes, stream, 1, a.dependent};
    const TensorMap shared_map = weight_map<Shape>("shared_w2", problem.shared, 1);
    const TensorMap routed_map = weight_map<Shape>("w2", problem.routed, a.experts);
    launch(config, &down_kernel<Shape>, shared_map, routed_map, problem);
}

// For few tokens one set of channels, so that there are more tiles to share; for many two, which use each row twice.
constexpr int MANY_TOKENS_SETS = 2;

}  // namespace

int moe_down_columns(int tokens) { return (moe_tile_tokens(tokens) <= 64 ? 1 : MANY_TOKENS_SETS) * 128; }

int moe_down_part(int tokens) { return moe_down_columns(tokens) * moe_tile_tokens(tokens); }

void moe_down(const MoeDownArguments& a, cudaStream_t stream) {
    if (a.tokens == 0) return;
    switch (moe_tile_tokens(a.tokens)) {
        case 16: return launch_shape<MoeShape<16, 1>>(a, stream);
        case 64: return launch_shape<MoeShape<64, 1>>(a, stream);
        default: return launch_shape<MoeShape<96, MANY_TOKENS_SETS>>(a, stream);
    }
}

}  // namespace llama4_kernels
