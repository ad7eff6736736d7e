// route_top1 on the fp32 units, for few tokens, float32 and rows at any address: a block holds its eighth of the columns of a few tokens in
// shared memory, multiplies them with slices of 16 experts, and reads the others' sums through distributed shared memory.
#pragma once

#include "floats.cuh"
#include "hopper/cluster.cuh"
#include "hopper/dependent_launch.cuh"
#include "routing_sort.cuh"

namespace llama4_kernels::routing {

constexpr int FP32_RANKS = 8;  // blocks of a cluster
constexpr int SLICE_EXPERTS = 16;
constexpr int WARP_EXPERTS = 4;
constexpr int EXPERT_WARPS = SLICE_EXPERTS / WARP_EXPERTS;
constexpr int MAX_COLUMN_WARPS = 5;
constexpr int FP32_CHUNK = 4 * WARP;  // columns that a warp takes at a time

struct Fp32Problem {
    RouteArguments a;
    int slices;
    int columns;       // of a block, a multiple of FP32_CHUNK
    int column_warps;  // that share a block's columns, for each of EXPERT_WARPS
};

// ---- numbers

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T values[4];
};

// Elements `column` to `column` + 3 of a row; zeros from `end` on.
template <bool ALIGNED, class T>
__device__ inline float4 load_four(const T* row, int column, int end) {
    Four<T> four;
    if constexpr (ALIGNED) {
        if (column >= end) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        four = *reinterpret_cast<const Four<T>*>(row + column);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) four.values[i] = column + i < end ? row[column + i] : T(0.0f);
    }
    return make_float4(to_float(four.values[0]), to_float(four.values[1]), to_float(four.values[2]), to_float(four.values[3]));
}

// Sums over the lanes of each of COUNT values, a power of two; lane l gets that of value l / (32 / COUNT).
template <int COUNT, int BIT = WARP / 2>
__device__ inline float sum_lanes(float (&values)[COUNT]) {
    const bool upper = threadIdx.x & BIT;
    float kept[COUNT > 1 ? COUNT / 2 : 1];
    if constexpr (COUNT > 1) {
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            const float given = upper ? values[i] : values[i + COUNT / 2];
            kept[i] = (upper ? values[i + COUNT / 2] : values[i]) + __shfl_xor_sync(ALL_LANES, given, BIT);
        }
    } else {
        kept[0] = values[0] + __shfl_xor_sync(ALL_LANES, values[0], BIT);
    }
    if constexpr (BIT == 1) {
        return kept[0];
    } else {
        return sum_lanes<(COUNT > 1 ? COUNT / 2 : 1), BIT / 2>(kept);
    }
}

// ---- shared memory

template <int TOKENS>
struct Fp32Memory {
    float logits[TOKENS][SLICE_EXPERTS];  // this block's part of them
    unsigned largest[TOKENS];       // magnitude in this block's columns
    float scale[TOKENS];
    SortEntries entries;
    int is_last;
    float column_logits[MAX_COLUMN_WARPS][TOKENS][SLICE_EXPERTS];
    unsigned column_largest[MAX_COLUMN_WARPS][TOKENS];
    alignas(16) float x[];  // [TOKENS][columns], then counts of sort_many_tokens
};

// ---- the kernel

template <class X, class W, int TOKENS, bool ALIGNED>
__global__ void __launch_bounds__(EXPERT_WARPS* MAX_COLUMN_WARPS* WARP) route_fp32_kernel(const __grid_constant__ Fp32Problem problem) {
    const RouteArguments& a = problem.a;
    auto& shared = *shared_memory<Fp32Memory<TOKENS>>();
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int expert_warp = warp % EXPERT_WARPS, column_warp = warp / EXPERT_WARPS;
    const int rank = int(hopper::cluster_rank());
    const int first_token = int(blockIdx.x) / FP32_RANKS * TOKENS, first_column = rank * problem.columns;
    const int columns = max(min(problem.columns, a.hidden - first_column), 0);
    const auto expert_at = [&](int slice, int i) { return slice * SLICE_EXPERTS + expert_warp * WARP_EXPERTS + i; };
    const auto router_row = [&](int expert) { return static_cast<const W*>(a.router) + int64_t(expert) * a.hidden + first_column; };
    const auto router_at = [&](int slice, int i, int chunk) {
        const int expert = expert_at(slice, i);
        return load_four<ALIGNED>(router_row(expert), chunk * FP32_CHUNK + lane * 4, expert < a.experts ? columns : 0);
    };
    hopper::launch_dependents();

    // The kernel ahead may write the router as well as x, and what it writes reaches L2
    for (int i = 0; i < WARP_EXPERTS; ++i) {
        const int expert = expert_at(blockIdx.y, i), column = column_warp * FP32_CHUNK + lane * 4;
        if (expert < a.experts && column < columns) hopper::prefetch_l2(router_row(expert) + column);
    }
    hopper::wait_for_dependencies();
    const int row_fours = problem.columns / 4;
    float4 w[WARP_EXPERTS];
#pragma unroll
    for (int i = 0; i < WARP_EXPERTS; ++i) w[i] = router_at(blockIdx.y, i, column_warp);
    for (int i = thread; i < TOKENS * row_fours; i += blockDim.x) {
        const int token = first_token + i / row_fours;
        const X* row = static_cast<const X*>(a.x) + int64_t(token) * a.hidden + first_column;
        reinterpret_cast<float4*>(shared.x)[i] = load_four<ALIGNED>(row, i % row_fours * 4, token < a.tokens ? columns : 0);
    }
    __syncthreads();

    Key best = 0;  // in warp 0: of the token first_token + rank, in the slices so far
    for (int slice = blockIdx.y; slice < problem.slices; slice += gridDim.y) {
        // Products of this warp's columns
        float sums[TOKENS * WARP_EXPERTS] = {};
        unsigned largest[TOKENS] = {};
        for (int chunk = column_warp; chunk < problem.columns / FP32_CHUNK; chunk += problem.column_warps) {
            if (slice != int(blockIdx.y) || chunk != column_warp) {
#pragma unroll
                for (int i = 0; i < WARP_EXPERTS; ++i) w[i] = router_at(slice, i, chunk);
            }
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                const float4 x = reinterpret_cast<const float4*>(shared.x)[token * row_fours + chunk * WARP + lane];
                largest[token] = max(largest[token], max(max(magnitude(x.x), magnitude(x.y)), max(magnitude(x.z), magnitude(x.w))));
#pragma unroll
                for (int i = 0; i < WARP_EXPERTS; ++i) {
                    float& sum = sums[token * WARP_EXPERTS + i];
                    sum += x.x * w[i].x;
                    sum += x.y * w[i].y;
                    sum += x.z * w[i].z;
                    sum += x.w * w[i].w;
                }
            }
        }

        // Of the block's, and of the cluster's: block `rank` takes token `rank`
        const float sum = sum_lanes(sums);
        constexpr int LANES = WARP / (TOKENS * WARP_EXPERTS);
        if (lane % LANES == 0) {
            const int value = lane / LANES;
            shared.column_logits[column_warp][value / WARP_EXPERTS][expert_warp * WARP_EXPERTS + value % WARP_EXPERTS] = sum;
        }
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            const unsigned most = __reduce_max_sync(ALL_LANES, largest[token]);
            if (expert_warp == 0 && lane == 0) shared.column_largest[column_warp][token] = most;
        }
        __syncthreads();
        if (thread < TOKENS * SLICE_EXPERTS) {
            const int token = thread / SLICE_EXPERTS, expert = thread % SLICE_EXPERTS;
            float logit = 0.0f;
            for (int i = 0; i < problem.column_warps; ++i) logit += shared.column_logits[i][token][expert];
            shared.logits[token][expert] = logit;
        }
        if (thread < TOKENS) {
            unsigned most = 0;
            for (int i = 0; i < problem.column_warps; ++i) most = max(most, shared.column_largest[i][thread]);
            shared.largest[thread] = most;
        }
        hopper::cluster_sync();
        if (warp == 0 && rank < TOKENS) {
            const int expert = slice * SLICE_EXPERTS + lane;
            Key key = 0;
            if (lane < SLICE_EXPERTS && expert < a.experts) {
                float logit = 0.0f;
                for (int from = 0; from < FP32_RANKS; ++from) logit += *hopper::remote_shared(&shared.logits[rank][lane], from);
                key = rank_key(logit, expert);
            }
            for (int bit = 1; bit < SLICE_EXPERTS; bit *= 2) key = max(key, __shfl_xor_sync(ALL_LANES, key, bit));
            best = max(best, key);
        }
        if (thread < TOKENS) {
            unsigned most = 0;
            for (int from = 0; from < FP32_RANKS; ++from) most = max(most, *hopper::remote_shared(&shared.largest[thread], from));
            shared.scale[thread] = __uint_as_float(most) / E4M3_MAX;
        }
        hopper::cluster_sync();
    }

    // FP8 codes of this block's columns; blocks of other slices take other tokens
    if (a.codes) {
        for (int i = thread; i < TOKENS * row_fours; i += blockDim.x) {
            const int token = i / row_fours, column = i % row_fours * 4;
            if (token % gridDim.y != blockIdx.y || first_token + token >= a.tokens || column >= columns) continue;
            const float scale = shared.scale[token];
            const auto code = [&](float value) { return from_float<__nv_fp8_storage_t>(divide(value, scale)); };
            const float4 x = reinterpret_cast<const float4*>(shared.x)[i];
            Four<uint8_t> codes;
            codes.values[0] = code(x.x);
            codes.values[1] = code(x.y);
            codes.values[2] = code(x.z);
            codes.values[3] = code(x.w);
            uint8_t* to = a.codes + int64_t(first_token + token) * a.hidden + first_column + column;
            if constexpr (ALIGNED) {
                *reinterpret_cast<Four<uint8_t>*>(to) = codes;
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (column + j < columns) to[j] = codes.values[j];
                }
            }
        }
        const bool owns_scale = rank == 0 && thread < TOKENS && thread % gridDim.y == blockIdx.y && first_token + thread < a.tokens;
        if (owns_scale) a.scale[first_token + thread] = shared.scale[thread];
    }

    const int token = first_token + rank;
    const bool owns_token = thread == 0 && rank < TOKENS && token < a.tokens;
    const bool few = TOKENS == 1 || a.tokens <= ROUTE_FEW_TOKENS;
    if (owns_token && few) a.best[token * gridDim.y + blockIdx.y] = best;
    if (owns_token && !few) {
        a.expert_ids[token] = expert_of(best);
        a.scores[token] = score_of(best);
    }
    if (!is_last_block(a.tickets, shared.is_last, gridDim.x * gridDim.y)) return;
    few ? sort_few_tokens(shared.entries, a, int(gridDim.y)) : sort_many_tokens(reinterpret_cast<int*>(shared.x), a);
}

// ---- launch

template <class X, class W, int TOKENS, bool ALIGNED>
void launch_fp32(const RouteArguments& a, cudaStream_t stream) {
    const int64_t groups = std::max<int64_t>(ceil_div(a.tokens, TOKENS), 1);
    const int slices = route_slices(a.experts), slices_at_once = a.tokens <= ROUTE_FEW_TOKENS ? slices : 1;
    const int columns = int(ceil_div(a.hidden, FP32_RANKS * FP32_CHUNK)) * FP32_CHUNK;
    const bool fills_gpu = groups * FP32_RANKS * slices_at_once > multiprocessors();
    const int column_warps = std::min(columns / FP32_CHUNK, fills_gpu ? 2 : MAX_COLUMN_WARPS);
    const int64_t x_bytes = int64_t(TOKENS) * columns * sizeof(float);
    const int64_t sort_bytes = a.tokens <= ROUTE_FEW_TOKENS ? 0 : count_bytes(EXPERT_WARPS * column_warps, a.experts);
    const size_t shared_bytes = sizeof(Fp32Memory<TOKENS>) + std::max(x_bytes, sort_bytes);
    dim3 grid = grid_of(groups * FP32_RANKS);
    grid.y = slices_at_once;
    const LaunchConfig config{"route_top1", grid, dim3(EXPERT_WARPS * column_warps * WARP), shared_bytes, stream, FP32_RANKS, a.dependent};
    launch(config, &route_fp32_kernel<X, W, TOKENS, ALIGNED>, Fp32Problem{a, slices, columns, column_warps});
}

}  // namespace llama4_kernels::routing
