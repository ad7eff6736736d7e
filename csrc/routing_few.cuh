// route_top1 for few tokens of bfloat16. The grid's first cluster multiplies all of them with a slice of the experts on the tensor cores,
// an eighth of the columns in each block; every other block writes the codes of one token. Both warpgroups multiply, each every second step
// of the columns, and store their sums straight into the shared memory of the block that owns the token, where they arrive at a barrier:
// only who reads them waits, and no barrier of the cluster is needed. Sums have one fixed order, the same for every expert.
#pragma once

#include <cuda_bf16.h>

#include "hopper/cluster.cuh"
#include "hopper/cp_async.cuh"
#include "hopper/dependent_launch.cuh"
#include "hopper/memory.cuh"
#include "hopper/remote_store.cuh"
#include "hopper/wgmma.cuh"
#include "routing_codes.cuh"
#include "routing_sort.cuh"

namespace llama4_kernels::routing {

// LOGITS: the experts of a slice, and columns beyond them that no expert has.
template <int LOGITS_>
struct FewShape {
    static constexpr int LOGITS = LOGITS_;
    static constexpr bool ONE_SLICE = LOGITS == 16;  // whose first block sorts, without a ticket
    static constexpr int TOKENS = ROUTE_FEW_TOKENS;
    static constexpr int RANKS = 8;       // blocks of a cluster
    static constexpr int STEP = 64;       // columns of a tile
    static constexpr int MAX_STEPS = 16;  // of a block
    static constexpr int ROW_BYTES = STEP * sizeof(__nv_bfloat16);
    static constexpr int CHUNKS = ROW_BYTES / 16;
    static constexpr int X_BYTES = TOKENS * ROW_BYTES;
    static constexpr int TILE_BYTES = X_BYTES + LOGITS * ROW_BYTES;
    static constexpr int GROUPS = 2;  // warpgroups
    static constexpr int THREADS = GROUPS * hopper::WARPGROUP;
    static constexpr int WARPS = THREADS / WARP;
    static constexpr int PARTS = RANKS * GROUPS;  // of a logit
    static constexpr int ROWS_AT_ONCE = THREADS / CHUNKS;
    static constexpr int OWN_TOKENS = TOKENS / RANKS;
    static constexpr int ROW_CHUNKS = MAX_STEPS * RANKS * CHUNKS / THREADS;  // of a row, of a thread that writes codes
    static constexpr hopper::Swizzle SWIZZLE = hopper::Swizzle::bytes_128;
    static_assert(TOKENS == 64, "wgmma's rows");
    static_assert(OWN_TOKENS == WARPS, "a token of the block for each warp");
};

struct FewProblem {
    RouteArguments a;
    int slices;
    int steps;  // of each block, a multiple of GROUPS
};

// ---- shared memory

template <class Shape>
struct FewMemory {
    hopper::Barrier full[Shape::MAX_STEPS];
    hopper::Barrier parts_full, keys_full;
    Key keys[Shape::TOKENS];  // in rank 0, with one slice
    SortEntries entries;
    unsigned largest[Shape::WARPS];
    int is_last;
    alignas(16) float parts[Shape::PARTS][Shape::OWN_TOKENS][Shape::LOGITS];
    alignas(1024) uint8_t tiles[][Shape::TILE_BYTES];  // [steps]: of x, then of the router
};

// ---- logits

// Tile by tile, the rows of x that there are and the slice's experts; zeros past the last column.
template <class Shape>
__device__ inline void load_tiles(FewMemory<Shape>& shared, const FewProblem& problem, int slice, int first_column) {
    constexpr int ROWS = Shape::ROWS_AT_ONCE;
    static_assert(Shape::TOKENS == 2 * ROWS && Shape::LOGITS <= ROWS && ROWS % 8 == 0, "rows of a thread, which the swizzle moves alike");
    const RouteArguments& a = problem.a;
    const int row = threadIdx.x / Shape::CHUNKS, chunk = threadIdx.x % Shape::CHUNKS, expert = slice * Shape::LOGITS + row;
    const int column = first_column + chunk * 8, steps_inside = ceil_div(a.hidden - column, Shape::STEP);
    const auto* x = static_cast<const __nv_bfloat16*>(a.x) + int64_t(row) * a.hidden + column;
    const auto* further_x = x + int64_t(ROWS) * a.hidden;
    const auto* router = static_cast<const __nv_bfloat16*>(a.router) + int64_t(expert) * a.hidden + column;
    const bool has_x = row < a.tokens, has_further_x = row + ROWS < a.tokens, has_expert = row < Shape::LOGITS && expert < a.experts;
    uint8_t* to = shared.tiles[0] + hopper::swizzled(Shape::SWIZZLE, uint32_t(row * Shape::ROW_BYTES + chunk * 16));
    for (int step = 0; step < problem.steps; ++step) {
        const bool valid = step < steps_inside;
        if (has_x) hopper::cp_async_16(to, x, valid);
        if (has_further_x) hopper::cp_async_16(to + ROWS * Shape::ROW_BYTES, further_x, valid);
        if (has_expert) hopper::cp_async_16(to + Shape::X_BYTES, router, valid);
        hopper::cp_async_arrive(shared.full[step]);
        x += Shape::STEP, further_x += Shape::STEP, router += Shape::STEP, to += Shape::TILE_BYTES;
    }
}

// This warpgroup's products, into the shared memory of the blocks that own the tokens.
template <class Shape>
__device__ inline void multiply_few(FewMemory<Shape>& shared, const FewProblem& problem, int rank) {
    constexpr int LOGITS = Shape::LOGITS;
    const int group = threadIdx.x / hopper::WARPGROUP, thread = threadIdx.x % hopper::WARPGROUP;
    float sums[LOGITS / 2];
    for (int i = 0; i < problem.steps / Shape::GROUPS; ++i) {
        const int step = i * Shape::GROUPS + group;
        shared.full[step].wait(0);
        hopper::fence_async_proxy();
        const uint64_t tokens = hopper::k_major(shared.tiles[step], Shape::SWIZZLE);
        const uint64_t experts = hopper::advanced(tokens, Shape::X_BYTES);
        hopper::wgmma_fence();
#pragma unroll
        for (int byte = 0; byte < Shape::ROW_BYTES; byte += 32) {
            hopper::wgmma_bf16<LOGITS>(sums, hopper::advanced(tokens, byte), hopper::advanced(experts, byte), i > 0 || byte > 0);
        }
        hopper::wgmma_commit();
        if (i > 0) hopper::wgmma_wait<1>();
    }
    hopper::wgmma_wait<0>();
    hopper::cluster_wait();
#pragma unroll
    for (int i = 0; i < LOGITS / 2; i += 2) {
        const int token = hopper::accumulator_row(thread, i), expert = hopper::accumulator_column(thread, i);
        float2* part = reinterpret_cast<float2*>(&shared.parts[rank * Shape::GROUPS + group][token % Shape::OWN_TOKENS][expert]);
        if (token < problem.a.tokens) {
            hopper::store_async(part, token / Shape::OWN_TOKENS, make_float2(sums[i], sums[i + 1]), shared.parts_full);
        }
    }
}

// By a warp: one of its block's tokens. The first of `experts` is the slice's.
template <class Shape>
__device__ inline Key best_of_slice(const FewMemory<Shape>& shared, int own_token, int first_expert, int experts) {
    Key best = 0;
    const int column = threadIdx.x % WARP * 4;
    if (column < Shape::LOGITS) {
        float4 logits = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < Shape::PARTS; ++i) {
            const float4 part = *reinterpret_cast<const float4*>(&shared.parts[i][own_token][column]);
            logits = make_float4(logits.x + part.x, logits.y + part.y, logits.z + part.z, logits.w + part.w);
        }
        const float values[] = {logits.x, logits.y, logits.z, logits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int expert = first_expert + column + i;
            if (expert < experts) best = max(best, rank_key(values[i], expert));
        }
    }
    for (int bit = 1; bit < Shape::LOGITS / 4; bit *= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, bit));
    return best;
}

template <class Shape>
__device__ inline void route_few(FewMemory<Shape>& shared, const FewProblem& problem, int first_column) {
    const RouteArguments& a = problem.a;
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, rank = int(hopper::cluster_rank());
    const int slice = blockIdx.y;
    load_tiles(shared, problem, slice, first_column);
    multiply_few(shared, problem, rank);

    const int token = rank * Shape::OWN_TOKENS + warp;
    if (token < a.tokens) {
        shared.parts_full.wait(0);
        const Key best = best_of_slice(shared, warp, slice * Shape::LOGITS, a.experts);
        if (lane == 0 && Shape::ONE_SLICE) {
            hopper::store_async(&shared.keys[token], 0, best, shared.keys_full);
            a.expert_ids[token] = expert_of(best);
            a.scores[token] = score_of(best);
        } else if (lane == 0) {
            a.best[token * problem.slices + slice] = best;
        }
    }
    if constexpr (Shape::ONE_SLICE) {
        if (rank != 0) return;
        shared.keys_full.wait(0);
        if (thread < Shape::TOKENS) {
            shared.entries.values[thread] = thread < a.tokens ? sort_entry(expert_of(shared.keys[thread]), thread) : NO_ENTRY;
        }
        __syncthreads();
        place_few_tokens(shared.entries, a);
    } else {
        const int owners = max(ceil_div(a.tokens, Shape::OWN_TOKENS), 1);
        if (rank >= owners) return;
        __syncthreads();
        if (is_last_block(a.tickets, shared.is_last, owners * problem.slices)) sort_few_tokens(shared.entries, a, problem.slices);
    }
}

// ---- codes

template <class Shape>
__device__ inline void write_codes_of_row(FewMemory<Shape>& shared, const RouteArguments& a, int token) {
    const int thread = threadIdx.x;
    const auto* row = static_cast<const __nv_bfloat16*>(a.x) + int64_t(token) * a.hidden;
    const auto column_of = [&](int i) { return (i * Shape::THREADS + thread) * 8; };
    uint4 x[Shape::ROW_CHUNKS];
#pragma unroll
    for (int i = 0; i < Shape::ROW_CHUNKS; ++i) {
        const bool inside = column_of(i) < a.hidden;
        x[i] = inside ? *reinterpret_cast<const uint4*>(row + column_of(i)) : make_uint4(0, 0, 0, 0);
    }
    unsigned most = 0;
    uint4* const held = reinterpret_cast<uint4*>(shared.tiles[0]) + thread;  // this thread's, for a loop that is not unrolled
#pragma unroll
    for (int i = 0; i < Shape::ROW_CHUNKS; ++i) {
        most = larger(most, x[i]);
        if (column_of(i) < a.hidden) held[i * Shape::THREADS] = x[i];
    }
    most = __reduce_max_sync(ALL_LANES, max(most & 0xffffu, most >> 16));
    if (thread % WARP == 0) shared.largest[thread / WARP] = most;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Shape::WARPS; ++i) most = max(most, shared.largest[i]);
    const float scale = __uint_as_float(most << 16) / E4M3_MAX;
    if (thread == 0) a.scale[token] = scale;
    uint8_t* codes = a.codes + int64_t(token) * a.hidden;
    divide_by(scale, [&](auto divide) {
#pragma unroll 1
        for (int i = 0; column_of(i) < a.hidden; ++i) {
            *reinterpret_cast<uint2*>(codes + column_of(i)) = codes_of(held[i * Shape::THREADS], divide);
        }
    });
}

// ---- the kernel

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS) route_few_kernel(const __grid_constant__ FewProblem problem) {
    const RouteArguments& a = problem.a;
    auto& shared = *shared_memory<FewMemory<Shape>>();
    const int thread = threadIdx.x, rank = int(blockIdx.x);
    const bool routes = rank < Shape::RANKS;
    const int first_column = rank * problem.steps * Shape::STEP;
    hopper::launch_dependents();
    if (routes) {
        if (thread < problem.steps) shared.full[thread].init(Shape::THREADS);
        if (thread == 0) {
            const int own_tokens = max(min(a.tokens - rank * Shape::OWN_TOKENS, Shape::OWN_TOKENS), 0);
            shared.parts_full.init(1);
            shared.parts_full.arrive_expect(own_tokens * Shape::PARTS * Shape::LOGITS * sizeof(float));
            shared.keys_full.init(1);
            shared.keys_full.arrive_expect(rank == 0 && Shape::ONE_SLICE ? a.tokens * sizeof(Key) : 0);
        }
        hopper::fence_barrier_init();
        __syncthreads();
        hopper::cluster_arrive_relaxed();
        // The kernel ahead may write the router as well as x, and what it writes reaches L2
        for (int i = thread; a.dependent && i < Shape::LOGITS * problem.steps; i += Shape::THREADS) {
            const int expert = int(blockIdx.y) * Shape::LOGITS + i / problem.steps, column = first_column + i % problem.steps * Shape::STEP;
            const auto* router = static_cast<const __nv_bfloat16*>(a.router);
            if (expert < a.experts && column < a.hidden) hopper::prefetch_l2(router + int64_t(expert) * a.hidden + column);
        }
    }
    hopper::wait_for_dependencies();
    const int token = (rank - Shape::RANKS) * problem.slices + int(blockIdx.y);
    if (routes) {
        route_few(shared, problem, first_column);
    } else if (token < a.tokens) {
        write_codes_of_row(shared, a, token);
    }
}

// ---- launch

inline int few_steps(int hidden) {
    constexpr int GROUPS = FewShape<16>::GROUPS;
    return int(ceil_div(hidden, FewShape<16>::RANKS * FewShape<16>::STEP * GROUPS)) * GROUPS;
}

// Whether wgmma and 16-byte copies can take the arguments.
inline bool takes_few(const RouteArguments& a) {
    const bool bf16 = a.x_dtype == Dtype::bfloat16 && a.router_dtype == Dtype::bfloat16;
    const bool aligned = a.hidden % 8 == 0 && is_aligned(a.x, 16) && is_aligned(a.router, 16) && is_aligned(a.codes, sizeof(uint2));
    return a.tokens <= ROUTE_FEW_TOKENS && bf16 && aligned && few_steps(a.hidden) <= FewShape<16>::MAX_STEPS;
}

template <class Shape>
void launch_few(const RouteArguments& a, cudaStream_t stream) {
    static_assert(sizeof(FewMemory<Shape>) + Shape::MAX_STEPS * Shape::TILE_BYTES <= 227 << 10, "a block's shared memory");
    const int steps = few_steps(a.hidden), slices = int(ceil_div(a.experts, Shape::LOGITS));
    const int code_clusters = a.codes ? int(ceil_div(a.tokens, Shape::RANKS * slices)) : 0;
    dim3 grid = grid_of(Shape::RANKS * (1 + code_clusters));
    grid.y = slices;
    const LaunchConfig config{"route_top1",
                              grid,
                              dim3(Shape::THREADS),
                              sizeof(FewMemory<Shape>) + steps * Shape::TILE_BYTES,
                              stream,
                              Shape::RANKS,
                              a.dependent};
    launch(config, &route_few_kernel<Shape>, FewProblem{a, slices, steps});
}

}  // namespace llama4_kernels::routing
