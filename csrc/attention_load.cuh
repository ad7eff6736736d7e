// From pages to shared memory: four warps bring the tiles of K and V of each item in turn, 32 keys of a tile each.
//
// A warp whose 32 keys stand in consecutive slots takes them by TMA, one box per 64 dims; another gathers their rows by cp.async. Keys of fp8 go
// through registers, where codes become bfloat16. A key that no query of the item sees is not read, nor its entry of the page table; it is zeros.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "attention_work.cuh"
#include "hopper/barrier.cuh"
#include "hopper/cp_async.cuh"
#include "hopper/memory.cuh"
#include "hopper/tma.cuh"

namespace llama4_kernels {

constexpr int ATTENTION_STAGES = 2;
constexpr int ATTENTION_SPAN = 128;            // bytes of a row of a tile: 64 dims of bfloat16, swizzled
constexpr int ATTENTION_LOAD_WARPS = 4;
constexpr int ATTENTION_WARP_KEYS = ATTENTION_TILE / ATTENTION_LOAD_WARPS;

// Tiles [HEAD_DIM / 64][ATTENTION_TILE][64] of K or V, and who may use them.
template <int HEAD_DIM>
struct Ring {
    static constexpr int HALF_BYTES = ATTENTION_TILE * ATTENTION_SPAN;  // 64 dims of a tile
    static constexpr int TILE_BYTES = HEAD_DIM / 64 * HALF_BYTES;

    uint8_t* tiles;
    hopper::Barrier* full;   // [ATTENTION_STAGES], an arrival of each load warp
    hopper::Barrier* empty;  // [ATTENTION_STAGES], an arrival of each attending warp

    __device__ uint8_t* tile(int count) const { return tiles + count % ATTENTION_STAGES * TILE_BYTES; }
    __device__ void wait_full(int count) const { full[count % ATTENTION_STAGES].wait(count / ATTENTION_STAGES & 1); }
    __device__ bool is_empty(int count) const { return empty[count % ATTENTION_STAGES].try_wait(count / ATTENTION_STAGES & 1 ^ 1); }
    __device__ void wait_empty(int count) const { empty[count % ATTENTION_STAGES].wait(count / ATTENTION_STAGES & 1 ^ 1); }
};

// Byte, within a tile, of the 16-byte chunk that holds dims 8 · chunk on of a key.
template <int HEAD_DIM>
__device__ inline uint32_t chunk_in_tile(int key, int chunk) {
    const uint32_t in_half = hopper::swizzled(hopper::Swizzle::bytes_128, uint32_t(key * ATTENTION_SPAN + chunk % 8 * 16));
    return chunk / 8 * Ring<HEAD_DIM>::HALF_BYTES + in_half;
}

__device__ inline uint32_t bfloat16_pair(__nv_fp8x2_storage_t codes) {
    const float2 values = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3)));
    const __nv_bfloat162 pair = __float22bfloat162_rn(values);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint4 bfloat16_of_8_codes(uint32_t low, uint32_t high) {
    return {bfloat16_pair(low & 0xffff), bfloat16_pair(low >> 16), bfloat16_pair(high & 0xffff), bfloat16_pair(high >> 16)};
}

// The slot of a position, −1 where no query of the item sees it.
__device__ inline int64_t slot_of(const AttentionArguments& a, const int* row, int position, const KeyRange& keys) {
    if (position < keys.begin || position >= keys.end) return -1;
    if (!a.holds_slots) return int64_t(row[position / a.page_size]) * a.page_size + position % a.page_size;
    return a.slot_map.values ? at(a.slot_map, row[position]) : row[position];
}

// One load warp. `Element`: of the caches.
template <int HEAD_DIM, class Element>
struct Loader {
    static constexpr bool IS_FP8 = sizeof(Element) == 1;
    static constexpr int CHUNKS = HEAD_DIM * sizeof(Element) / 16;  // of a row in global memory, and steps of 32 / CHUNKS rows
    static constexpr int WARP = 32;

    const AttentionArguments& a;
    const int warp = threadIdx.x / WARP % ATTENTION_LOAD_WARPS;
    const int lane = threadIdx.x % WARP;
    hopper::Barrier* unsignalled = nullptr;  // of the copies under way

    __device__ void load_item(const Item& item, const Ring<HEAD_DIM>& k, const Ring<HEAD_DIM>& v, const hopper::TensorMap& k_map,
                              const hopper::TensorMap& v_map, int& count) {
        const int64_t table_row = a.page_table_rows.values ? at(a.page_table_rows, item.request.index) : item.request.index;
        const int* row = a.page_table + table_row * a.row_stride;
        const int first = item.keys.first_tile * ATTENTION_TILE + warp * ATTENTION_WARP_KEYS + lane;
        int64_t next = slot_of(a, row, first, item.keys);
        for (int i = 0; i < item.keys.tiles; ++i, ++count) {
            const int64_t slot = next;
            next = i + 1 < item.keys.tiles ? slot_of(a, row, first + (i + 1) * ATTENTION_TILE, item.keys) : -1;
            if (IS_FP8 && next >= 0) {
                hopper::bulk_prefetch(address(a.k_cache, next, item.kv_head), HEAD_DIM * sizeof(Element));
                hopper::bulk_prefetch(address(a.v_cache, next, item.kv_head), HEAD_DIM * sizeof(Element));
            }
            load(a.k_cache, k_map, slot, item.kv_head, k, count);
            load(a.v_cache, v_map, slot, item.kv_head, v, count);
        }
    }

    // After the last item.
    __device__ void finish() {
        if constexpr (!IS_FP8) signal_after<0>();
    }

private:
    __device__ const uint8_t* address(const void* cache, int64_t slot, int kv_head) const {
        return static_cast<const uint8_t*>(cache) + (slot * a.num_kv_heads + kv_head) * int64_t(HEAD_DIM * sizeof(Element));
    }

    __device__ void load(const void* cache, const hopper::TensorMap& map, int64_t slot, int kv_head, const Ring<HEAD_DIM>& ring, int count) {
        hopper::Barrier& full = ring.full[count % ATTENTION_STAGES];
        uint8_t* tile = ring.tile(count);
        if constexpr (IS_FP8) {
            uint4 codes[CHUNKS];
            read_codes(codes, cache, slot, kv_head);
            ring.wait_empty(count);
            write_bfloat16(codes, tile);
            hopper::fence_async_proxy();
            __syncwarp();
            if (lane == 0) full.arrive();
        } else {
            if (!__all_sync(~0u, ring.is_empty(count))) {  // do not keep from the attending warps what they may wait for
                signal_after<0>();
                ring.wait_empty(count);
            }
            const int64_t first_slot = __shfl_sync(~0u, slot, 0);
            const bool consecutive = __all_sync(~0u, slot >= 0 && slot == first_slot + lane);
            if (consecutive) {
                if (lane == 0) load_boxes(map, int(first_slot), kv_head, tile, full);
            } else {
                gather_rows(cache, slot, kv_head, tile);
            }
            hopper::cp_async_commit();
            signal_after<1>();
            if (!consecutive) unsignalled = &full;
        }
    }

    // Byte of a chunk of this lane's key of a step. The swizzle repeats every 8 keys: few offsets to keep in registers.
    __device__ uint32_t chunk_of_step(int step, int chunk) const {
        constexpr int PERIOD = 8 * CHUNKS / WARP;
        const int key = warp * ATTENTION_WARP_KEYS + step % PERIOD * (WARP / CHUNKS) + lane / CHUNKS;
        return chunk_in_tile<HEAD_DIM>(key, chunk) + step / PERIOD * (8 * ATTENTION_SPAN);
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
            const int64_t key_slot = __shfl_sync(~0u, slot, step * (WARP / CHUNKS) + lane / CHUNKS);
            uint8_t* to = tile + chunk_of_step(step, lane % CHUNKS);
            hopper::cp_async_16(to, address(cache, max(key_slot, int64_t(0)), kv_head) + lane % CHUNKS * 16, key_slot >= 0);
        }
    }

    // Wait until all but the PENDING latest groups of copies are there, and tell of the one before the latest.
    template <int PENDING>
    __device__ void signal_after() {
        hopper::cp_async_wait<PENDING>();
        hopper::fence_async_proxy();
        __syncwarp();
        if (lane == 0 && unsignalled) unsignalled->arrive();
        unsignalled = nullptr;
    }

    __device__ void read_codes(uint4 (&codes)[CHUNKS], const void* cache, int64_t slot, int kv_head) const {
#pragma unroll
        for (int step = 0; step < CHUNKS; ++step) {
            const int64_t key_slot = __shfl_sync(~0u, slot, step * (WARP / CHUNKS) + lane / CHUNKS);
            codes[step] = uint4{0, 0, 0, 0};
            if (key_slot >= 0) codes[step] = hopper::load_once(address(cache, key_slot, kv_head) + lane % CHUNKS * 16);
        }
    }

    __device__ void write_bfloat16(const uint4 (&codes)[CHUNKS], uint8_t* tile) const {
#pragma unroll
        for (int step = 0; step < CHUNKS; ++step) {
            const int chunk = lane % CHUNKS * 2;
            *reinterpret_cast<uint4*>(tile + chunk_of_step(step, chunk)) = bfloat16_of_8_codes(codes[step].x, codes[step].y);
            *reinterpret_cast<uint4*>(tile + chunk_of_step(step, chunk + 1)) = bfloat16_of_8_codes(codes[step].z, codes[step].w);
        }
    }
};

}  // namespace llama4_kernels
