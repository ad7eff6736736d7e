// route_top1 on the tensor cores, for many tokens: a cluster takes 64 tokens. A block holds its eighth of their columns in shared memory,
// read once, while its eighth of the router passes through a ring of stages. One warpgroup multiplies, tokens on wgmma's M side and experts
// on N; another finds the rows' largest magnitudes; one warp loads. Sums have one fixed order, the same for every expert.
#pragma once

#include <cuda_bf16.h>

#include "hopper/cluster.cuh"
#include "hopper/dependent_launch.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "pipeline.cuh"
#include "routing_codes.cuh"
#include "routing_sort.cuh"

namespace llama4_kernels::routing {

// LOGITS: the experts, and columns beyond them that no expert has.
template <int LOGITS_>
struct TileShape {
    static constexpr int LOGITS = LOGITS_;
    static constexpr int TOKENS = 64;
    static constexpr int RANKS = 8;       // blocks of a cluster
    static constexpr int STEP = 64;       // columns of a stage and of a box of x
    static constexpr int MAX_STEPS = 20;  // of a block
    static constexpr int ROW_BYTES = STEP * sizeof(__nv_bfloat16);
    static constexpr int X_BYTES = TOKENS * ROW_BYTES;
    static constexpr int ROUTER_BYTES = LOGITS * ROW_BYTES;
    static constexpr int STAGES = LOGITS <= 16 ? 8 : 2;
    static constexpr int BLOCKS_PER_SM = LOGITS <= 128 ? 2 : 1;
    static constexpr int MULTIPLY_WARPS = 4;
    static constexpr int CODE_WARPS = 8;  // the multiplying ones and those that find magnitudes
    static constexpr int WARPS = CODE_WARPS + 1;
    static constexpr hopper::Swizzle SWIZZLE = hopper::Swizzle::bytes_128;
};

struct TileProblem {
    RouteArguments a;
    int steps;  // of each block
};

// ---- shared memory

template <class Shape>
struct TileMemory {
    // Afterwards this block's part of the logits, and the counts of sort_many_tokens
    alignas(1024) uint8_t router[Shape::STAGES][Shape::ROUTER_BYTES];
    Pipeline<Shape::STAGES> pipeline;
    hopper::Barrier x_full[Shape::MAX_STEPS];
    unsigned largest[Shape::TOKENS];  // magnitude in this block's columns
    float scale[Shape::TOKENS];
    int is_last;
    alignas(1024) uint8_t x[][Shape::X_BYTES];  // [steps]

    // Logits of `expert` on, to the next multiple of 4. Eights of a row are permuted: a warp's accumulators then fall into different banks.
    __device__ float* logits(int token, int expert) {
        static_assert(sizeof(float) * Shape::TOKENS * Shape::LOGITS <= sizeof router);
        return reinterpret_cast<float*>(router) + token * Shape::LOGITS + (expert ^ ((token % 4 * 8) & (Shape::LOGITS - 1)));
    }

    // Columns 8 · chunk to 8 · chunk + 7 of a step of a token.
    __device__ uint4 x_chunk(int step, int token, int chunk) const {
        return *reinterpret_cast<const uint4*>(x[step] + hopper::swizzled(Shape::SWIZZLE, uint32_t(token * Shape::ROW_BYTES + chunk * 16)));
    }
};

// ---- the warp that loads: one thread

template <class Shape>
__device__ inline void load_router(TileMemory<Shape>& shared, PipelinePosition<Shape::STAGES> at, const hopper::TensorMap& router,
                                   int column) {
    hopper::Barrier& full = shared.pipeline.full[at.stage];
    full.arrive_expect(Shape::ROUTER_BYTES);
    hopper::tma_load<hopper::L2::evict_last>(shared.router[at.stage], router, full, column, 0);
}

template <class Shape>
__device__ inline void load_x(TileMemory<Shape>& shared, int step, const hopper::TensorMap& x, int column, int token) {
    shared.x_full[step].arrive_expect(Shape::X_BYTES);
    hopper::tma_load(shared.x[step], x, shared.x_full[step], column, token);
}

// ---- the warpgroup that multiplies

template <class Shape>
__device__ inline void multiply(TileMemory<Shape>& shared, int steps) {
    constexpr int LOGITS = Shape::LOGITS;
    PipelinePosition<Shape::STAGES> at, before;
    float sums[LOGITS / 2];
    for (int step = 0; step < steps; ++step, at.advance()) {
        shared.x_full[step].wait(0);
        shared.pipeline.wait_until_full(at);
        const uint64_t tokens = hopper::k_major(shared.x[step], Shape::SWIZZLE);
        const uint64_t experts = hopper::k_major(shared.router[at.stage], Shape::SWIZZLE);
        hopper::wgmma_fence();
#pragma unroll
        for (int byte = 0; byte < Shape::ROW_BYTES; byte += 32) {
            hopper::wgmma_bf16<LOGITS>(sums, hopper::advanced(tokens, byte), hopper::advanced(experts, byte), step > 0 || byte > 0);
        }
        hopper::wgmma_commit();
        if (step == 0) continue;
        hopper::wgmma_wait<1>();
        if (threadIdx.x % WARP == 0) shared.pipeline.empty[before.stage].arrive();
        before.advance();
    }
    hopper::wgmma_wait<0>();
    hopper::named_barrier_sync(1, hopper::WARPGROUP);  // the other warps' products have read the last stages
#pragma unroll
    for (int i = 0; i < LOGITS / 2; i += 2) {
        const int token = hopper::accumulator_row(threadIdx.x, i), expert = hopper::accumulator_column(threadIdx.x, i);
        *reinterpret_cast<float2*>(shared.logits(token, expert)) = make_float2(sums[i], sums[i + 1]);
    }
}

// ---- the warpgroup that finds magnitudes

template <class Shape>
__device__ inline void find_largest(TileMemory<Shape>& shared, int steps) {
    constexpr int WARP_TOKENS = WARP / 2, CHUNKS = Shape::ROW_BYTES / 16 / 2;  // a token's step is halved between two lanes
    const int lane = threadIdx.x % WARP, half = lane / WARP_TOKENS;
    const int token = (threadIdx.x / WARP - Shape::MULTIPLY_WARPS) * WARP_TOKENS + lane % WARP_TOKENS;
    unsigned most = 0;  // of even columns, of odd ones
    for (int step = 0; step < steps; ++step) {
        shared.x_full[step].wait(0);
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) most = larger(most, shared.x_chunk(step, token, half * CHUNKS + i));
    }
    most = max(most & 0xffffu, most >> 16);
    most = max(most, __shfl_xor_sync(ALL_LANES, most, WARP_TOKENS));
    if (half == 0) shared.largest[token] = most << 16;
}

// ---- the cluster's sums

// By a warp: one of its block's tokens, whose logits lie in all blocks.
template <class Shape>
__device__ inline Key best_expert(TileMemory<Shape>& shared, int token, int experts) {
    Key best = 0;
#pragma unroll
    for (int expert = threadIdx.x % WARP * 4; expert < Shape::LOGITS; expert += WARP * 4) {
        float4 logits = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int from = 0; from < Shape::RANKS; ++from) {
            const float4 part = *reinterpret_cast<const float4*>(hopper::remote_shared(shared.logits(token, expert), from));
            logits = make_float4(logits.x + part.x, logits.y + part.y, logits.z + part.z, logits.w + part.w);
        }
        const float values[] = {logits.x, logits.y, logits.z, logits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (expert + i < experts) best = max(best, rank_key(values[i], expert + i));
        }
    }
    for (int bit = 1; bit < int(WARP); bit *= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, bit));
    return best;
}

template <class Shape>
__device__ inline float scale_of(TileMemory<Shape>& shared, int token) {
    unsigned most = 0;
    for (int from = 0; from < Shape::RANKS; ++from) most = max(most, *hopper::remote_shared(&shared.largest[token], from));
    return __uint_as_float(most) / E4M3_MAX;
}

// ---- codes

// Of this block's columns. A row is one of 8 lanes', in turns of 64 columns.
template <class Shape>
__device__ inline void write_codes(const TileMemory<Shape>& shared, const TileProblem& problem, int first_token, int first_column) {
    constexpr int CHUNKS = Shape::ROW_BYTES / 16, TOKENS_AT_ONCE = Shape::CODE_WARPS * WARP / CHUNKS;
    const RouteArguments& a = problem.a;
    const int chunk = threadIdx.x % CHUNKS;
    for (int token = threadIdx.x / CHUNKS; token < min(Shape::TOKENS, a.tokens - first_token); token += TOKENS_AT_ONCE) {
        uint8_t* row = a.codes + int64_t(first_token + token) * a.hidden;
        divide_by(shared.scale[token], [&](auto divide) {
            for (int step = 0; step < problem.steps; ++step) {
                const int column = first_column + step * Shape::STEP + chunk * 8;
                if (column >= a.hidden) return;
                *reinterpret_cast<uint2*>(row + column) = codes_of(shared.x_chunk(step, token, chunk), divide);
            }
        });
    }
}

// ---- the kernel

template <class Shape>
__global__ void __launch_bounds__(Shape::WARPS* WARP, Shape::BLOCKS_PER_SM)
    route_wgmma_kernel(const __grid_constant__ hopper::TensorMap x, const __grid_constant__ hopper::TensorMap router,
                       const __grid_constant__ TileProblem problem) {
    const RouteArguments& a = problem.a;
    const int steps = problem.steps;
    auto& shared = *shared_memory<TileMemory<Shape>>();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int rank = int(hopper::cluster_rank());
    const int first_token = int(blockIdx.x) / Shape::RANKS * Shape::TOKENS, first_column = rank * steps * Shape::STEP;
    const bool loads = warp == Shape::CODE_WARPS && lane == 0;
    hopper::launch_dependents();
    if (loads) {
        hopper::prefetch_tensor_map(x);
        hopper::prefetch_tensor_map(router);
        for (int step = 0; step < steps; ++step) shared.x_full[step].init(1);
        shared.pipeline.init(1, Shape::MULTIPLY_WARPS);
    }
    __syncthreads();

    // The kernel ahead may write the router as well as x, and what it writes reaches L2
    const int ahead = min(Shape::STAGES, steps);
    if (loads) {
        for (int step = 0; step < ahead; ++step) hopper::tma_prefetch(router, first_column + step * Shape::STEP, 0);
    }
    hopper::wait_for_dependencies();
    if (warp < Shape::MULTIPLY_WARPS) {
        multiply(shared, steps);
    } else if (warp < Shape::CODE_WARPS) {
        if (a.codes) find_largest(shared, steps);
    } else {
        if (loads) {
            PipelinePosition<Shape::STAGES> at;
            for (int step = 0; step < ahead; ++step, at.advance()) load_router(shared, at, router, first_column + step * Shape::STEP);
            for (int step = 0; step < steps; ++step) load_x(shared, step, x, first_column + step * Shape::STEP, first_token);
            for (int step = ahead; step < steps; ++step, at.advance()) {
                shared.pipeline.wait_until_empty(at);
                load_router(shared, at, router, first_column + step * Shape::STEP);
            }
        }
        __syncwarp();
    }

    hopper::cluster_sync();
    if (warp < Shape::CODE_WARPS) {
        static_assert(Shape::CODE_WARPS * Shape::RANKS == Shape::TOKENS, "a token for each of these warps of the cluster");
        const int token = rank * Shape::CODE_WARPS + warp;
        const Key best = best_expert(shared, token, a.experts);
        if (lane == 0 && first_token + token < a.tokens) {
            a.expert_ids[first_token + token] = expert_of(best);
            a.scores[first_token + token] = score_of(best);
        }
    } else if (a.codes) {
        for (int token = lane; token < Shape::TOKENS; token += WARP) {
            shared.scale[token] = scale_of(shared, token);
            if (rank == 0 && first_token + token < a.tokens) a.scale[first_token + token] = shared.scale[token];
        }
    }
    hopper::cluster_arrive();  // this block needs the others' shared memory no more
    __syncthreads();
    if (a.codes && warp < Shape::CODE_WARPS) write_codes(shared, problem, first_token, first_column);
    hopper::cluster_wait();

    if (!is_last_block(a.tickets, shared.is_last, gridDim.x * gridDim.y)) return;
    sort_many_tokens(reinterpret_cast<int*>(shared.router), a);
}

// ---- launch

inline int tile_steps(int hidden) { return int(ceil_div(hidden, TileShape<16>::RANKS * TileShape<16>::STEP)); }

// Whether wgmma and TMA can take the arguments.
inline bool takes_wgmma(const RouteArguments& a) {
    const bool bf16 = a.x_dtype == Dtype::bfloat16 && a.router_dtype == Dtype::bfloat16;
    const bool aligned = a.hidden % 8 == 0 && is_aligned(a.x, 16) && is_aligned(a.router, 16) && is_aligned(a.codes, sizeof(uint2));
    return a.tokens > ROUTE_FEW_TOKENS && bf16 && aligned && tile_steps(a.hidden) <= TileShape<16>::MAX_STEPS;
}

template <class Shape>
void launch_wgmma(const RouteArguments& a, cudaStream_t stream) {
    static_assert(sizeof(TileMemory<Shape>) + Shape::MAX_STEPS * Shape::X_BYTES <= 227 << 10, "a block's shared memory");
    constexpr int LLAMA4_STEPS = 10, RESERVED_BYTES = 1024;  // of a block
    static_assert(Shape::BLOCKS_PER_SM * (sizeof(TileMemory<Shape>) + LLAMA4_STEPS * Shape::X_BYTES + RESERVED_BYTES) <= 228 << 10,
                  "a multiprocessor's shared memory");
    static_assert(count_bytes(Shape::WARPS, Shape::LOGITS) <= int64_t(sizeof(TileMemory<Shape>::router)), "the sort's counts");
    const uint64_t hidden = a.hidden, row_bytes = hidden * sizeof(__nv_bfloat16);
    const auto map_of = [&](const char* name, const void* data, int rows, int box_rows) {
        return hopper::make_tensor_map<2>({name, data, hopper::ElementType::bfloat16, {hidden, uint64_t(rows)}, {row_bytes},
                                           {Shape::STEP, uint32_t(box_rows)}, Shape::SWIZZLE});
    };
    const hopper::TensorMap x = map_of("x", a.x, a.tokens, Shape::TOKENS), router = map_of("router", a.router, a.experts, Shape::LOGITS);
    const int steps = tile_steps(a.hidden);
    const LaunchConfig config{"route_top1",
                              grid_of(ceil_div(a.tokens, Shape::TOKENS) * Shape::RANKS),
                              dim3(Shape::WARPS * WARP),
                              sizeof(TileMemory<Shape>) + steps * Shape::X_BYTES,
                              stream,
                              Shape::RANKS,
                              a.dependent};
    launch(config, &route_wgmma_kernel<Shape>, x, router, TileProblem{a, steps});
}

}  // namespace llama4_kernels::routing
