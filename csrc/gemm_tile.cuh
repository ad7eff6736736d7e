// One output tile of weights · activationsᵀ by a warp-specialised block: CHANNELS rows of weights on wgmma's M side, which takes 64 at a
// time, and TOKENS rows of activations on its N side, which takes as few as there are. Two consumer warpgroups of SETS times 64 channels
// each, and a loader warpgroup.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "hopper/cp_async.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "issue_turns.cuh"
#include "pipeline.cuh"

namespace llama4_kernels {

// How the numbers are multiplied. fp8_scaled_steps: each 128 of K have scales of their own, of weights, activations or both.
enum class GemmKind { bf16, fp8, fp8_scaled_steps };

template <int TOKENS_, int SETS_, GemmKind KIND_>
struct GemmShape {
    static constexpr int TOKENS = TOKENS_;
    static constexpr int SETS = SETS_;
    static constexpr GemmKind KIND = KIND_;
    static constexpr bool FP8 = KIND != GemmKind::bf16;
    static constexpr int CONSUMERS = 2 * hopper::WARPGROUP;
    static constexpr int SET_CHANNELS = 64;  // of a set, on wgmma's M side
    static constexpr int WARPGROUP_CHANNELS = SETS * SET_CHANNELS;
    static constexpr int CHANNELS = 2 * WARPGROUP_CHANNELS;
    static constexpr int CLUSTER = SETS == 1 ? 1 : 2;  // blocks that share what their tiles have in common
    static constexpr int LOADERS = hopper::WARPGROUP;
    static constexpr int ROW_BYTES = 128;  // of K per stage and row, one span of the swizzle
    static constexpr int STAGE_K = FP8 ? 128 : 64;
    static constexpr int WEIGHT_BYTES = CHANNELS * ROW_BYTES;
    static constexpr int TOKEN_BYTES = TOKENS * ROW_BYTES;
    static constexpr int STAGES = TOKENS <= 16 ? 10 : TOKENS <= 64 ? 7 : SETS == 1 ? 5 : 4;
    static constexpr hopper::Swizzle SWIZZLE = hopper::Swizzle::bytes_128;
    // Steps that wgmma may add up before the sum moves to fp32 registers: its own sums of e4m3 products keep fewer bits than fp32. With two
    // sets there are registers for the sums of one of them alone, and the ring keeps the stages of a promotion until both have had them.
    static constexpr int PROMOTE_STEPS = KIND != GemmKind::fp8 ? 1 : SETS == 1 ? 4 : 2;

    static __host__ __device__ int steps(int64_t k) { return int(ceil_div(k, STAGE_K)); }
};

// This thread's accumulators of one tile, per set.
template <class Shape>
using GemmSums = float[Shape::SETS][Shape::TOKENS / 2];

// At the start of the block's shared memory: the tiles' swizzle needs them at multiples of 1024 bytes.
template <class Shape>
struct GemmStages {
    static_assert(Shape::WEIGHT_BYTES % 1024 == 0 && Shape::TOKEN_BYTES % 1024 == 0);
    uint8_t weights[Shape::STAGES][Shape::WEIGHT_BYTES];
    uint8_t tokens[Shape::STAGES][Shape::TOKEN_BYTES];
    float token_scales[Shape::STAGES][Shape::FP8 ? Shape::TOKENS : 1];  // of the step; or of the tile, beside its last step
    Pipeline<Shape::STAGES> pipeline;
};

// This thread's share of a tile of gathered activation rows: every LOADERS / 8-th row, one 16-byte chunk of each.
template <class Shape>
class RowGather {
public:
    // Row i of the tile is row rows[first + i] of `activations` [·, row_bytes]; rows from `end` on are zeros, and not read.
    __device__ RowGather(const uint8_t* activations, int64_t row_bytes, const int* rows, int first, int end) : row_bytes_(row_bytes) {
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const int row = row_of(i);
            const bool exists = row < Shape::TOKENS && first + row < end;
            from_[i] = exists ? activations + int64_t(rows[first + row]) * row_bytes : nullptr;
        }
    }

    __device__ void copy(uint8_t* tile, int step) const {
        const int byte = threadIdx.x % CHUNKS * 16;
        const int64_t at = int64_t(step) * Shape::ROW_BYTES + byte;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            if (row_of(i) >= Shape::TOKENS) continue;
            const bool valid = from_[i] != nullptr && at < row_bytes_;
            hopper::cp_async_16(tile + hopper::swizzled(Shape::SWIZZLE, row_of(i) * Shape::ROW_BYTES + byte),
                                valid ? from_[i] + at : nullptr, valid);
        }
    }

private:
    static constexpr int CHUNKS = Shape::ROW_BYTES / 16;
    static constexpr int ROWS_AT_ONCE = Shape::LOADERS / CHUNKS;
    static constexpr int SHARE = ceil_div(Shape::TOKENS, ROWS_AT_ONCE);

    static __device__ int row_of(int i) { return int(threadIdx.x) % Shape::LOADERS / CHUNKS + i * ROWS_AT_ONCE; }

    int64_t row_bytes_;
    const uint8_t* from_[SHARE];
};

// The products of one stage's operands, from their descriptors, added to `sums` or, for the first, put there.
template <class Shape>
__device__ inline void multiply_stage(uint64_t weights, uint64_t tokens, float (&sums)[Shape::TOKENS / 2], bool accumulate) {
#pragma unroll
    for (int byte = 0; byte < Shape::ROW_BYTES; byte += 32) {
        const uint64_t a = hopper::advanced(weights, byte), b = hopper::advanced(tokens, byte);
        if constexpr (Shape::FP8) {
            hopper::wgmma_e4m3<Shape::TOKENS>(sums, a, b, accumulate || byte > 0);
        } else {
            hopper::wgmma_bf16<Shape::TOKENS>(sums, a, b, accumulate || byte > 0);
        }
    }
}

// A consumer warpgroup's view of the stages: it multiplies its sets of 64 channels, which follow one another, and hands stages back.
// GATHERED: tokens come by cp.async.
template <class Shape, bool GATHERED>
class GemmConsumer {
public:
    using Position = PipelinePosition<Shape::STAGES>;

    // warpgroup: which WARPGROUP_CHANNELS of the tile's channels are the caller's.
    __device__ GemmConsumer(GemmStages<Shape>& stages, int warpgroup)
        : stages_(stages), first_byte_(warpgroup * Shape::WARPGROUP_CHANNELS * Shape::ROW_BYTES), turns_(warpgroup) {}

    // The stage that the next sum begins with, once it is full.
    __device__ int first_stage() {
        stages_.pipeline.wait_until_full(at_);
        return at_.stage;
    }

    // The sum over `steps` stages, at least one, for every 8 tokens 4 of this thread's accumulators (hopper::accumulator_row is the channel
    // of the set, …_column the token). weight_scale(step): this warpgroup's factor for the step, with GemmKind::fp8_scaled_steps. The last
    // stage is the caller's until it calls hand_back.
    template <class WeightScale>
    __device__ void sum(int steps, GemmSums<Shape>& total, WeightScale weight_scale) {
        if constexpr (Shape::KIND == GemmKind::bf16) {
            sum_all(steps, total);
        } else {
#pragma unroll
            for (int i = 0; i < Shape::SETS * VALUES; ++i) total[i / VALUES][i % VALUES] = 0.0f;
            if constexpr (Shape::KIND == GemmKind::fp8) {
                for (; steps >= Shape::PROMOTE_STEPS; steps -= Shape::PROMOTE_STEPS) {
                    add_run<Shape::PROMOTE_STEPS>(steps > Shape::PROMOTE_STEPS, total);
                }
                for (; steps > 0; --steps) add_run<1>(steps > 1, total);
            } else {
                for (int step = 0; step < steps; ++step) add_step(weight_scale, step, step + 1 < steps, total);
            }
        }
    }

    // The scales of the tile's tokens, while the last stage is the caller's; GemmKind::fp8.
    __device__ const float* token_scales() const { return stages_.token_scales[last_.stage]; }

    // By all lanes, after each sum: the last stage.
    __device__ void hand_back() {
        __syncwarp();
        release(last_);
    }

    // After the last sum.
    __device__ void finish() { turns_.finish(); }

private:
    static constexpr int VALUES = Shape::TOKENS / 2;

    // Behind the wait this thread sees what was copied, and its wgmma what came by TMA; for what came by cp.async wgmma needs the fence.
    __device__ void wait_for_operands(Position at) {
        stages_.pipeline.wait_until_full(at);
        if (GATHERED) hopper::fence_async_proxy();
    }

    // All sets in wgmma's own accumulators; one product group stays under way while the stage before it is handed back.
    __device__ void sum_all(int steps, GemmSums<Shape>& sums) {
        for (int step = 0; step < steps; ++step) {
            wait_for_operands(at_);
            hopper::wgmma_fence();
#pragma unroll
            for (int set = 0; set < Shape::SETS; ++set) multiply(at_, set, sums[set], step > 0);
            hopper::wgmma_commit();
            if (step > 0) {
                hopper::wgmma_wait<1>();
                release(last_);
            }
            last_ = at_;
            at_.advance();
        }
        hopper::wgmma_wait<0>();
    }

    // STEPS stages, set by set. more: whether stages follow.
    template <int STEPS>
    __device__ void add_run(bool more, GemmSums<Shape>& total) {
        Position at[STEPS];
#pragma unroll
        for (Position& position : at) {
            position = at_;
            at_.advance();
        }
        last_ = at[STEPS - 1];
#pragma unroll
        for (int set = 0; set < Shape::SETS; ++set) {
            float sums[VALUES];
            if (set == 0) wait_for_operands(at[0]);  // before the turn, in which the other warpgroup may not issue
            turns_.take();
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                if (set == 0 && step > 0) wait_for_operands(at[step]);
                hopper::wgmma_fence();
                multiply(at[step], set, sums, step > 0);
                hopper::wgmma_commit();
                if (Shape::SETS == 1 && step > 0) {
                    hopper::wgmma_wait<1>();
                    release(at[step - 1]);
                }
            }
            turns_.pass();
            if (set == 1) {
                hopper::wgmma_wait<STEPS - 1>();
                if (STEPS == 2) release(at[0]);
            }
            hopper::wgmma_wait<0>();
            if (more && set == Shape::SETS - 1) release(last_);
#pragma unroll
            for (int i = 0; i < VALUES; ++i) total[set][i] += sums[i];
        }
    }

    // One stage with scales of its own, set by set.
    template <class WeightScale>
    __device__ void add_step(WeightScale weight_scale, int step, bool more, GemmSums<Shape>& total) {
        float sums[VALUES];
        last_ = at_;
        at_.advance();
        wait_for_operands(last_);
        const float scale = weight_scale(step);  // behind the fence, which would wait for it
#pragma unroll
        for (int set = 0; set < Shape::SETS; ++set) {
            turns_.take();
            hopper::wgmma_fence();
            multiply(last_, set, sums, false);
            hopper::wgmma_commit();
            turns_.pass();
            hopper::wgmma_wait<0>();
            add_scaled(scale, sums, total[set]);
        }
        if (more) hand_back();
    }

    __device__ void add_scaled(float weight_scale, const float (&sums)[VALUES], float (&total)[VALUES]) {
        const float* scales = stages_.token_scales[last_.stage] + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < Shape::TOKENS / 8; ++i) {
            const float2 scale = *reinterpret_cast<const float2*>(scales + i * 8);
            total[i * 4] += sums[i * 4] * (weight_scale * scale.x);
            total[i * 4 + 1] += sums[i * 4 + 1] * (weight_scale * scale.y);
            total[i * 4 + 2] += sums[i * 4 + 2] * (weight_scale * scale.x);
            total[i * 4 + 3] += sums[i * 4 + 3] * (weight_scale * scale.y);
        }
    }

    // Between wgmma_fence and wgmma_commit.
    __device__ void multiply(Position at, int set, float (&sums)[VALUES], bool accumulate) {
        const uint64_t weights = hopper::k_major(stages_.weights[at.stage] + first_byte_, Shape::SWIZZLE);
        const uint64_t tokens = hopper::k_major(stages_.tokens[at.stage], Shape::SWIZZLE);
        multiply_stage<Shape>(hopper::advanced(weights, set * Shape::SET_CHANNELS * Shape::ROW_BYTES), tokens, sums, accumulate);
    }

    // Each warp for itself, since a wait for wgmma says nothing of the other warps' share; to every block that may write to the stage.
    __device__ void release(Position at) {
        const unsigned lane = threadIdx.x % hopper::WARP;
        if constexpr (Shape::CLUSTER > 1) {
            if (lane < Shape::CLUSTER) stages_.pipeline.empty[at.stage].arrive_remote(lane);
        } else {
            if (lane == 0) stages_.pipeline.empty[at.stage].arrive();
        }
    }

    GemmStages<Shape>& stages_;
    int first_byte_;
    Position at_, last_;
    IssueTurns<Shape::KIND != GemmKind::bf16 && Shape::SETS == 2> turns_;
};

}  // namespace llama4_kernels
