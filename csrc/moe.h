#pragma once

#include <cstdint>

#include <driver_types.h>

#include "dtype.h"

namespace llama4_kernels {

// What becomes of activations as they are loaded: nothing; or bfloat16 becomes e4m3, of factor · x with the given scale, or with a scale of
// its own per row and 128 columns.
enum class MoeConversion { none, fixed, per_block };

// Activations of one expert kind, in the weight's dtype, or bfloat16 where they are converted.
struct MoeOperand {
    const void* values;
    const float* scale;  // or null
    int64_t scale_row_stride, scale_step_stride;
    const float* factors;  // of each row, or null
    MoeConversion conversion;
};

struct MoeWeight {
    const void* values;
    Dtype dtype;
    const float* scale;    // fp8
    int scale_dimensions;  // beyond the stack's: 0 per tensor, 1 per channel, 2 per block of 128 × 128
};

// The grid, and where its blocks leave what they have of tiles that they share: at most two parts each.
struct MoeSharing {
    int blocks;
    float* parts;       // [2 · blocks, part], or null where every routing gives MOE_MANY_ROUNDS · blocks tiles
    unsigned* tickets;  // one per tile, of less than MOE_MANY_ROUNDS · blocks; 0 before and after
};

constexpr int MAX_MOE_EXPERTS = 1024;
constexpr int MOE_MIN_RUN = 4;      // stages: blocks beyond what this gives to each have none
constexpr int MOE_MANY_ROUNDS = 8;  // tiles per block from which on no tile is shared

struct MoeRouting {
    const int* order;    // [tokens]
    const int* offsets;  // [experts + 1]
};

// Hidden activations [tokens, width] in sorted order.
struct MoeHidden {
    void* values;
    Dtype dtype;   // bfloat16 or float8_e4m3fn
    float* scale;  // fp8: [] given where is_static, else [tokens, ceil(width / 128)] written
    bool is_static;
    int width;
};

struct MoeGateUpArguments {
    MoeOperand x_shared, x_routed;  // [tokens, hidden]
    MoeWeight w_shared, w_routed;   // [2 · width, hidden], [experts, 2 · width, hidden]
    MoeHidden h_shared, h_routed;
    MoeRouting routing;
    int tokens, hidden, experts;
    MoeSharing sharing;
    // What to bring into L2 before the kernel ahead has ended: w_shared, and prefetch_bytes from an address, of the shared expert's second
    // weight, or null.
    bool prefetch_w_shared;
    const void* prefetch_address;
    int64_t prefetch_bytes;
    bool dependent;  // start before the kernel ahead has ended: programmatic dependent launch
};

struct MoeDownArguments {
    MoeOperand h_shared, h_routed;  // [tokens, k_shared], [tokens, k_routed], in sorted order
    MoeWeight w_shared, w_routed;   // [hidden, k_shared], [experts, hidden, k_routed]
    int k_shared, k_routed;
    MoeRouting routing;
    int tokens, hidden, experts;
    void* out;  // [tokens, hidden] bfloat16
    MoeSharing sharing;
    bool dependent;
};

// The tokens of a tile, for that many in all; and how many floats a tile's part takes.
int moe_tile_tokens(int tokens);
int moe_gate_up_part(int tokens);
int moe_down_part(int tokens);

int moe_multiprocessors();  // of the current device

// Columns of h, and of the output, that a tile covers.
constexpr int MOE_GATE_UP_COLUMNS = 128;
int moe_down_columns(int tokens);

void moe_gate_up(const MoeGateUpArguments& arguments, cudaStream_t stream);
void moe_down(const MoeDownArguments& arguments, cudaStream_t stream);

}  // namespace llama4_kernels
