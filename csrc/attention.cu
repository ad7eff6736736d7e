// chunked_attention: prefill, decode and any mix of both, in one launch of one persistent kernel.
//
// A block has a warpgroup that loads tiles of K and V (attention_load.cuh) and two that attend. An item of many queries is 128 rows (a row
// is a query and one of the heads of a KV head), 64 per warpgroup, which both visit every tile. An item of few queries is up to 64 rows and
// a split of their keys, whose tiles the warpgroups share out; the last split of a request to be done combines them all. Tiles outside the
// rows' chunks are not visited.

#include "attention.h"

#include "attention_load.cuh"
#include "attention_work.cuh"
#include "device.h"
#include "hopper/math.cuh"
#include "hopper/memory.cuh"
#include "hopper/registers.cuh"
#include "hopper/wgmma.cuh"

namespace llama4_kernels {
namespace {

using hopper::Swizzle;

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;
constexpr int ATTENDING = 2;  // warpgroups
constexpr int THREADS = (1 + ATTENDING) * WARPGROUP;
constexpr int LOAD_REGISTERS = 104;
constexpr int ATTEND_REGISTERS = 200;
constexpr int ROWS = 64;  // of a warpgroup
constexpr bool TAKE_TURNS = true;  // in items of many queries: one attending warpgroup begins its products, then the other
constexpr float LOG2_E = 1.44269504088896f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float SMALLEST = std::numeric_limits<float>::min();

static_assert(ATTENTION_PARTS == ATTENDING && ATTENTION_ROWS == ATTENDING * ROWS && ATTENTION_FEW_ROWS == ROWS);

// ---- shared memory

template <int HEAD_DIM>
struct alignas(1024) SharedMemory {
    uint8_t q[ATTENDING][ROWS * HEAD_DIM * 2];  // [HEAD_DIM / 64][ROWS][64] bfloat16; the output passes through it too
    uint8_t k[ATTENTION_STAGES][Ring<HEAD_DIM>::TILE_BYTES];
    uint8_t v[ATTENTION_STAGES][Ring<HEAD_DIM>::TILE_BYTES];
    hopper::Barrier k_full[ATTENTION_STAGES], k_empty[ATTENTION_STAGES], v_full[ATTENTION_STAGES], v_empty[ATTENTION_STAGES];
    DrawnItems drawn;
    Item items[ATTENDING];    // of each warpgroup, kept here while it needs its registers
    unsigned earlier_splits;  // that were done before this block's
    int item_ends[1];         // [requests], and then the loading warps' codes, to the end of the shared memory
};

// Where in the shared memory the codes begin.
template <int HEAD_DIM>
__host__ __device__ inline size_t codes_start(int requests) {
    return (sizeof(SharedMemory<HEAD_DIM>) + requests * sizeof(int) + 15) / 16 * 16;
}

// ---- barriers: 0 is __syncthreads, 1 and 2 those of a warpgroup, 4 and 5 where each waits for its turn

constexpr int BOTH_ATTENDING = 3;
constexpr int TURN = 4;

__device__ inline void sync_warpgroup(int warpgroup) { hopper::named_barrier_sync(1 + warpgroup, WARPGROUP); }

// ---- rows

// Byte of the 16-byte chunk that holds dims 8 · chunk on of a row, in a warpgroup's q.
__device__ inline uint32_t chunk_in_q(int row, int chunk) {
    return chunk / 8 * (ROWS * ATTENTION_SPAN) + hopper::swizzled(Swizzle::bytes_128, uint32_t(row * ATTENTION_SPAN + chunk % 8 * 16));
}

__device__ inline uint32_t bfloat16_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// ---- attending

// One attending warpgroup's thread: its part of scores, weights and output, in wgmma's layout, of the two rows ROW and ROW + 8.
template <int HEAD_DIM>
class Attend {
public:
    __device__ Attend(const AttentionArguments& a, SharedMemory<HEAD_DIM>& shared, const Ring<HEAD_DIM>& k, const Ring<HEAD_DIM>& v)
        : a(a), shared(shared), k(k), v(v) {}

    // Before the first item. From then on a turn has been passed to the first warpgroup that it has not taken yet.
    __device__ void begin() const {
        if (TAKE_TURNS && warpgroup == 1) pass_turn();
    }

    // After the last item.
    __device__ void finish() const {
        if (TAKE_TURNS && warpgroup == 0) wait_for_turn();
    }

    __device__ void attend(const Item& item, int& count) {
        load_q(item);
        set_rows(item);
        const int first = item.few ? warpgroup : 0, step = item.few ? ATTENDING : 1, tiles = item.keys.tiles;
        if (first < tiles) {
            visit(count, first, step, item.keys.first_tile, tiles);
        } else {
            pass_k(count);
            pass_v(count);
        }
        count += tiles;
        const Item& kept = shared.items[warpgroup];
        kept.few ? leave_part(kept) : write_output(kept);
    }

private:
    const AttentionArguments& a;
    SharedMemory<HEAD_DIM>& shared;
    const Ring<HEAD_DIM>&k, &v;
    const int warpgroup = threadIdx.x / WARPGROUP - 1;
    const int thread = threadIdx.x % WARPGROUP;
    const bool arrives = threadIdx.x % WARP == 0;
    const float scale = a.scale * LOG2_E * fmaxf(a.k_scale ? *a.k_scale : 1.0f, SMALLEST);  // 0 · −∞ is not −∞

    float scores[ATTENTION_TILE / 2];
    uint32_t weights[ATTENTION_TILE / 16][4];
    float output[HEAD_DIM / 2];
    float maximum[2], total[2], correction[2];
    int position[2], first_seen[2];      // of the thread's rows: a row sees keys first_seen to position
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
            position[r] = position_of(a, item, first + hopper::accumulator_row(thread, 2 * r));
            first_seen[r] = chunk_start(position[r], a.chunk_size);
            maximum[r] = -INFINITE;
            total[r] = 0.0f;
        }
        seen_by_all_from = chunk_start(position_of(a, item, first + ROWS - 1), a.chunk_size);
        seen_by_all_to = position_of(a, item, first) + 1;
#pragma unroll
        for (float& element : output) element = 0.0f;
    }

    // Every step-th tile of the item from `first` on.
    __device__ void visit(int count, int first, int step, int first_tile, int tiles) {
        if (first > 0) pass_k(count);
        begin_scores(count + first);
        hopper::wgmma_wait<0>();
        release(k.empty, count + first);
        softmax(first_tile + first);
        pack_weights();
        const int last = first + (tiles - 1 - first) / step * step;
        step == 1 ? go_on_with_all(count, first_tile, last) : go_on_apart(count, first, first_tile, last);
        begin_output(count + last);
        hopper::wgmma_wait<0>();
        release(v.empty, count + last);
        if (last + 1 < tiles) {
            pass_k(count + last + 1);
            pass_v(count + last + 1);
        }
    }

    // The tensor cores compute a tile's scores, then multiply the weights of the one before with V; the softmax of the new scores runs
    // beside that.
    __device__ void go_on_with_all(int count, int first_tile, int last) {
        for (int tile = 0; tile < last; ++tile) {
            if (TAKE_TURNS) wait_for_turn();
            begin_scores(count + tile + 1);
            begin_output(count + tile);
            if (TAKE_TURNS) pass_turn();
            hopper::wgmma_wait<1>();
            release(k.empty, count + tile + 1);
            softmax(first_tile + tile + 1);
            hopper::wgmma_wait<0>();
            release(v.empty, count + tile);
            correct_output();
            pack_weights();
        }
    }

    // Where the warpgroups visit every other tile. A tile of V is given back before the next K is waited for, so that the loading warps
    // have both under way.
    __device__ void go_on_apart(int count, int first, int first_tile, int last) {
        for (int tile = first; tile < last; tile += ATTENDING) {
            if (tile > 0) pass_v(count + tile - 1);
            begin_output(count + tile);
            hopper::wgmma_wait<0>();
            release(v.empty, count + tile);
            pass_k(count + tile + 1);
            begin_scores(count + tile + ATTENDING);
            hopper::wgmma_wait<0>();
            release(k.empty, count + tile + ATTENDING);
            softmax(first_tile + tile + ATTENDING);
            correct_output();
            pack_weights();
        }
        if (last > 0) pass_v(count + last - 1);
    }

    __device__ void wait_for_turn() const { hopper::named_barrier_sync(TURN + warpgroup, ATTENDING * WARPGROUP); }

    __device__ void pass_turn() const { hopper::named_barrier_arrive(TURN + (1 - warpgroup), ATTENDING * WARPGROUP); }

    __device__ void release(hopper::Barrier* empty, int count) const {
        if (arrives) empty[count % ATTENTION_STAGES].arrive();
    }

    // A tile that the other warpgroup attends to.
    __device__ void pass_k(int count) const {
        k.wait_full(count);
        release(k.empty, count);
    }

    __device__ void pass_v(int count) const {
        v.wait_full(count);
        release(v.empty, count);
    }

    // scores = Q · Kᵀ
    __device__ void begin_scores(int count) {
        constexpr int STEPS = ATTENTION_SPAN / 32;
        k.wait_full(count);
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
        v.wait_full(count);
        hopper::wgmma_fence();
#pragma unroll
        for (int step = 0; step < ATTENTION_TILE / 16; ++step) {
            const uint8_t* keys = v.tile(count) + step * 16 * ATTENTION_SPAN;
            const uint64_t v_step = hopper::mn_major(keys, Swizzle::bytes_128, Ring<HEAD_DIM>::HALF_BYTES);
            hopper::wgmma_bf16<HEAD_DIM, hopper::Major::mn>(output, weights[step], v_step, true);
        }
        hopper::wgmma_commit();
    }

    // scores become weights, not yet divided by their sum; `correction` is for what was summed up before. Rows that have seen no key yet
    // stay at −∞.
    __device__ void softmax(int tile) {
        const int start = tile * ATTENTION_TILE;
        if (start < seen_by_all_from || start + ATTENTION_TILE > seen_by_all_to) mask(start);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = maximum[r];
#pragma unroll
            for (int i = 0; i < ATTENTION_TILE / 2; ++i) {
                if (i / 2 % 2 == r) highest = fmaxf(highest, scores[i]);
            }
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
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
        const float v_scale = a.v_scale ? *a.v_scale : 1.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(~0u, total[r], 1);
            total[r] += __shfl_xor_sync(~0u, total[r], 2);
            correction[r] = v_scale / total[r];
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

    __device__ void leave_part(const Item& item) {
        divide_output();
        const int part = item.split * ATTENTION_PARTS + warpgroup;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = hopper::accumulator_row(thread, 2 * r);
            if (row >= item.rows) continue;
            const int64_t at = parts_start(a, item, row) + part;
            if (thread % 4 == 0) a.lse[at] = maximum[r] * scale + log2f(total[r]);
            float* to = a.partial + at * HEAD_DIM;
#pragma unroll
            for (int i = 2 * r; i < HEAD_DIM / 2; i += 4) {
                *reinterpret_cast<float2*>(to + hopper::accumulator_column(thread, i)) = make_float2(output[i], output[i + 1]);
            }
        }
        hopper::named_barrier_sync(BOTH_ATTENDING, ATTENDING * WARPGROUP);
        if (threadIdx.x == WARPGROUP) {
            unsigned* ticket = &a.tickets[item.request.index * a.num_kv_heads + item.kv_head];
            shared.earlier_splits = hopper::add_acquire_release(ticket, 1);
            if (shared.earlier_splits + 1 == unsigned(item.splits)) *ticket = 0;
        }
        hopper::named_barrier_sync(BOTH_ATTENDING, ATTENDING * WARPGROUP);
        if (shared.earlier_splits + 1 == unsigned(item.splits)) combine(item);
    }

    // The parts of each row in order, weighted by their sums. A part of −∞ has seen no key, and holds NaN.
    __device__ void combine(const Item& item) const {
        constexpr int DIMS = HEAD_DIM / WARP;
        const int lane = threadIdx.x % WARP, parts = item.splits * ATTENTION_PARTS;
        for (int row = threadIdx.x / WARP - WARPGROUP / WARP; row < item.rows; row += ATTENDING * WARPGROUP / WARP) {
            const int64_t start = parts_start(a, item, row);
            const float* lse = a.lse + start;
            float highest = -INFINITE;
            for (int part = lane; part < parts; part += WARP) highest = fmaxf(highest, lse[part]);
#pragma unroll
            for (int distance = WARP / 2; distance > 0; distance /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
            float sum = 0.0f, result[DIMS] = {};
#pragma unroll 4
            for (int part = 0; part < parts; ++part) {
                const float weight = hopper::exp2_approximate(lse[part] - highest);
                const float* found = a.partial + (start + part) * HEAD_DIM + lane * DIMS;
                if (lse[part] == -INFINITE) continue;
                sum += weight;
#pragma unroll
                for (int i = 0; i < DIMS; ++i) result[i] += weight * found[i];
            }
            __nv_bfloat16* to = static_cast<__nv_bfloat16*>(a.out) + row_start(a, item, row) + lane * DIMS;
#pragma unroll
            for (int i = 0; i < DIMS; i += 2) *reinterpret_cast<uint32_t*>(to + i) = bfloat16_pair(result[i] / sum, result[i + 1] / sum);
        }
    }
};

// Rows past the last request.
__device__ inline void zero_padding(const AttentionArguments& a) {
    const int64_t per_token = int64_t(a.num_heads) * a.head_dim / 8;
    uint4* out = static_cast<uint4*>(a.out);
    const int64_t first = a.query_start_loc[a.requests] * per_token + int64_t(blockIdx.x) * THREADS + threadIdx.x;
    for (int64_t i = first; i < a.tokens * per_token; i += int64_t(gridDim.x) * THREADS) out[i] = uint4{0, 0, 0, 0};
}

// ---- the kernel

template <int HEAD_DIM, class Element>
__global__ void __launch_bounds__(THREADS, 1)
    chunked_attention_kernel(const __grid_constant__ hopper::TensorMap k_map, const __grid_constant__ hopper::TensorMap v_map,
                             const AttentionArguments a) {
    auto& shared = *shared_memory<SharedMemory<HEAD_DIM>>();
    const Ring<HEAD_DIM> k{shared.k[0], shared.k_full, shared.k_empty};
    const Ring<HEAD_DIM> v{shared.v[0], shared.v_full, shared.v_empty};
    if (threadIdx.x == 0) {
        for (const Ring<HEAD_DIM>& ring : {k, v}) {
            for (int stage = 0; stage < ATTENTION_STAGES; ++stage) {
                ring.full[stage].init(ATTENTION_LOAD_WARPS);
                ring.empty[stage].init(ATTENDING * WARPGROUP / WARP);
            }
        }
        shared.drawn.init(THREADS / WARP);
        hopper::fence_barrier_init();
    }
    count_all_items(a, shared.item_ends);
    zero_padding(a);

    const int items = a.requests ? shared.item_ends[a.requests - 1] * a.num_kv_heads : 0;
    int item = blockIdx.x, taken = 0;
    if (threadIdx.x < WARPGROUP) {
        hopper::decrease_registers<LOAD_REGISTERS>();
        Loader<HEAD_DIM, Element> loader(a, k, v, reinterpret_cast<uint8_t*>(&shared) + codes_start<HEAD_DIM>(a.requests));
        while (item < items) {
            const unsigned drawn = loader.load_item(item_of(a, shared.item_ends, item), items, k_map, v_map);
            shared.drawn.wait_empty(taken);
            if (draws()) shared.drawn.put(taken, int(gridDim.x + drawn));
            item = shared.drawn.take(taken++);
        }
        loader.finish();
    } else {
        hopper::increase_registers<ATTEND_REGISTERS>();
        int count = 0;  // pairs of tiles of this block so far
        Attend<HEAD_DIM> attend(a, shared, k, v);
        attend.begin();
        while (item < items) {
            attend.attend(item_of(a, shared.item_ends, item), count);
            item = shared.drawn.take(taken++);
        }
        attend.finish();
    }
}

// ---- launch

hopper::TensorMap cache_map(const char* name, const void* cache, const AttentionArguments& a) {
    hopper::TensorShape<3> shape;
    shape.name = name;
    shape.data = cache;
    shape.type = hopper::ElementType::bfloat16;
    shape.sizes = {uint64_t(a.head_dim), uint64_t(a.num_kv_heads), uint64_t(a.slots)};
    shape.strides = {uint64_t(a.head_dim) * 2, uint64_t(a.num_kv_heads) * a.head_dim * 2};
    shape.box = {64, 1, ATTENTION_WARP_KEYS};
    shape.swizzle = Swizzle::bytes_128;
    return hopper::make_tensor_map(shape);
}

template <int HEAD_DIM, class Element>
void launch_for(const AttentionArguments& a, cudaStream_t stream) {
    hopper::TensorMap k_map{}, v_map{};
    if (sizeof(Element) == 2) {
        k_map = cache_map("k_cache", a.k_cache, a);
        v_map = cache_map("v_cache", a.v_cache, a);
    }
    const size_t shared_bytes = codes_start<HEAD_DIM>(a.requests) + Loader<HEAD_DIM, Element>::CODE_BYTES;
    const LaunchConfig config{"chunked_attention", dim3(unsigned(multiprocessors())), dim3(THREADS), shared_bytes, stream};
    launch(config, &chunked_attention_kernel<HEAD_DIM, Element>, k_map, v_map, a);
}

}  // namespace

void chunked_attention(const AttentionArguments& a, cudaStream_t stream) {
    if (a.tokens == 0) return;
    const bool is_fp8 = a.kv_dtype == Dtype::float8_e4m3fn;
    const auto launch_64 = is_fp8 ? &launch_for<64, __nv_fp8_storage_t> : &launch_for<64, __nv_bfloat16>;
    const auto launch_128 = is_fp8 ? &launch_for<128, __nv_fp8_storage_t> : &launch_for<128, __nv_bfloat16>;
    (a.head_dim == 64 ? launch_64 : launch_128)(a, stream);
}

}  // namespace llama4_kernels
