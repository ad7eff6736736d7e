// ldmatrix and stmatrix: a warp moves four 8 × 8 matrices of 16-bit elements between shared memory and registers.
//
// Lane i gives the address of 16-byte row i % 8 of matrix i / 8. Register m of lane i holds row i / 4, columns 2 · (i % 4) and the next of
// matrix m; the transposed forms exchange row and column.
#pragma once

#include "hopper/barrier.cuh"

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/matrix.h"
#else

namespace llama4_kernels::hopper {

template <bool TRANSPOSED = false>
__device__ inline void load_matrices(uint32_t (&registers)[4], const void* row) {
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

template <bool TRANSPOSED = false>
__device__ inline void store_matrices(void* row, const uint32_t (&registers)[4]) {
    if constexpr (TRANSPOSED) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(registers[0]),
                     "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                     : "memory");
    } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(registers[0]),
                     "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                     : "memory");
    }
}

}  // namespace llama4_kernels::hopper

#endif
