#pragma once

#include <cstdint>

#include <driver_types.h>

#include "dtype.h"

namespace llama4_kernels {

constexpr int ROUTE_MAX_EXPERTS = 256;
constexpr int64_t ROUTE_MAX_HIDDEN = 49152;
constexpr int ROUTE_FEW_TOKENS = 64;

// Top-1 expert of each row of x [tokens, hidden] by router [experts, hidden], and the tokens sorted by expert. No alignment is asked of any
// pointer beyond its element's.
struct RouteArguments {
    const void* x;
    Dtype x_dtype;
    const void* router;
    Dtype router_dtype;
    int tokens, hidden, experts;
    int* expert_ids;           // [tokens]
    float* scores;             // [tokens]
    int* order;                // [tokens]
    int* offsets;              // [experts + 1]
    uint8_t* codes;            // [tokens, hidden] e4m3, or null
    float* scale;              // [tokens], with codes
    unsigned long long* best;  // [tokens, route_slices(experts)], working memory where tokens ≤ ROUTE_FEW_TOKENS
    unsigned* tickets;         // one, 0 before and after
    bool dependent;            // start before the kernel ahead has ended: programmatic dependent launch
};

// The most slices that a kernel works in: of 16 experts.
int route_slices(int experts);

void route_top1(const RouteArguments& arguments, cudaStream_t stream);

}  // namespace llama4_kernels
