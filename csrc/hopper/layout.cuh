// Every assumption about how Hopper's asynchronous units lay out data, in one place and as plain formulas: kernels, the emulation and the
// layout tests share them. tests/hopper/layouts.py compares each with formulas of its own, in the emulation and on a Hopper GPU.
//
// 1. Swizzle. TMA and wgmma permute the 16-byte chunks of shared memory by address: bits 4… of the byte address are XORed with bits 7… (1,
//    2 or 3 bits for a span of 32, 64 or 128 bytes). A tile that TMA writes has rows of one span and starts at a multiple of 8 spans.
// 2. wgmma descriptor: (address >> 4) in bits 0–13, leading byte offset >> 4 in 16–29, stride byte offset >> 4 in 32–45, swizzle in 62–63.
// 3. K-major operand, span of s bytes: row r, byte b of K is at (r / 8) · stride + (r % 8) · s + b, then swizzled; b < s, and the next K
//    step adds to the address. Without a swizzle s is 16, and byte 16 … 31 of K is one leading offset further.
// 4. MN-major operand (16-bit types): element i of M or N and k of K is at (i / (s / 2)) · leading + (k / 8) · stride + (k % 8) · s + i %
//    (s / 2) · 2. Without a swizzle s is 16, and leading and stride change places.
// 5. Accumulators and register operands: accumulator_row/column and operand_row/column below.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llama4_kernels::hopper {

constexpr unsigned WARP = 32;
constexpr unsigned WARPGROUP = 128;

enum class Swizzle { none, bytes_32, bytes_64, bytes_128 };

// Which dimension of an operand is contiguous in shared memory: K, or M (for A) and N (for B).
enum class Major { k, mn };

// Bytes in a row of a swizzled tile; without a swizzle those of a row of wgmma's 8 × 16 byte core matrix.
__host__ __device__ constexpr unsigned span_bytes(Swizzle swizzle) { return 16u << unsigned(swizzle); }

// Where the byte at `address` of shared memory is put.
__host__ __device__ constexpr uint32_t swizzled(Swizzle swizzle, uint32_t address) {
    return address ^ (((address >> 7) & (span_bytes(swizzle) / 16 - 1)) << 4);
}

// Row and column, in the warpgroup's 64 × N tile, of accumulator `i` of thread `thread` of the warpgroup.
__host__ __device__ constexpr int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
__host__ __device__ constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Row and K of element `i` of an A operand in registers, for elements of `bytes` bytes: 4 registers, 16 / bytes elements.
__host__ __device__ constexpr int operand_row(int bytes, int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + i * bytes / 4 % 2 * 8;
}
__host__ __device__ constexpr int operand_k(int bytes, int thread, int i) {
    return i * bytes / 8 * (16 / bytes) + thread % 4 * (4 / bytes) + i % (4 / bytes);
}

// A wgmma descriptor of the operand at the shared-memory address `address`.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t address, Swizzle swizzle, unsigned leading_bytes, unsigned stride_bytes) {
    const uint64_t mode = swizzle == Swizzle::none ? 0 : 4 - uint64_t(swizzle);
    return (address & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 | mode << 62;
}

}  // namespace llama4_kernels::hopper
