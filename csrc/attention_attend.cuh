// What the attending warpgroups of chunked_attention do with an item's tiles: products, softmax, and the combination of what splits leave.
#pragma once

#include "attention.h"
#include "attention_draws.cuh"
#include "attention_item.cuh"
#include "attention_load.cuh"
#include "attention_schedule.cuh"
#include "attention_workspace.cuh"
#include "floats.cuh"
#include "hopper/math.cuh"
#include "hopper/wgmma.cuh"
#include "issue_turns.cuh"
#include "tickets.cuh"
#include "warp.cuh"

namespace llama4_kernels {

using hopper::Swizzle;

constexpr int ATTENDING = 2;  // warpgroups
constexpr int THREADS = (1 + ATTENDING) * WARPGROUP;
constexpr int LOAD_REGISTERS = 72;
constexpr int ATTEND_REGISTERS = 216;
constexpr int ROWS = 64;  // of a warpgroup
constexpr bool TAKE_TURNS = true;  // in items of many queries: one attending warpgroup begins its products, then the other
constexpr float LOG2_E = 1.44269504088896f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float SMALLEST = std::numeric_limits<float>::min();

static_assert(ATTENTION_FEW_PARTS == ATTENDING && ATTENTION_MANY_ROWS == ATTENDING * ROWS && ATTENTION_FEW_ROWS == ROWS);

// ---- shared memory

template <int HEAD_DIM>
struct alignas(1024) SharedMemory {
    uint8_t q[ATTENDING][ROWS * HEAD_DIM * 2];  // [HEAD_DIM / 64][ROWS][64] bfloat16; the output passes through it too
    uint8_t k[ATTENTION_STAGES][Ring<HEAD_DIM>::TILE_BYTES];
    uint8_t v[ATTENTION_STAGES][Ring<HEAD_DIM>::TILE_BYTES];
    hopper::Barrier k_full[ATTENTION_STAGES], k_empty[ATTENTION_STAGES], v_full[ATTENTION_STAGES], v_empty[ATTENTION_STAGES];
    alignas(4) uint8_t k_gathered[ATTENTION_STAGES][ATTENTION_LOAD_WARPS], v_gathered[ATTENTION_STAGES][ATTENTION_LOAD_WARPS];
    DrawnItems drawn;
    Item items[ATTENDING];  // of each warpgroup, kept here while it needs its registers
    int first_seen[ATTENDING][ROWS], position[ATTENDING][ROWS];  // the keys that a row sees
    int is_last;  // whether this block's run of splits is the last of all to be done
    float scale;            // of scores in logarithms of base 2
    float v_scale;
    Run runs[ATTENTION_MAX_RUN];  // as they are weighed before the first item
    ScheduleEntry entries[1];     // [requests], and then the loading warps' codes, to the end of the shared memory
};

// Where in the shared memory the codes begin.
template <int HEAD_DIM>
__host__ __device__ constexpr size_t codes_start(int requests) {
    return (sizeof(SharedMemory<HEAD_DIM>) + requests * sizeof(ScheduleEntry) + 15) / 16 * 16;
}

// ---- barriers: 0 is __syncthreads, 1 and 2 those of a warpgroup, 3 and 4 IssueTurns'

constexpr int BOTH_ATTENDING = 5;

__device__ inline void sync_warpgroup(int warpgroup) { hopper::named_barrier_sync(1 + warpgroup, WARPGROUP); }

// ---- rows

// Where a row's dims 8 · chunk to 8 · chunk + 7 begin in a warpgroup's q, in bytes.
__device__ inline uint32_t chunk_in_q(int row, int chunk) {
    return chunk / 8 * (ROWS * ATTENTION_SPAN) + hopper::swizzled(Swizzle::bytes_128, uint32_t(row * ATTENTION_SPAN + chunk % 8 * 16));
}

// ---- attending

// A thread of an attending warpgroup. Of scores, weights and output it holds what wgmma's layout gives it: parts of two rows, 8 apart.
template <int HEAD_DIM, class Element>
class Attend {
public:
    __device__ Attend(const AttentionArguments& a, SharedMemory<HEAD_DIM>& shared, const Ring<HEAD_DIM>& k, const Ring<HEAD_DIM>& v)
        : a(a), shared(shared), k(k), v(v) {}

    // After the last item.
    __device__ void finish() { turns.finish(); }

    __device__ void attend(const Item& item, int& count) {
        load_q(item);
        set_rows(item);
        const Item& kept = shared.items[warpgroup];
        if (kept.few) {
            attend_splits(kept, count);
        } else {
            begin_rows();
            attend_all(count, kept.keys.first_tile, kept.keys.tiles);
            kept.splits > 1 ? leave_part(kept, kept.first_split) : write_output(kept);
        }
        if (kept.few || kept.splits > 1) finish_run(kept);
        count += kept.keys.tiles;
    }

private:
    const AttentionArguments& a;
    SharedMemory<HEAD_DIM>& shared;
    const Ring<HEAD_DIM>&k, &v;
    const int warpgroup = threadIdx.x / WARPGROUP - 1;
    IssueTurns<TAKE_TURNS> turns{warpgroup};
    const int thread = threadIdx.x % WARPGROUP;
    const int lane = threadIdx.x % WARP;

    float scores[ATTENTION_TILE / 2];
    uint32_t weights[ATTENTION_TILE / 16][4];
    float output[HEAD_DIM / 2];
    float maximum[2], total[2], correction[2];
    int seen_by_all_from, seen_by_all_to;  // keys that all rows of the warpgroup see

    // Rows past the item's are zeros.
    __device__ void load_q(const Item& item) {
        constexpr int CHUNKS = HEAD_DIM / 8;
        sync_warpgroup(warpgroup);  // until the item before has left
        if (thread == 0) shared.items[warpgroup] = item;
        const int first = item.few ? 0 : warpgroup * ROWS;
#pragma unroll
        for (int i = thread; i < ROWS * CHUNKS; i += WARPGROUP) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            uint4 values{0, 0, 0, 0};
            if (first + row < item.rows) {
                const int64_t element = row_start(a, item, item.first_row + first + row) + chunk * 8;
                values = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(a.q) + element);
            }
            *reinterpret_cast<uint4*>(shared.q[warpgroup] + chunk_in_q(row, chunk)) = values;
        }
        hopper::fence_async_proxy();
        sync_warpgroup(warpgroup);
    }

    __device__ void set_rows(const Item& item) {
        const int first = item.few ? 0 : warpgroup * ROWS;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = hopper::accumulator_row(thread, 2 * r), position = position_of(a, item, first + row);
            shared.position[warpgroup][row] = position;  // by each of its four threads, for itself
            shared.first_seen[warpgroup][row] = chunk_start(position, a.chunk_size);
        }
        seen_by_all_from = chunk_start(position_of(a, item, first + ROWS - 1), a.chunk_size);
        seen_by_all_to = position_of(a, item, first) + 1;
    }

    __device__ void begin_rows() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            maximum[r] = -INFINITE;
            total[r] = 0.0f;
        }
#pragma unroll
        for (float& element : output) element = 0.0f;
    }

    // The tensor cores compute a tile's scores, then multiply the weights of the tile before with V. Beside these products runs the softmax
    // of the new scores. v.wait_full behind it waits for nothing: it keeps ptxas from moving the wait for the products above the softmax.
    __device__ void attend_all(int count, int first_tile, int tiles) {
        wait_for_operand(k, count);
        begin_scores(count);
        hopper::wgmma_wait<0>();
        release<1>(k.empty, count);
        softmax(first_tile);
        pack_weights();
        for (const int last = count + tiles - 1; count < last; ++count) {
            wait_for_operand(k, count + 1);  // before the turn, in which the other warpgroup may not issue
            turns.take();
            begin_scores(count + 1);
            begin_output(count);
            turns.pass();
            hopper::wgmma_wait<1>();
            release<1>(k.empty, count + 1);
            softmax(++first_tile);
            v.wait_full(count);
            hopper::wgmma_wait<0>();
            release<1>(v.empty, count);
            correct_output();
            pack_weights();
        }
        begin_output(count);
        hopper::wgmma_wait<0>();
        release<1>(v.empty, count);
    }

    // Each warpgroup visits every other tile, and gives it back for both: neither waits for the other before the run ends. A tile of V is
    // given back before the next K is waited for, so that the loading warps have both under way.
    __device__ void attend_splits(const Item& item, int count) {
        for (int start = 0; start < item.keys.tiles; start += item.split_tiles) {
            begin_rows();
            const int end = min(start + item.split_tiles, item.keys.tiles);
            for (int tile = start + warpgroup; tile < end; tile += ATTENDING) {
                wait_for_operand(k, count + tile);
                begin_scores(count + tile);
                hopper::wgmma_wait<0>();
                release<ATTENDING>(k.empty, count + tile);
                softmax(item.keys.first_tile + tile);
                correct_output();
                pack_weights();
                begin_output(count + tile);
                hopper::wgmma_wait<0>();
                release<ATTENDING>(v.empty, count + tile);
            }
            leave_part(item, item.first_split + start / item.split_tiles);
        }
    }

    // Give a tile back to the loaders, for so many warpgroups.
    template <int WARPGROUPS>
    __device__ void release(hopper::Barrier* empty, int count) const {
        if (lane < WARPGROUPS) empty[count % ATTENTION_STAGES].arrive();
    }

    // Behind the wait this thread sees what load warps brought, and its wgmma what came by TMA; for anything else wgmma needs the fence.
    __device__ void wait_for_operand(const Ring<HEAD_DIM>& ring, int count) const {
        ring.wait_full(count);
        if (Loader<HEAD_DIM, Element>::IS_FP8 || ring.is_gathered(count)) hopper::fence_async_proxy();
    }

    // scores = Q · Kᵀ, of a tile that wait_for_operand has waited for
    __device__ void begin_scores(int count) {
        constexpr int STEPS = ATTENTION_SPAN / 32;
        hopper::wgmma_fence();
#pragma unroll
        for (int half = 0; half < HEAD_DIM / 64; ++half) {
            const uint64_t q_half = hopper::k_major(shared.q[warpgroup] + half * ROWS * ATTENTION_SPAN, Swizzle::bytes_128);
            const uint64_t k_half = hopper::k_major(k.tile(count) + half * Ring<HEAD_DIM>::HALF_BYTES, Swizzle::bytes_128);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const uint64_t q_step = hopper::advanced(q_half, step * 32);
                const uint64_t k_step = hopper::advanced(k_half, step * 32);
                hopper::wgmma_bf16<ATTENTION_TILE>(scores, q_step, k_step, half > 0 || step > 0);
            }
        }
        hopper::wgmma_commit();
    }

    // output += weights · V
    __device__ void begin_output(int count) {
        wait_for_operand(v, count);
        hopper::wgmma_fence();
        const uint64_t keys = hopper::mn_major(v.tile(count), Swizzle::bytes_128, Ring<HEAD_DIM>::HALF_BYTES);
#pragma unroll
        for (int step = 0; step < ATTENTION_TILE / 16; ++step) {
            const uint64_t v_step = hopper::advanced(keys, step * 16 * ATTENTION_SPAN);
            hopper::wgmma_bf16<HEAD_DIM, hopper::Major::mn>(output, weights[step], v_step, true);
        }
        hopper::wgmma_commit();
    }

    // scores become weights, not yet divided by their sum; `correction` is for what was summed up before. Rows that have seen no key yet
    // stay at −∞.
    __device__ void softmax(int tile) {
        const int start = tile * ATTENTION_TILE;
        if (start < seen_by_all_from || start + ATTENTION_TILE > seen_by_all_to) mask(start);
        const float scale = shared.scale;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = maximum[r];
#pragma unroll
            for (int i = 0; i < ATTENTION_TILE / 2; ++i) {
                if (i / 2 % 2 == r) highest = fmaxf(highest, scores[i]);
            }
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2));
            const float reference = highest == -INFINITE ? 0.0f : highest * scale;
            correction[r] = hopper::exp2_approximate(fmaf(maximum[r], scale, -reference));
            maximum[r] = highest;
            total[r] *= correction[r];
#pragma unroll
            for (int i = 0; i < ATTENTION_TILE / 2; ++i) {
                if (i / 2 % 2 != r) continue;
                scores[i] = hopper::exp2_approximate(fmaf(scores[i], scale, -reference));
                total[r] += scores[i];
            }
        }
    }

    __device__ void mask(int start) {
        int first_seen[2], position[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            first_seen[r] = shared.first_seen[warpgroup][hopper::accumulator_row(thread, 2 * r)];
            position[r] = shared.position[warpgroup][hopper::accumulator_row(thread, 2 * r)];
        }
#pragma unroll
        for (int i = 0; i < ATTENTION_TILE / 2; ++i) {
            const int key = start + hopper::accumulator_column(thread, i), r = i / 2 % 2;
            if (key < first_seen[r] || key > position[r]) scores[i] = -INFINITE;
        }
    }

    __device__ void correct_output() {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= correction[i / 2 % 2];
    }

    // An accumulator's layout is that of an operand in registers.
    __device__ void pack_weights() {
#pragma unroll
        for (int i = 0; i < ATTENTION_TILE / 4; ++i) weights[i / 4][i % 4] = bfloat16_pair(scores[2 * i], scores[2 * i + 1]);
    }

    __device__ void divide_output() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
            correction[r] = shared.v_scale / total[r];
        }
        correct_output();
    }

    // Through shared memory, where q is no longer needed, so that each row is written in whole chunks.
    __device__ void write_output(const Item& item) {
        constexpr int CHUNKS = HEAD_DIM / 8;
        divide_output();
        sync_warpgroup(warpgroup);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i += 2) {
            const int row = hopper::accumulator_row(thread, i), column = hopper::accumulator_column(thread, i);
            uint8_t* to = shared.q[warpgroup] + chunk_in_q(row, column / 8) + column % 8 * 2;
            *reinterpret_cast<uint32_t*>(to) = bfloat16_pair(output[i], output[i + 1]);
        }
        sync_warpgroup(warpgroup);
        const int first = warpgroup * ROWS;
        for (int i = thread; i < ROWS * CHUNKS; i += WARPGROUP) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            if (first + row >= item.rows) continue;
            const int64_t element = row_start(a, item, item.first_row + first + row) + chunk * 8;
            const uint4 values = *reinterpret_cast<const uint4*>(shared.q[warpgroup] + chunk_in_q(row, chunk));
            *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(a.out) + element) = values;
        }
    }

    // ---- splits

    __device__ void leave_part(const Item& item, int split) {
        divide_output();
        const Parts parts(a, item);
        const int part = item.few ? split * ATTENTION_FEW_PARTS + warpgroup : split, first = item.few ? 0 : warpgroup * ROWS;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first + hopper::accumulator_row(thread, 2 * r);
            if (row >= item.rows) continue;
            const int64_t at = parts.start(a, item, row) + part;
            if (thread % 4 == 0) parts.lse[at] = maximum[r] * shared.scale + log2f(total[r]);
            float* to = parts.partial + at * HEAD_DIM;
#pragma unroll
            for (int i = 2 * r; i < HEAD_DIM / 2; i += 4) {
                *reinterpret_cast<float2*>(to + hopper::accumulator_column(thread, i)) = make_float2(output[i], output[i + 1]);
            }
        }
    }

    __device__ void finish_run(const Item& item) {
        hopper::named_barrier_sync(BOTH_ATTENDING, ATTENDING * WARPGROUP);
        if (threadIdx.x == WARPGROUP) shared.is_last = is_last_ticket(ticket_of(a, item), item.runs);
        hopper::named_barrier_sync(BOTH_ATTENDING, ATTENDING * WARPGROUP);
        if (shared.is_last) combine(item);
    }

    // Each row's parts are added up in order, weighted by their softmax sums, with many reads under way at once. A part whose lse is −∞ has
    // seen no key and holds NaN; its weight is 0, and it is left out.
    __device__ void combine(const Item& item) const {
        constexpr int DIMS = 4;                           // of a lane
        constexpr int TOGETHER = WARP * DIMS / HEAD_DIM;  // parts that a warp reads at once
        constexpr int READS = 16;                         // under way
        constexpr int MOST_PARTS = ATTENTION_FEW_MAX_SPLITS * ATTENTION_FEW_PARTS;
        static_assert(sizeof(float) * MOST_PARTS * WARPGROUP / WARP <= sizeof(shared.q[0]));
        const Parts all(a, item);
        const int parts = item.splits * parts_per_split(item), dim = lane * DIMS % HEAD_DIM, own = lane * DIMS / HEAD_DIM;
        // in the place of q, which is no longer needed
        float* part_weights = reinterpret_cast<float*>(shared.q[warpgroup]) + thread / WARP * MOST_PARTS;
        for (int row = warpgroup * (WARPGROUP / WARP) + thread / WARP; row < item.rows; row += ATTENDING * WARPGROUP / WARP) {
            const int64_t start = all.start(a, item, row);
            float highest = -INFINITE, sum = 0.0f, result[DIMS] = {};
            for (int part = lane; part < parts; part += WARP) {
                part_weights[part] = all.lse[start + part];
                highest = fmaxf(highest, part_weights[part]);
            }
#pragma unroll
            for (int distance = WARP / 2; distance > 0; distance /= 2) {
                highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, distance));
            }
            for (int part = lane; part < parts; part += WARP) {
                part_weights[part] = hopper::exp2_approximate(part_weights[part] - highest);
                sum += part_weights[part];
            }
            __syncwarp();
            const float* found_at = all.partial + start * HEAD_DIM + dim;
#pragma unroll 1
            for (int first = own; first < parts; first += READS * TOGETHER) {
                float4 found[READS];
#pragma unroll
                for (int i = 0; i < READS; ++i) {
                    found[i] = *reinterpret_cast<const float4*>(found_at + min(first + i * TOGETHER, parts - 1) * HEAD_DIM);
                }
#pragma unroll
                for (int i = 0; i < READS; ++i) {
                    const int part = first + i * TOGETHER;
                    const float weight = part < parts ? part_weights[part] : 0.0f;
                    if (weight == 0.0f) continue;
                    result[0] += weight * found[i].x, result[1] += weight * found[i].y;
                    result[2] += weight * found[i].z, result[3] += weight * found[i].w;
                }
            }
            __syncwarp();
#pragma unroll
            for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
            if constexpr (TOGETHER == 2) {
                for (float& element : result) element += __shfl_xor_sync(ALL_LANES, element, WARP / 2);
            }
            if (own > 0) continue;
            __nv_bfloat16* to = static_cast<__nv_bfloat16*>(a.out) + row_start(a, item, item.first_row + row) + dim;
            const uint32_t low = bfloat16_pair(result[0] / sum, result[1] / sum), high = bfloat16_pair(result[2] / sum, result[3] / sum);
            *reinterpret_cast<uint2*>(to) = {low, high};
        }
    }
};

}  // namespace llama4_kernels
