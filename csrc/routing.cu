// route_top1: clusters of 8 blocks. Each block holds its eighth of the columns of a few tokens in shared memory, multiplies them with a slice
// of 16 experts, and reads the others' sums through distributed shared memory. The last block of the grid to finish sorts the tokens. Sums
// have one fixed order, the same for every expert, so that equal experts tie exactly.

#include "routing.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "device.h"
#include "hopper/cluster.cuh"
#include "hopper/dependent_launch.cuh"
#include "hopper/layout.cuh"
#include "hopper/memory.cuh"

namespace llama4_kernels {
namespace {

using hopper::WARP;

using Key = unsigned long long;

constexpr float E4M3_MAX = 448.0f;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int RANKS = 8;  // blocks of a cluster
constexpr int EXPERTS = 16;
constexpr int WARP_EXPERTS = 4;
constexpr int EXPERT_WARPS = EXPERTS / WARP_EXPERTS;
constexpr int MAX_COLUMN_WARPS = 5;
constexpr int CHUNK = 4 * WARP;  // columns that a warp takes at a time
constexpr int IDS_AT_ONCE = 8;  // that a thread asks L2 for

struct Problem {
    RouteArguments a;
    int slices;
    int columns;       // of a block, a multiple of CHUNK
    int column_warps;  // that share a block's columns, for each of EXPERT_WARPS
};

// ---- numbers

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

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

// The order of integers is that of the floats, infinity above them and NaN on top.
__device__ inline unsigned magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// Its order is that of the logits, NaN on top; among equal ones the lowest expert's is the largest. 0 is below all of them.
__device__ inline Key rank_key(float logit, int expert) {
    const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
    const unsigned ordered = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    return Key(ordered) << 32 | (~0u - unsigned(expert));
}

__device__ inline int expert_of(Key key) { return int(~0u - unsigned(key)); }

__device__ inline float score_of(Key key) {
    const unsigned ordered = unsigned(key >> 32);
    const float logit = __uint_as_float(ordered == ~0u ? 0x7fffffffu : ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
    return 1.0f / (1.0f + expf(-logit));
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
struct SharedMemory {
    float logits[TOKENS][EXPERTS];  // this block's part of them
    unsigned largest[TOKENS];       // magnitude in this block's columns
    float scale[TOKENS];
    int ids[ROUTE_FEW_TOKENS];
    int is_last;
    float column_logits[MAX_COLUMN_WARPS][TOKENS][EXPERTS];
    unsigned column_largest[MAX_COLUMN_WARPS][TOKENS];
    alignas(16) float x[];  // [TOKENS][columns], then counts of sort_many_tokens
};

// ---- the last block: all tokens' experts are known

template <int TOKENS>
__device__ void sort_few_tokens(SharedMemory<TOKENS>& shared, const RouteArguments& a, int slices) {
    int(&ids)[ROUTE_FEW_TOKENS] = shared.ids;
    const int thread = threadIdx.x;
    if (thread < a.tokens) {
        Key best = 0;
        for (int slice = 0; slice < slices; ++slice) best = max(best, __ldcg(a.best + thread * slices + slice));
        ids[thread] = expert_of(best);
        a.expert_ids[thread] = expert_of(best);
        a.scores[thread] = score_of(best);
    }
    __syncthreads();
    for (int expert = thread; expert <= a.experts; expert += blockDim.x) {
        int lower = 0;
        for (int token = 0; token < a.tokens; ++token) lower += ids[token] < expert;
        a.offsets[expert] = lower;
    }
    if (thread < a.tokens) {
        int ahead = 0;
        for (int token = 0; token < a.tokens; ++token) ahead += ids[token] < ids[thread] || (ids[token] == ids[thread] && token < thread);
        a.order[ahead] = thread;
    }
}

constexpr int64_t count_bytes(int warps, int experts) { return int64_t(warps + 1) * (experts + 1) * sizeof(int); }

// A counting sort. Each warp takes a range of the tokens twice: to count them by expert, and to place them.
template <int TOKENS>
__device__ void sort_many_tokens(SharedMemory<TOKENS>& shared, const RouteArguments& a) {
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, warps = blockDim.x / WARP;
    const int range = (a.tokens + warps * WARP - 1) / (warps * WARP) * WARP, begin = warp * range, end = min(begin + range, a.tokens);
    const int bins = a.experts + 1;                        // one for lanes without a token
    int* const counts = reinterpret_cast<int*>(shared.x);  // [warps][bins], then the warp's next place for each expert
    int* const starts = counts + warps * bins;             // [bins]
    int* const own = counts + warp * bins;
    const auto walk = [&](int* order) {
        for (int start = begin; start < end; start += IDS_AT_ONCE * WARP) {
            int ids[IDS_AT_ONCE];
#pragma unroll
            for (int i = 0; i < IDS_AT_ONCE; ++i) {
                const int token = start + i * WARP + lane;
                ids[i] = token < end ? __ldcg(a.expert_ids + token) : a.experts;
            }
#pragma unroll
            for (int i = 0; i < IDS_AT_ONCE; ++i) {
                const unsigned peers = __match_any_sync(ALL_LANES, ids[i]);
                const int ahead = __popc(peers & ((1u << lane) - 1)), place = own[ids[i]] + ahead;
                __syncwarp();
                if (ahead == 0) own[ids[i]] = place + __popc(peers);
                __syncwarp();
                if (order && ids[i] < a.experts) order[place] = start + i * WARP + lane;
            }
        }
    };

    for (int i = thread; i < warps * bins; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    walk(nullptr);
    __syncthreads();
    for (int expert = thread; expert < bins; expert += blockDim.x) {
        int sum = 0;
        for (int i = 0; i < warps; ++i) sum += counts[i * bins + expert];
        starts[expert] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        int lower = 0;
        for (int first = 0; first < bins; first += WARP) {
            const int expert = first + lane, count = expert < bins ? starts[expert] : 0;
            int sum = count;
            for (int by = 1; by < WARP; by *= 2) {
                const int below = __shfl_up_sync(ALL_LANES, sum, by);
                if (lane >= by) sum += below;
            }
            if (expert < bins) a.offsets[expert] = starts[expert] = lower + sum - count;
            lower += __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
    }
    __syncthreads();
    for (int expert = thread; expert < bins; expert += blockDim.x) {
        int place = starts[expert];
        for (int i = 0; i < warps; ++i) {
            const int count = counts[i * bins + expert];
            counts[i * bins + expert] = place;
            place += count;
        }
    }
    __syncthreads();
    walk(a.order);
}

// ---- the kernel

template <class X, class W, int TOKENS, bool ALIGNED>
__global__ void __launch_bounds__(EXPERT_WARPS* MAX_COLUMN_WARPS* WARP) route_kernel(const __grid_constant__ Problem problem) {
    const RouteArguments& a = problem.a;
    auto& shared = *shared_memory<SharedMemory<TOKENS>>();
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int expert_warp = warp % EXPERT_WARPS, column_warp = warp / EXPERT_WARPS;
    const int rank = int(hopper::cluster_rank());
    const int first_token = int(blockIdx.x) / RANKS * TOKENS, first_column = rank * problem.columns;
    const int columns = max(min(problem.columns, a.hidden - first_column), 0);
    const auto router_at = [&](int slice, int i, int chunk) {
        const int expert = slice * EXPERTS + expert_warp * WARP_EXPERTS + i;
        const W* row = static_cast<const W*>(a.router) + int64_t(expert) * a.hidden + first_column;
        return load_four<ALIGNED>(row, chunk * CHUNK + lane * 4, expert < a.experts ? columns : 0);
    };
    hopper::launch_dependents();

    // The router does not depend on the kernel ahead, x does
    float4 w[WARP_EXPERTS];
#pragma unroll
    for (int i = 0; i < WARP_EXPERTS; ++i) w[i] = router_at(blockIdx.y, i, column_warp);
    hopper::wait_for_dependencies();
    const int row_fours = problem.columns / 4;
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
        for (int chunk = column_warp; chunk < problem.columns / CHUNK; chunk += problem.column_warps) {
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
        if (thread < TOKENS * EXPERTS) {
            const int token = thread / EXPERTS, expert = thread % EXPERTS;
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
            const int expert = slice * EXPERTS + lane;
            Key key = 0;
            if (lane < EXPERTS && expert < a.experts) {
                float logit = 0.0f;
                for (int from = 0; from < RANKS; ++from) logit += *hopper::remote_shared(&shared.logits[rank][lane], from);
                key = rank_key(logit, expert);
            }
            for (int bit = 1; bit < EXPERTS; bit *= 2) key = max(key, __shfl_xor_sync(ALL_LANES, key, bit));
            best = max(best, key);
        }
        if (thread < TOKENS) {
            unsigned most = 0;
            for (int from = 0; from < RANKS; ++from) most = max(most, *hopper::remote_shared(&shared.largest[thread], from));
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
            const auto scaled = [&](float value) { return scale == 0.0f ? 0.0f : value / scale; };
            const float4 x = reinterpret_cast<const float4*>(shared.x)[i];
            Four<uint8_t> codes;
            codes.values[0] = __nv_cvt_float_to_fp8(scaled(x.x), __NV_SATFINITE, __NV_E4M3);
            codes.values[1] = __nv_cvt_float_to_fp8(scaled(x.y), __NV_SATFINITE, __NV_E4M3);
            codes.values[2] = __nv_cvt_float_to_fp8(scaled(x.z), __NV_SATFINITE, __NV_E4M3);
            codes.values[3] = __nv_cvt_float_to_fp8(scaled(x.w), __NV_SATFINITE, __NV_E4M3);
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
    if (thread == 0) {
        shared.is_last = hopper::add_acquire_release(a.tickets, 1) == gridDim.x * gridDim.y - 1;
        if (shared.is_last) *a.tickets = 0;
    }
    __syncthreads();
    if (!shared.is_last) return;
    few ? sort_few_tokens(shared, a, int(gridDim.y)) : sort_many_tokens(shared, a);
}

// ---- launch

template <class X, class W, int TOKENS, bool ALIGNED>
void launch_route(const RouteArguments& a, cudaStream_t stream) {
    const int64_t groups = std::max<int64_t>(ceil_div(a.tokens, TOKENS), 1);
    const int slices = route_slices(a.experts), slices_at_once = a.tokens <= ROUTE_FEW_TOKENS ? slices : 1;
    const int columns = int(ceil_div(a.hidden, RANKS * CHUNK)) * CHUNK;
    const bool fills_gpu = groups * RANKS * slices_at_once > multiprocessors();
    const int column_warps = std::min(columns / CHUNK, fills_gpu ? 2 : MAX_COLUMN_WARPS);
    const int64_t x_bytes = int64_t(TOKENS) * columns * sizeof(float);
    const int64_t sort_bytes = a.tokens <= ROUTE_FEW_TOKENS ? 0 : count_bytes(EXPERT_WARPS * column_warps, a.experts);
    const size_t shared_bytes = sizeof(SharedMemory<TOKENS>) + std::max(x_bytes, sort_bytes);
    dim3 grid = grid_of(groups * RANKS);
    grid.y = slices_at_once;
    const LaunchConfig config{"route_top1", grid, dim3(EXPERT_WARPS * column_warps * WARP), shared_bytes, stream, RANKS, a.dependent};
    launch(config, &route_kernel<X, W, TOKENS, ALIGNED>, Problem{a, slices, columns, column_warps});
}

template <class X, class W>
void launch_types(const RouteArguments& a, cudaStream_t stream) {
    const bool rows_aligned = a.hidden % 4 == 0 && is_aligned(a.x, sizeof(Four<X>)) && is_aligned(a.router, sizeof(Four<W>));
    const bool aligned = rows_aligned && is_aligned(a.codes, sizeof(Four<uint8_t>));
    if (a.tokens <= 1) return aligned ? launch_route<X, W, 1, true>(a, stream) : launch_route<X, W, 1, false>(a, stream);
    aligned ? launch_route<X, W, 8, true>(a, stream) : launch_route<X, W, 8, false>(a, stream);
}

template <class X>
void launch_x(const RouteArguments& a, cudaStream_t stream) {
    a.router_dtype == Dtype::bfloat16 ? launch_types<X, __nv_bfloat16>(a, stream) : launch_types<X, float>(a, stream);
}

}  // namespace

int route_slices(int experts) { return int(ceil_div(experts, EXPERTS)); }

void route_top1(const RouteArguments& a, cudaStream_t stream) {
    a.x_dtype == Dtype::bfloat16 ? launch_x<__nv_bfloat16>(a, stream) : launch_x<float>(a, stream);
}

}  // namespace llama4_kernels
