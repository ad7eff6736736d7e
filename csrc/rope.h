#pragma once

#include <cstdint>

#include <driver_types.h>

#include "dtype.h"
#include "indices.h"

namespace llama4_kernels {

constexpr int MAX_ROPE_HEAD_DIM = 512;

struct OptionalFloat {
    bool has_value;
    float value;
};

// qkv [tokens, num_heads + 2 · num_kv_heads, head_dim] of `dtype`, head_dim even and at most MAX_ROPE_HEAD_DIM -> q [tokens, num_heads,
// head_dim] of `dtype`; k and v of `kv_dtype`: [slots, num_kv_heads, head_dim], or [tokens, num_kv_heads, head_dim] where `slots` is null.
// No alignment is asked of any pointer beyond its element's.
struct RopeArguments {
    const void* qkv;
    Dtype dtype;
    void* q;
    void* k;
    void* v;
    Dtype kv_dtype;
    int tokens, num_heads, num_kv_heads, head_dim;
    Indices positions;     // [tokens]
    const float* cos_sin;  // [max_position, head_dim], or null: no RoPE
    bool interleaved;
    OptionalFloat qk_norm_eps;  // or none: no norm
    float attn_scale;
    int64_t floor_scale;   // 0: no temperature
    const int64_t* slots;  // [tokens], or null
    Indices slot_map;      // [slots], or null values
    const float* k_scale;  // of fp8 caches, or null: 1
    const float* v_scale;
};

void rope_qk_norm(const RopeArguments& arguments, cudaStream_t stream);

}  // namespace llama4_kernels
