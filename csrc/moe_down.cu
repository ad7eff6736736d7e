// moe_down: the down projections of both experts in one sum. A tile is TOKENS sorted rows, whoever their experts are, by SETS · 128 channels:
// it is multiplied with the shared expert's weight and then with that of each expert that has rows there, whose products reach these rows
// only. So every weight is read once per tile of rows, and every row is written once, to its token's place.

#include "hopper/dependent_launch.cuh"
#include "hopper/registers.cuh"
#include "moe_tile.cuh"

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
    int experts;    // that have tokens
    int present[];  // those
};

// ---- which tile, which segments

template <class Shape>
__device__ inline int column_tiles(int hidden) {
    return (hidden + Shape::SETS * Shape::SET_CHANNELS - 1) / (Shape::SETS * Shape::SET_CHANNELS);
}

// One split of one tile, and the experts that have rows in it. The constructor is for whole warps.
template <class Shape>
class Unit {
public:
    __device__ Unit(const Problem& problem, const SharedMemory<Shape>& shared, int64_t index) : problem_(problem), shared_(shared) {
        const MoeDownArguments& a = problem.a;
        split = int(index % a.splits.count);
        tile = index / a.splits.count;
        const int columns = column_tiles<Shape>(a.hidden);
        first_row = int(tile / columns) * Shape::TOKENS;
        end_row = min(first_row + Shape::TOKENS, a.tokens);
        first_channel = int(tile % columns) * Shape::SETS * Shape::SET_CHANNELS;

        int before = 0, through = 0;
        for (int i = threadIdx.x % WARP; i < shared.experts; i += WARP) {
            before += a.routing.offsets[shared.present[i] + 1] <= first_row;
            through += a.routing.offsets[shared.present[i]] < end_row;
        }
        first_present_ = __reduce_add_sync(ALL_LANES, before);
        const int steps = problem.shared.steps + (__reduce_add_sync(ALL_LANES, through) - first_present_) * problem.routed.steps;
        begin_ = int(int64_t(steps) * split / a.splits.count);
        end_ = int(int64_t(steps) * (split + 1) / a.splits.count);
    }

    // visit(is_shared, segment, first step, end step) for each part of this split.
    template <class Visit>
    __device__ void for_each_segment(Visit visit) const {
        const int shared_steps = problem_.shared.steps, routed_steps = problem_.routed.steps;
        for (int at = begin_; at < end_;) {
            const bool is_shared = at < shared_steps;
            const int index = is_shared ? 0 : (at - shared_steps) / routed_steps;
            const int first = is_shared ? 0 : shared_steps + index * routed_steps;
            const int end = min(end_, is_shared ? shared_steps : first + routed_steps);
            const int expert = is_shared ? 0 : shared_.present[first_present_ + index];
            const int* offsets = problem_.a.routing.offsets + expert;
            const int from = is_shared ? first_row : max(offsets[0], first_row), to = is_shared ? end_row : min(offsets[1], end_row);
            visit(is_shared, Segment{expert, first_channel, Shape::SET_CHANNELS, first_row, from, to}, at - first, end - first);
            at = end;
        }
    }

    int64_t tile;
    int split;
    int first_row, end_row;
    int first_channel;

private:
    const Problem& problem_;
    const SharedMemory<Shape>& shared_;
    int first_present_, begin_, end_;
};

// The experts that have tokens, by one warp.
template <class Shape>
__device__ void list_experts(const MoeDownArguments& a, SharedMemory<Shape>& shared) {
    const int lane = threadIdx.x % WARP;
    int count = 0;
    for (int start = 0; start < a.experts; start += WARP) {
        const int expert = start + lane;
        const bool present = expert < a.experts && a.routing.offsets[expert] < a.routing.offsets[expert + 1];
        const unsigned votes = __ballot_sync(ALL_LANES, present);
        if (present) shared.present[count + __popc(votes & ((1u << lane) - 1))] = expert;
        count += __popc(votes);
    }
    if (lane == 0) shared.experts = count;
}

// ---- the kernel

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) down_kernel(const __grid_constant__ TensorMap shared_weights,
                                                                 const __grid_constant__ TensorMap routed_weights,
                                                                 const __grid_constant__ Problem problem) {
    const MoeDownArguments& a = problem.a;
    auto& shared = *shared_memory<SharedMemory<Shape>>();
    prepare(shared.stages, shared_weights, routed_weights);
    wait_for_dependencies();
    if (threadIdx.x < WARP) list_experts(a, shared);
    __syncthreads();

    const int64_t units = int64_t((a.tokens + Shape::TOKENS - 1) / Shape::TOKENS) * column_tiles<Shape>(a.hidden) * a.splits.count;
    if (threadIdx.x >= Shape::CONSUMERS) {
        decrease_registers<Shape::LOADER_REGISTERS>();
        StageLoader<Shape> loader(shared.stages);
        for (int64_t index = blockIdx.x; index < units; index += gridDim.x) {
            Unit<Shape>(problem, shared, index).for_each_segment([&](bool is_shared, const Segment& segment, int begin, int end) {
                const TensorMap& weights = is_shared ? shared_weights : routed_weights;
                loader.load(is_shared ? problem.shared : problem.routed, weights, segment, nullptr, begin, end);
            });
        }
        loader.finish();
    } else {
        increase_registers<Shape::CONSUMER_REGISTERS>();
        StageConsumer<Shape> consumer(shared.stages);
        for (int64_t index = blockIdx.x; index < units; index += gridDim.x) {
            const Unit<Shape> unit(problem, shared, index);
            Sums<Shape> total = {};
            unit.for_each_segment([&](bool is_shared, const Segment& segment, int begin, int end) {
                consumer.template add<true>(is_shared ? problem.shared : problem.routed, segment, begin, end, total);
            });
            const int rows = unit.end_row - unit.first_row;
            if (!combine_splits(shared.stages, a.splits, unit.tile, unit.split, rows, total)) continue;
            auto* out = static_cast<__nv_bfloat16*>(a.out) + unit.first_channel;
            store_rows<Shape, Shape::SETS, __nv_bfloat16>(
                shared.staging, rows, a.hidden - unit.first_channel, [&](int set, int i) { return __float2bfloat16(total[set][i]); },
                [&](int token) { return out + int64_t(a.routing.order[unit.first_row + token]) * a.hidden; });
        }
    }
}

// ---- launch

template <class Shape>
void launch_shape(const MoeDownArguments& a, cudaStream_t stream) {
    const Problem problem{
        a, moe_path(a.h_shared, a.w_shared, a.hidden, a.k_shared), moe_path(a.h_routed, a.w_routed, a.hidden, a.k_routed)};
    const int64_t tiles = ceil_div(a.tokens, Shape::TOKENS) * ceil_div(a.hidden, Shape::SETS * Shape::SET_CHANNELS);
    const size_t shared_bytes = sizeof(SharedMemory<Shape>) + a.experts * sizeof(int);
    const dim3 grid = grid_of(std::min<int64_t>(tiles * a.splits.count, multiprocessors()));
    const LaunchConfig config{"moe_down", grid, dim3(Shape::THREADS), shared_bytes, stream, 1, a.dependent};
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
