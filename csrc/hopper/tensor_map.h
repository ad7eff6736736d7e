// What TMA needs to know of a tensor, checked alike for the driver's tensor maps and for the emulation's.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "hopper/layout.cuh"

namespace llama4_kernels::hopper {

// How long a line that a copy reads is to stay in L2 (createpolicy's encodings).
enum class L2 : uint64_t { normal = 0x1000000000000000, evict_first = 0x12f0000000000000, evict_last = 0x14f0000000000000 };

enum class ElementType { uint8, bfloat16, float32 };

constexpr unsigned element_bytes(ElementType type) { return type == ElementType::uint8 ? 1 : type == ElementType::bfloat16 ? 2 : 4; }

// A tensor in global memory and the box of it that one copy moves. Dimension 0 is contiguous.
template <int RANK>
struct TensorShape {
    const char* name;  // for errors
    const void* data;  // 16-byte aligned
    ElementType type;
    std::array<uint64_t, RANK> sizes;        // in elements, at least 1
    std::array<uint64_t, RANK - 1> strides;  // in bytes, of dimensions 1…, multiples of 16
    std::array<uint32_t, RANK> box;  // in elements, at most 256; row of box[0] elements: a multiple of 16 bytes, or the swizzle's span
    Swizzle swizzle = Swizzle::none;
};

// std::invalid_argument where TMA cannot take the tensor.
template <int RANK>
void check(const TensorShape<RANK>& shape) {
    static_assert(RANK >= 2 && RANK <= 4);
    const auto refuse = [&](const std::string& what) {
        throw std::invalid_argument(std::string("tensor map of ") + shape.name + ": " + what);
    };
    if (reinterpret_cast<uintptr_t>(shape.data) % 16) refuse("the address is not a multiple of 16");
    for (int i = 0; i < RANK; ++i) {
        const std::string dimension = "dimension " + std::to_string(i);
        if (shape.sizes[i] == 0 || shape.sizes[i] > uint64_t(1) << 32) {
            refuse(dimension + " has " + std::to_string(shape.sizes[i]) + " elements, needs 1 to 2^32");
        }
        if (shape.box[i] == 0 || shape.box[i] > 256)
            refuse(dimension + " has a box of " + std::to_string(shape.box[i]) + ", needs 1 to 256");
        if (i > 0 && (shape.strides[i - 1] % 16 || shape.strides[i - 1] >= uint64_t(1) << 40)) {
            refuse(dimension + " has a stride of " + std::to_string(shape.strides[i - 1]) + " bytes, needs a multiple of 16 below 2^40");
        }
    }
    const unsigned row = shape.box[0] * element_bytes(shape.type);
    if (row % 16) refuse("a box's row has " + std::to_string(row) + " bytes, needs a multiple of 16");
    if (shape.swizzle != Swizzle::none && row != span_bytes(shape.swizzle)) {
        refuse("a box's row has " + std::to_string(row) + " bytes, needs the swizzle's " + std::to_string(span_bytes(shape.swizzle)));
    }
}

}  // namespace llama4_kernels::hopper
