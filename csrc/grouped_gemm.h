#pragma once

#include <cstdint>

#include <driver_types.h>

#include "dtype.h"

namespace llama4_kernels {

constexpr int GEMM_ROW_ALIGNMENT = 16;  // bytes
constexpr int MAX_GEMM_GROUPS = 4096;

// C[m] = a[m] · b[g]ᵀ for offsets[g] ≤ m < offsets[g + 1]; with `rows`, a[rows[m]]. a [a_rows, k] and b [groups, n, k] of `dtype`, bfloat16
// or float8_e4m3fn; their addresses, and a row's bytes, are multiples of GEMM_ROW_ALIGNMENT; at most MAX_GEMM_GROUPS groups. out [m, n] of
// out_dtype, bfloat16 or float32.
struct GroupedGemmArguments {
    const void* a;
    const void* b;
    Dtype dtype;
    void* out;
    Dtype out_dtype;
    int64_t a_rows, m, n, k;
    int groups;
    const int* offsets;    // [groups + 1]
    const int* rows;       // [m], or null
    const float* a_scale;  // fp8: [], [a_rows] or [a_rows, ceil(k / 128)], by a_scale_dimensions
    int a_scale_dimensions;
    const float* b_scale;  // fp8: [groups], [groups, n] or [groups, ceil(n / 128), ceil(k / 128)], by b_scale_dimensions
    int b_scale_dimensions;
};

void grouped_gemm(const GroupedGemmArguments& arguments, cudaStream_t stream);

struct GemmTile {
    int tokens, channels;
};

// The tile for a product of these sizes, on a GPU of so many multiprocessors.
GemmTile grouped_gemm_tile(int64_t m, int64_t n, int groups, int multiprocessors);

}  // namespace llama4_kernels
