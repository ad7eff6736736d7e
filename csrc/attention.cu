// chunked_attention: prefill, decode and any mix of both, in one launch of one persistent kernel.
//
// A block has a warpgroup that loads tiles of K and V (attention_load.cuh) and two that attend (attention_attend.cuh). An item of many
// queries is 128 rows (a row is a query and one of the heads of a KV head), 64 per warpgroup, which both visit every tile. An item of few
// queries is up to 64 rows and a run of splits of their keys, whose tiles the warpgroups share out; the last run of a request to be done
// combines all splits. Tiles outside the rows' chunks are not visited.

#include "attention.h"

#include "attention_attend.cuh"
#include "attention_draws.cuh"
#include "attention_load.cuh"
#include "attention_schedule.cuh"
#include "device.h"
#include "hopper/registers.cuh"

namespace llama4_kernels {
namespace {

// Zeros for the tokens past the last request.
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
    const Ring<HEAD_DIM> k{shared.k[0], shared.k_full, shared.k_empty, shared.k_gathered};
    const Ring<HEAD_DIM> v{shared.v[0], shared.v_full, shared.v_empty, shared.v_gathered};
    if (threadIdx.x == 0) {
        for (const Ring<HEAD_DIM>& ring : {k, v}) {
            for (int stage = 0; stage < ATTENTION_STAGES; ++stage) {
                ring.full[stage].init(ATTENTION_LOAD_WARPS * Loader<HEAD_DIM, Element>::ARRIVALS);
                ring.empty[stage].init(ATTENDING * WARPGROUP / WARP);
            }
        }
        shared.drawn.init(THREADS / WARP);
        shared.scale = fmaxf(a.scale * LOG2_E * (a.k_scale ? *a.k_scale : 1.0f), SMALLEST);  // 0 · −∞ is not −∞
        shared.v_scale = a.v_scale ? *a.v_scale : 1.0f;
        hopper::fence_barrier_init();
    }
    if (sizeof(Element) == 2 && threadIdx.x == WARPGROUP) {
        hopper::prefetch_tensor_map(k_map);
        hopper::prefetch_tensor_map(v_map);
    }
    Schedule schedule(a, shared.entries, shared.runs);
    schedule.make();

    const int items = schedule.items();
    int item = blockIdx.x, taken = 0;
    if (threadIdx.x < WARPGROUP) {
        hopper::decrease_registers<LOAD_REGISTERS>();
        Loader<HEAD_DIM, Element> loader(a, k, v, reinterpret_cast<uint8_t*>(&shared) + codes_start<HEAD_DIM>(a.requests));
        while (item < items) {
            const unsigned drawn = loader.load_item(schedule.item(item), items, k_map, v_map);
            shared.drawn.wait_empty(taken);
            if (draws()) shared.drawn.put(taken, int(gridDim.x + drawn));
            item = shared.drawn.take(taken++);
        }
        loader.finish();
    } else {
        hopper::increase_registers<ATTEND_REGISTERS>();
        int count = 0;  // pairs of tiles of this block so far
        Attend<HEAD_DIM, Element> attend(a, shared, k, v);
        while (item < items) {
            attend.attend(schedule.item(item), count);
            item = shared.drawn.take(taken++);
        }
        attend.finish();
    }
    zero_padding(a);
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
    constexpr size_t CODE_BYTES = Loader<HEAD_DIM, Element>::CODE_BYTES;
    static_assert(codes_start<HEAD_DIM>(ATTENTION_MAX_REQUESTS) + CODE_BYTES <= 227 << 10, "a block's shared memory");
    const size_t shared_bytes = codes_start<HEAD_DIM>(a.requests) + CODE_BYTES;
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
