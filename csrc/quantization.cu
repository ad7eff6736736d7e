// quantize_per_token: one block per row; rows of 128 elements, which blocks of 128 columns are too, take 8 lanes each instead. A row is
// read once, 16 elements ("a piece") per thread and step, and held in registers between the maximum and the division; only what exceeds
// THREADS · 4 pieces is read again. Divisions are IEEE, so codes equal the reference's bit for bit.

#include "quantization.h"

#include "device.h"
#include "e4m3.cuh"
#include "floats.cuh"
#include "warp.cuh"

namespace llama4_kernels {
namespace {

constexpr int PIECE = 16;
constexpr int THREADS = 512;
constexpr int SHORT_ROW = 8;  // pieces, a lane each

template <class T>
struct alignas(16) Piece {
    T elements[PIECE];
};

struct alignas(16) Codes {
    __nv_fp8x2_storage_t pairs[PIECE / 2];
};

template <class Wide>
__device__ inline void copy_16_bytes_at_a_time(void* to, const void* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(Wide) / sizeof(uint4)); ++i) static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
}

// The row's elements from `begin` on; zeros past its end.
template <bool ALIGNED, class T>
__device__ inline Piece<T> load(const T* row, int64_t begin, int64_t columns) {
    Piece<T> piece;
    if constexpr (ALIGNED) {
        if (begin < columns) {
            copy_16_bytes_at_a_time<Piece<T>>(&piece, row + begin);
        } else {
#pragma unroll
            for (int i = 0; i < PIECE; ++i) piece.elements[i] = T(0.0f);
        }
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) piece.elements[i] = begin + i < columns ? row[begin + i] : T(0.0f);
    }
    return piece;
}

template <bool ALIGNED, class T>
__device__ inline void encode(const Piece<T>& piece, float scale, uint8_t* row, int64_t begin, int64_t columns) {
    Codes codes;
#pragma unroll
    for (int i = 0; i < PIECE; i += 2) {
        const float low = scale == 0.0f ? 0.0f : to_float(piece.elements[i]) / scale;
        const float high = scale == 0.0f ? 0.0f : to_float(piece.elements[i + 1]) / scale;
        codes.pairs[i / 2] = __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
    }
    if constexpr (ALIGNED) {
        if (begin < columns) copy_16_bytes_at_a_time<Codes>(row + begin, &codes);
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            if (begin + i < columns) row[begin + i] = uint8_t(codes.pairs[i / 2] >> (i % 2 * 8));
        }
    }
}

template <class T>
__device__ inline unsigned largest_magnitude(const Piece<T>& piece) {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < PIECE; ++i) largest = max(largest, magnitude(to_float(piece.elements[i])));
    return largest;
}

__device__ inline unsigned largest_in_block(unsigned value) {
    unsigned* per_warp = shared_memory<unsigned>();
    value = __reduce_max_sync(ALL_LANES, value);
    if (threadIdx.x % WARP == 0) per_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) value = max(value, per_warp[warp]);
    return value;
}

template <class T, bool ALIGNED, int HELD>
__global__ void __launch_bounds__(THREADS)
    quantize_per_token_kernel(const T* __restrict__ x, int64_t columns, uint8_t* __restrict__ codes, float* __restrict__ scales) {
    const int64_t row = blockIdx.x;
    const T* x_row = x + row * columns;
    uint8_t* codes_row = codes + row * columns;
    const int64_t first = int64_t(threadIdx.x) * PIECE;
    const int64_t step = int64_t(blockDim.x) * PIECE;

    Piece<T> held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = load<ALIGNED>(x_row, first + i * step, columns);

    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) largest = max(largest, largest_magnitude(held[i]));
    for (int64_t begin = first + HELD * step; begin < columns; begin += step) {
        largest = max(largest, largest_magnitude(load<ALIGNED>(x_row, begin, columns)));
    }

    const float scale = __uint_as_float(largest_in_block(largest)) / E4M3_MAX;
    if (threadIdx.x == 0) scales[row] = scale;

#pragma unroll
    for (int i = 0; i < HELD; ++i) encode<ALIGNED>(held[i], scale, codes_row, first + i * step, columns);
    for (int64_t begin = first + HELD * step; begin < columns; begin += step) {
        encode<ALIGNED>(load<ALIGNED>(x_row, begin, columns), scale, codes_row, begin, columns);
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    quantize_short_rows_kernel(const T* __restrict__ x, int64_t rows, uint8_t* __restrict__ codes, float* __restrict__ scales) {
    const int64_t piece_index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = piece_index / SHORT_ROW;
    const int64_t begin = piece_index * PIECE, elements = rows * SHORT_ROW * PIECE;
    const Piece<T> piece = load<true>(x, begin, elements);
    unsigned largest = largest_magnitude(piece);
#pragma unroll
    for (int lanes = 1; lanes < SHORT_ROW; lanes *= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
    const float scale = __uint_as_float(largest) / E4M3_MAX;
    if (row < rows && threadIdx.x % SHORT_ROW == 0) scales[row] = scale;
    encode<true>(piece, scale, codes, begin, elements);
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    quantize_static_kernel(const T* __restrict__ x, int64_t elements, const float* __restrict__ scale, uint8_t* __restrict__ codes) {
    const int64_t begin = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * PIECE;
    encode<ALIGNED>(load<ALIGNED>(x, begin, elements), *scale, codes, begin, elements);
}

template <class T, bool ALIGNED>
void launch_per_token(const QuantizeArguments& a, cudaStream_t stream) {
    const T* x = static_cast<const T*>(a.x);
    const int64_t pieces = ceil_div(a.columns, PIECE);
    if (ALIGNED && pieces == SHORT_ROW) {
        const LaunchConfig config{"quantize_per_token", grid_of(ceil_div(a.rows * pieces, THREADS)), dim3(THREADS), 0, stream};
        return launch(config, &quantize_short_rows_kernel<T>, x, a.rows, a.codes, a.scale);
    }
    const unsigned threads = unsigned(std::clamp<int64_t>(ceil_div(pieces, WARP) * WARP, WARP, THREADS));
    const LaunchConfig config{"quantize_per_token", grid_of(a.rows), dim3(threads), threads / WARP * sizeof(unsigned), stream};
    const auto kernel = pieces <= THREADS ? &quantize_per_token_kernel<T, ALIGNED, 1> : &quantize_per_token_kernel<T, ALIGNED, 4>;
    launch(config, kernel, x, a.columns, a.codes, a.scale);
}

template <class T, bool ALIGNED>
void launch_static(const QuantizeStaticArguments& a, cudaStream_t stream) {
    const LaunchConfig config{"quantize_static", grid_of(ceil_div(a.elements, THREADS * PIECE)), dim3(THREADS), 0, stream};
    launch(config, &quantize_static_kernel<T, ALIGNED>, static_cast<const T*>(a.x), a.elements, a.scale, a.codes);
}

// Whether rows, or all elements, are whole pieces that can be read and written as vectors.
bool takes_vectors(const void* x, int64_t columns, const void* codes) {
    return columns % PIECE == 0 && is_aligned(x, sizeof(uint4)) && is_aligned(codes, sizeof(uint4));
}

}  // namespace

void quantize_per_token(const QuantizeArguments& a, cudaStream_t stream) {
    if (a.rows == 0) return;
    const bool aligned = takes_vectors(a.x, a.columns, a.codes);
    const auto of_bfloat16 = aligned ? &launch_per_token<__nv_bfloat16, true> : &launch_per_token<__nv_bfloat16, false>;
    const auto of_float = aligned ? &launch_per_token<float, true> : &launch_per_token<float, false>;
    (a.dtype == Dtype::bfloat16 ? of_bfloat16 : of_float)(a, stream);
}

void quantize_static(const QuantizeStaticArguments& a, cudaStream_t stream) {
    if (a.elements == 0) return;
    const bool aligned = takes_vectors(a.x, a.elements, a.codes);
    const auto of_bfloat16 = aligned ? &launch_static<__nv_bfloat16, true> : &launch_static<__nv_bfloat16, false>;
    const auto of_float = aligned ? &launch_static<float, true> : &launch_static<float, false>;
    (a.dtype == Dtype::bfloat16 ? of_bfloat16 : of_float)(a, stream);
}

}  // namespace llama4_kernels
