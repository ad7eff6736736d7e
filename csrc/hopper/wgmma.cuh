// wgmma: D[64, N] = A[64, K] · B[N, K]ᵀ (+ D) by a warpgroup, asynchronously, accumulated in fp32. K is 16 for bf16 and 32 for e4m3.
//
// Per batch of products: wgmma_fence, the products, wgmma_commit, and wgmma_wait before the accumulators or A's registers are touched. All
// 128 threads of the warpgroup call each function with the same arguments. Operands in shared memory: layout.cuh.
#pragma once

#include "hopper/barrier.cuh"

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/wgmma.h"
#else
#include "hopper/wgmma_shapes.cuh"

namespace llama4_kernels::hopper {

// Orders this warpgroup's register accesses before the products that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// End the group of products so far.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until all but the PENDING latest groups are complete.
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Columns N: 8 … 64 in steps of 8, 80 … 256 in steps of 16. accumulate: whether to add to D. A: a descriptor, or this thread's registers.
template <int N, class A>
__device__ inline void wgmma_e4m3(float (&d)[N / 2], const A& a, uint64_t b, bool accumulate) {
    WgmmaShape<N>::e4m3(d, a, b, accumulate);
}

template <int N, Major A = Major::k, Major B = Major::k>
__device__ inline void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    WgmmaShape<N>::template bf16<A, B>(d, a, b, accumulate);
}

template <int N, Major B = Major::k>
__device__ inline void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    WgmmaShape<N>::template bf16<B>(d, a, b, accumulate);
}

}  // namespace llama4_kernels::hopper

#endif

namespace llama4_kernels::hopper {

// Descriptor of a K-major operand in a tile [rows, span] of a swizzle of 32, 64 or 128 bytes, as TMA writes it; K step j starts 32 · j
// bytes on.
__device__ inline uint64_t k_major(const void* tile, Swizzle swizzle) {
    return matrix_descriptor(shared_address(tile), swizzle, 16, 8 * span_bytes(swizzle));
}

// Descriptor of the operand that starts `bytes`, a multiple of 16, further on in the same tile or tiles: cheaper than one from its address.
// Only the lower word changes: an address never carries out of it.
__device__ inline uint64_t advanced(uint64_t descriptor, unsigned bytes) {
    return (descriptor & 0xffffffff00000000u) | uint32_t(uint32_t(descriptor) + (bytes >> 4));
}

// Descriptor of an MN-major bf16 operand in swizzled tiles [K, span], the tiles of successive span / 2 elements of M or N `tile_bytes`
// apart; K step j starts 16 · j rows on.
__device__ inline uint64_t mn_major(const void* tile, Swizzle swizzle, unsigned tile_bytes) {
    return matrix_descriptor(shared_address(tile), swizzle, tile_bytes, 8 * span_bytes(swizzle));
}

}  // namespace llama4_kernels::hopper
