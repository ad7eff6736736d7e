// Host twin of hopper/matrix.cuh.
#pragma once

#include "emulation/barrier.h"
#include "emulation/warp.h"

namespace llama4_kernels::hopper {

// Where half `half` of register `matrix` of this lane lies, given the address of each lane's row.
template <bool TRANSPOSED>
uint16_t* matrix_element(const std::array<uint64_t, WARP>& rows, int matrix, int half) {
    const unsigned lane = threadIdx.x % WARP;
    const unsigned row = TRANSPOSED ? lane % 4 * 2 + half : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + half;
    return reinterpret_cast<uint16_t*>(rows[matrix * 8 + row]) + column;
}

inline std::array<uint64_t, WARP> matrix_rows(const void* row, Site site) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulation::scheduler().fail(site, "the matrix row's address is not a multiple of 16");
    emulation::scheduler().owner(static_cast<const char*>(row) + 15, site, "the matrix row");
    return emulation::exchange(~0u, reinterpret_cast<uint64_t>(row), site, "ldmatrix or stmatrix in all lanes");
}

template <bool TRANSPOSED = false>
void load_matrices(uint32_t (&registers)[4], const void* row, Site site = Site::here()) {
    const auto rows = matrix_rows(row, site);
    for (int matrix = 0; matrix < 4; ++matrix) {
        registers[matrix] = *matrix_element<TRANSPOSED>(rows, matrix, 0) | uint32_t(*matrix_element<TRANSPOSED>(rows, matrix, 1)) << 16;
    }
}

template <bool TRANSPOSED = false>
void store_matrices(void* row, const uint32_t (&registers)[4], Site site = Site::here()) {
    const auto rows = matrix_rows(row, site);
    for (int matrix = 0; matrix < 4; ++matrix) {
        *matrix_element<TRANSPOSED>(rows, matrix, 0) = uint16_t(registers[matrix]);
        *matrix_element<TRANSPOSED>(rows, matrix, 1) = uint16_t(registers[matrix] >> 16);
    }
}

}  // namespace llama4_kernels::hopper
