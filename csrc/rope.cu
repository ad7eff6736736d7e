// rope_qk_norm: a few neighbouring threads ("lanes") per head of a token, of q, k and v alike. Each holds WIDTH pairs that RoPE turns, from
// the one read of qkv to the one write, so that nothing goes through shared memory; lanes meet only in the norm's sum of squares.

#include "rope.h"

#include "device.h"
#include "e4m3.cuh"
#include "floats.cuh"
#include "indices.cuh"
#include "warp.cuh"

namespace llama4_kernels {
namespace {

constexpr int THREADS = 128;
constexpr int WIDE = 8;  // pairs that are read and written as vectors, where head_dim and the pointers allow

// ---- elements

template <class T, int WIDTH>
struct alignas(std::min<size_t>(16, sizeof(T) * WIDTH)) Vector {
    T elements[WIDTH];
};

template <class T, int WIDTH>
__device__ inline void load(const T* from, float (&values)[WIDTH]) {
    const auto vector = *reinterpret_cast<const Vector<T, WIDTH>*>(from);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values[i] = to_float(vector.elements[i]);
}

template <class T, int WIDTH>
__device__ inline void store(T* to, const float (&values)[WIDTH]) {
    Vector<T, WIDTH> vector;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) vector.elements[i] = from_float<T>(values[i]);
    *reinterpret_cast<Vector<T, WIDTH>*>(to) = vector;
}

// ---- pairs: WIDTH of them are two vectors in memory, side by side where RoPE is interleaved, half a head apart where it is not

template <int WIDTH>
struct Pairs {
    float first[WIDTH], second[WIDTH];
};

struct Places {
    int64_t low, high;
};

template <int WIDTH>
__device__ inline Places places_of(int64_t head, int pair, const RopeArguments& a) {
    const int64_t start = head * a.head_dim;
    return a.interleaved ? Places{start + 2 * pair, start + 2 * pair + WIDTH} : Places{start + pair, start + pair + a.head_dim / 2};
}

template <class T, int WIDTH>
__device__ inline Pairs<WIDTH> load_pairs(const T* from, Places places, bool interleaved) {
    float low[WIDTH], high[WIDTH];
    load(from + places.low, low);
    load(from + places.high, high);
    Pairs<WIDTH> pairs;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float even = 2 * i < WIDTH ? low[2 * i % WIDTH] : high[2 * i % WIDTH];
        const float odd = 2 * i + 1 < WIDTH ? low[(2 * i + 1) % WIDTH] : high[(2 * i + 1) % WIDTH];
        pairs.first[i] = interleaved ? even : low[i];
        pairs.second[i] = interleaved ? odd : high[i];
    }
    return pairs;
}

template <class T, int WIDTH>
__device__ inline void store_pairs(void* to, Places places, bool interleaved, const Pairs<WIDTH>& pairs) {
    float low[WIDTH], high[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float below = i % 2 ? pairs.second[i / 2] : pairs.first[i / 2];
        const float above = (WIDTH + i) % 2 ? pairs.second[(WIDTH + i) / 2] : pairs.first[(WIDTH + i) / 2];
        low[i] = interleaved ? below : pairs.first[i];
        high[i] = interleaved ? above : pairs.second[i];
    }
    store(static_cast<T*>(to) + places.low, low);
    store(static_cast<T*>(to) + places.high, high);
}

template <int WIDTH>
__device__ inline void store_codes(void* to, Places places, bool interleaved, Pairs<WIDTH> pairs, const float* scale) {
    const float divisor = scale ? *scale : 1.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        pairs.first[i] = divide(pairs.first[i], divisor);
        pairs.second[i] = divide(pairs.second[i], divisor);
    }
    store_pairs<__nv_fp8_storage_t>(to, places, interleaved, pairs);
}

// ---- steps

template <int WIDTH>
__device__ inline void turn(Pairs<WIDTH>& pairs, const float* row, int pair, int half) {
    float cos[WIDTH], sin[WIDTH];
    load(row + pair, cos);
    load(row + half + pair, sin);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float x = pairs.first[i], y = pairs.second[i];
        pairs.first[i] = x * cos[i] - y * sin[i];
        pairs.second[i] = x * sin[i] + y * cos[i];
    }
}

template <int WIDTH>
__device__ inline void multiply(Pairs<WIDTH>& pairs, float factor) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        pairs.first[i] *= factor;
        pairs.second[i] *= factor;
    }
}

template <int WIDTH>
__device__ inline float sum_of_squares(const Pairs<WIDTH>& pairs) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum += pairs.first[i] * pairs.first[i] + pairs.second[i] * pairs.second[i];
    return sum;
}

// ---- the kernel

template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS) rope_qk_norm_kernel(const RopeArguments a, int lanes) {
    constexpr int PIECES = MAX_ROPE_HEAD_DIM / (2 * WARP * WIDTH);  // of WIDTH pairs, per thread

    const int heads = a.num_heads + 2 * a.num_kv_heads;
    const int half = a.head_dim / 2;
    const int64_t row = int64_t(blockIdx.x) * (THREADS / lanes) + threadIdx.x / lanes;
    const bool exists = row < int64_t(a.tokens) * heads;
    const int token = exists ? int(row / heads) : 0;
    const int head = exists ? int(row - int64_t(token) * heads) : 0;
    const bool is_q = head < a.num_heads;
    const bool is_v = head >= a.num_heads + a.num_kv_heads;
    const int64_t position = at(a.positions, token);

    Pairs<WIDTH> pairs[PIECES] = {};
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int pair = (i * lanes + threadIdx.x % lanes) * WIDTH;
        if (!exists || pair >= half) continue;
        pairs[i] = load_pairs<T, WIDTH>(static_cast<const T*>(a.qkv), places_of<WIDTH>(row, pair, a), a.interleaved);
        if (a.cos_sin && !is_v) turn(pairs[i], a.cos_sin + position * a.head_dim, pair, half);
        squares += sum_of_squares(pairs[i]);
    }

    float factor = 1.0f;
    if (a.qk_norm_eps.has_value) {
        for (int distance = lanes / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(ALL_LANES, squares, distance);
        if (!is_v) factor = rsqrtf(squares / a.head_dim + a.qk_norm_eps.value);
    }
    if (a.floor_scale && is_q) factor *= 1.0f + a.attn_scale * log1pf(float((position + 1) / a.floor_scale));

    if (!exists) return;
    int64_t slot = a.slots ? a.slots[token] : token;
    if (!is_q && a.slot_map.values && slot >= 0) slot = at(a.slot_map, slot);
    if (!is_q && slot < 0) return;
    const int64_t target = is_q ? int64_t(token) * a.num_heads + head : slot * a.num_kv_heads + (head - a.num_heads) % a.num_kv_heads;
    void* to = is_q ? a.q : is_v ? a.v : a.k;
    const Dtype dtype = is_q ? a.dtype : a.kv_dtype;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int pair = (i * lanes + threadIdx.x % lanes) * WIDTH;
        if (pair >= half) continue;
        if (factor != 1.0f) multiply(pairs[i], factor);
        const Places places = places_of<WIDTH>(target, pair, a);
        switch (dtype) {
            case Dtype::bfloat16: store_pairs<__nv_bfloat16>(to, places, a.interleaved, pairs[i]); break;
            case Dtype::float32: store_pairs<float>(to, places, a.interleaved, pairs[i]); break;
            case Dtype::float8_e4m3fn: store_codes(to, places, a.interleaved, pairs[i], is_v ? a.v_scale : a.k_scale); break;
        }
    }
}

}  // namespace

void rope_qk_norm(const RopeArguments& a, cudaStream_t stream) {
    if (a.tokens == 0) return;
    const std::initializer_list<const void*> pointers{a.qkv, a.q, a.k, a.v, a.cos_sin};
    const bool aligned_to_16 = std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) { return is_aligned(pointer, 16); });
    const bool wide = a.head_dim % (2 * WIDE) == 0 && aligned_to_16;
    const int width = wide ? WIDE : 1;
    int lanes = 1;
    while (lanes < int(WARP) && lanes * width < a.head_dim / 2) lanes *= 2;

    const int64_t rows = int64_t(a.tokens) * (a.num_heads + 2 * a.num_kv_heads);
    const LaunchConfig config{"rope_qk_norm", grid_of(ceil_div(rows, THREADS / lanes)), dim3(THREADS), 0, stream};
    const bool is_bfloat16 = a.dtype == Dtype::bfloat16;
    const auto aligned = is_bfloat16 ? &rope_qk_norm_kernel<__nv_bfloat16, WIDE> : &rope_qk_norm_kernel<float, WIDE>;
    const auto any = is_bfloat16 ? &rope_qk_norm_kernel<__nv_bfloat16, 1> : &rope_qk_norm_kernel<float, 1>;
    launch(config, wide ? aligned : any, a, lanes);
}

}  // namespace llama4_kernels
