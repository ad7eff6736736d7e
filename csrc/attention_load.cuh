// From pages to shared memory: four warps bring the tiles of K and V of each item in turn, 32 keys of a tile each.
//
// A warp whose 32 keys stand in consecutive slots takes them by TMA, one box per 64 dims. Any other gathers their rows by cp.async, whose
// copies arrive at the tile's barrier by themselves. Codes of fp8 are gathered beside the tiles, and become bfloat16 on their way into
// them. A key that no query of the item sees becomes zeros: neither it nor its entry of the page table is read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "attention_draws.cuh"
#include "attention_item.cuh"
#include "hopper/barrier.cuh"
#include "hopper/cp_async.cuh"
#include "hopper/tma.cuh"
#include "indices.cuh"
#include "warp.cuh"

namespace llama4_kernels {

constexpr int ATTENTION_STAGES = 2;
constexpr int ATTENTION_SPAN = 128;  // bytes of a row of a tile: 64 dims of bfloat16, swizzled
constexpr int ATTENTION_LOAD_WARPS = 4;
constexpr int ATTENTION_WARP_KEYS = ATTENTION_TILE / ATTENTION_LOAD_WARPS;

// Tiles [HEAD_DIM / 64][ATTENTION_TILE][64] of K or V, and who may use them.
template <int HEAD_DIM>
struct Ring {
    static constexpr int HALF_BYTES = ATTENTION_TILE * ATTENTION_SPAN;  // 64 dims of a tile
    static constexpr int TILE_BYTES = HEAD_DIM / 64 * HALF_BYTES;

    uint8_t* tiles;
    hopper::Barrier* full;                      // [ATTENTION_STAGES], Loader::ARRIVALS of each load warp
    hopper::Barrier* empty;                     // [ATTENTION_STAGES], an arrival of each attending warp
    uint8_t (*gathered)[ATTENTION_LOAD_WARPS];  // [ATTENTION_STAGES], in bfloat16: whether a load warp's keys come by cp.async

    __device__ uint8_t* tile(int count) const { return tiles + count % ATTENTION_STAGES * TILE_BYTES; }
    __device__ void wait_full(int count) const { full[count % ATTENTION_STAGES].wait(count / ATTENTION_STAGES & 1); }
    __device__ void wait_empty(int count) const { empty[count % ATTENTION_STAGES].wait(count / ATTENTION_STAGES & 1 ^ 1); }
    __device__ bool is_gathered(int count) const {
        static_assert(ATTENTION_LOAD_WARPS == sizeof(uint32_t));
        return *reinterpret_cast<const uint32_t*>(gathered[count % ATTENTION_STAGES]) != 0;
    }
};

// Where a key's dims 8 · chunk to 8 · chunk + 7 begin in a tile, in bytes.
template <int HEAD_DIM>
__device__ inline uint32_t chunk_in_tile(int key, int chunk) {
    const uint32_t in_half = hopper::swizzled(hopper::Swizzle::bytes_128, uint32_t(key * ATTENTION_SPAN + chunk % 8 * 16));
    return chunk / 8 * Ring<HEAD_DIM>::HALF_BYTES + in_half;
}

__device__ inline uint32_t bfloat16_pair_of_codes(__nv_fp8x2_storage_t codes) {
    const float2 values = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3)));
    const __nv_bfloat162 pair = __float22bfloat162_rn(values);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint4 bfloat16_of_8_codes(uint32_t low, uint32_t high) {
    return {bfloat16_pair_of_codes(low & 0xffff), bfloat16_pair_of_codes(low >> 16), bfloat16_pair_of_codes(high & 0xffff),
            bfloat16_pair_of_codes(high >> 16)};
}

// The slot of a position in three steps, a tile apart, so that none waits for what the one before has read: an entry of the page table,
// through the slot map, and to the slot of the page. −1 where no query of the item sees the position.
__device__ inline int entry_of(const AttentionArguments& a, const int* row, int position, const KeyRange& keys) {
    if (position < keys.begin || position >= keys.end) return -1;
    return row[a.holds_slots ? position : position / a.page_size];
}

__device__ inline int64_t mapped(const AttentionArguments& a, int entry) {
    return a.slot_map.values && entry >= 0 ? at(a.slot_map, entry) : entry;
}

__device__ inline int64_t slot_of(const AttentionArguments& a, int64_t entry, int position) {
    return a.holds_slots || entry < 0 ? entry : entry * a.page_size + position % a.page_size;
}

// One load warp. `Element`: of the caches. Tiles come in the order in which they are needed: in bfloat16 K of tile i + 1 before V of tile
// i; in fp8 K of a tile and then its V, while the codes of two tiles before are on their way.
template <int HEAD_DIM, class Element>
class Loader {
public:
    static constexpr bool IS_FP8 = sizeof(Element) == 1;
    static constexpr int CHUNKS = HEAD_DIM * sizeof(Element) / 16;  // of 16 bytes in a key's row, and steps of WARP / CHUNKS keys
    static constexpr int ARRIVALS = IS_FP8 ? 1 : 1 + WARP;  // of a warp at a full tile: of what it writes itself, and of each lane's copies
    static constexpr int CODE_STAGES = IS_FP8 ? 3 : 0;  // tiles of codes: one being converted, two on their way
    static constexpr int WARP_CODE_BYTES = ATTENTION_WARP_KEYS * HEAD_DIM;
    static constexpr int CODE_BYTES = CODE_STAGES * ATTENTION_LOAD_WARPS * WARP_CODE_BYTES;

    // codes: CODE_BYTES of shared memory.
    __device__ Loader(const AttentionArguments& a, const Ring<HEAD_DIM>& k, const Ring<HEAD_DIM>& v, uint8_t* codes)
        : a(a), k(k), v(v), codes(codes + warp * (CODE_STAGES * WARP_CODE_BYTES)) {}

    // Gives, in the thread that draws, the draw. It is made before the last tile is loaded, so that nobody waits for it.
    __device__ unsigned load_item(const Item& item, int items, const hopper::TensorMap& k_map, const hopper::TensorMap& v_map) {
        const int64_t table_row = a.page_table_rows.values ? at(a.page_table_rows, item.request.index) : item.request.index;
        const int* row = a.page_table + table_row * a.page_table_stride;
        const int first = item.keys.first_tile * ATTENTION_TILE + warp * ATTENTION_WARP_KEYS + lane;
        const int tiles = item.keys.tiles;
        const auto entry = [&](int i) { return i < tiles ? entry_of(a, row, first + i * ATTENTION_TILE, item.keys) : -1; };
        int64_t slot = -1, next = mapped(a, entry(0));
        int second = entry(1);
        unsigned drawn = 0;
        for (int i = 0; i < tiles + !IS_FP8; ++i) {
            const int64_t slot_before = slot;
            slot = slot_of(a, next, first + i * ATTENTION_TILE);
            next = mapped(a, second);
            second = entry(i + 2);
            if (draws() && i == tiles - 1) drawn = draw(a, items);
            if constexpr (IS_FP8) {
                load_codes(k, a.k_cache, slot, item.kv_head);
                load_codes(v, a.v_cache, slot, item.kv_head);
            } else {
                if (i < tiles) load(k, k_map, a.k_cache, slot, item.kv_head, number);
                if (i > 0) load(v, v_map, a.v_cache, slot_before, item.kv_head, number - 1);
                number += i < tiles;
            }
        }
        return drawn;
    }

    // After the last item.
    __device__ void finish() {
        if constexpr (IS_FP8) {
            hopper::cp_async_commit();
            convert(k, number++ - 2);
            hopper::cp_async_commit();
            convert(v, number++ - 2);
        }
    }

private:
    const AttentionArguments& a;
    const Ring<HEAD_DIM>&k, &v;
    const int warp = threadIdx.x / WARP % ATTENTION_LOAD_WARPS;
    const int lane = threadIdx.x % WARP;
    uint8_t* const codes;
    int number = 0;  // of the block's next tile of K; of fp8 2 · i is its i-th of K, 2 · i + 1 its i-th of V

    // This lane's chunk of its key of a step, in global memory.
    __device__ const uint8_t* chunk_of(const void* cache, int64_t slot, int kv_head) const {
        const int64_t row = (max(slot, int64_t(0)) * a.num_kv_heads + kv_head) * int64_t(HEAD_DIM * sizeof(Element));
        return static_cast<const uint8_t*>(cache) + row + lane % CHUNKS * 16;
    }

    __device__ int64_t slot_of_step(int64_t slot, int step) const {
        return __shfl_sync(ALL_LANES, slot, step * (WARP / CHUNKS) + lane / CHUNKS);
    }

    // Where a chunk of this lane's key of a step begins in a tile, in bytes. The swizzle repeats every 8 keys: few offsets for registers.
    __device__ uint32_t chunk_of_step(int step, int chunk) const {
        constexpr int PERIOD = 8 * CHUNKS / WARP;
        const int key = warp * ATTENTION_WARP_KEYS + step % PERIOD * (WARP / CHUNKS) + lane / CHUNKS;
        return chunk_in_tile<HEAD_DIM>(key, chunk) + step / PERIOD * (8 * ATTENTION_SPAN);
    }

    // ---- bfloat16

    __device__ void load(const Ring<HEAD_DIM>& ring, const hopper::TensorMap& map, const void* cache, int64_t slot, int kv_head,
                         int count) {
        hopper::Barrier& full = ring.full[count % ATTENTION_STAGES];
        ring.wait_empty(count);
        const int64_t first_slot = __shfl_sync(ALL_LANES, slot, 0);
        const bool consecutive = __all_sync(ALL_LANES, slot >= 0 && slot == first_slot + lane);
        if (lane == 0) ring.gathered[count % ATTENTION_STAGES][warp] = !consecutive;
        if (consecutive) {
            if (lane == 0) {
                full.arrive_for(WARP);
                load_boxes(map, int(first_slot), kv_head, ring.tile(count), full);
            }
        } else {
            gather_rows(cache, slot, kv_head, ring.tile(count));
            hopper::cp_async_arrive(full);
            if (lane == 0) full.arrive();
        }
    }

    __device__ void load_boxes(const hopper::TensorMap& map, int slot, int kv_head, uint8_t* tile, hopper::Barrier& full) const {
        full.arrive_expect(ATTENTION_WARP_KEYS * HEAD_DIM * sizeof(Element));
#pragma unroll
        for (int half = 0; half < HEAD_DIM / 64; ++half) {
            uint8_t* to = tile + half * Ring<HEAD_DIM>::HALF_BYTES + warp * ATTENTION_WARP_KEYS * ATTENTION_SPAN;
            hopper::tma_load(to, map, full, half * 64, kv_head, slot);
        }
    }

    __device__ void gather_rows(const void* cache, int64_t slot, int kv_head, uint8_t* tile) const {
#pragma unroll
        for (int step = 0; step < CHUNKS; ++step) {
            const int64_t key_slot = slot_of_step(slot, step);
            hopper::cp_async_16(tile + chunk_of_step(step, lane % CHUNKS), chunk_of(cache, key_slot, kv_head), key_slot >= 0);
        }
    }

    // ---- fp8: each lane copies codes to a place of its own, and turns them into bfloat16 two tiles later, at the next of K or V

    __device__ uint8_t* codes_of(int tile, int step) const {
        return codes + tile % CODE_STAGES * WARP_CODE_BYTES + (step * WARP + lane) * 16;
    }

    __device__ void load_codes(const Ring<HEAD_DIM>& ring, const void* cache, int64_t slot, int kv_head) {
#pragma unroll
        for (int step = 0; step < CHUNKS; ++step) {
            const int64_t key_slot = slot_of_step(slot, step);
            hopper::cp_async_16(codes_of(number, step), chunk_of(cache, key_slot, kv_head), key_slot >= 0);
        }
        hopper::cp_async_commit();
        convert(ring, number++ - 2);
    }

    __device__ void convert(const Ring<HEAD_DIM>& ring, int tile) const {
        hopper::cp_async_wait<2>();
        if (tile < 0) return;
        const int count = tile / 2;
        ring.wait_empty(count);
        uint8_t* to = ring.tile(count);
#pragma unroll
        for (int step = 0; step < CHUNKS; ++step) {
            const uint4 found = *reinterpret_cast<const uint4*>(codes_of(tile, step));
            const int chunk = lane % CHUNKS * 2;
            *reinterpret_cast<uint4*>(to + chunk_of_step(step, chunk)) = bfloat16_of_8_codes(found.x, found.y);
            *reinterpret_cast<uint4*>(to + chunk_of_step(step, chunk + 1)) = bfloat16_of_8_codes(found.z, found.w);
        }
        __syncwarp();
        if (lane == 0) ring.full[count % ATTENTION_STAGES].arrive();
    }
};

}  // namespace llama4_kernels
