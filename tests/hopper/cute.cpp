// csrc/hopper/layout.cuh compared with CuTe, the layouts that CUTLASS multiplies with: shared memory of both majors and all swizzles with
// the descriptors of a K step, accumulators, and A in registers. On the host; a line for each comparison, with how many places differ.

#include <cstdio>

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "hopper/layout.cuh"

namespace {

using namespace llama4_kernels;
using hopper::Swizzle;
namespace gmma = cute::SM90::GMMA;

constexpr int ROWS = 128, STEP_BYTES = 32;
constexpr uint64_t START = 0x3fff;  // a descriptor's bits for the address, which CuTe does not know on the host

alignas(1024) uint8_t memory[ROWS * 128 * 2];

template <class T, Swizzle S>
constexpr auto k_major_atom() {
    if constexpr (S == Swizzle::none) return gmma::Layout_K_INTER_Atom<T>{};
    else if constexpr (S == Swizzle::bytes_32) return gmma::Layout_K_SW32_Atom<T>{};
    else if constexpr (S == Swizzle::bytes_64) return gmma::Layout_K_SW64_Atom<T>{};
    else return gmma::Layout_K_SW128_Atom<T>{};
}

template <class T, Swizzle S>
constexpr auto mn_major_atom() {
    if constexpr (S == Swizzle::none) return gmma::Layout_MN_INTER_Atom<T>{};
    else if constexpr (S == Swizzle::bytes_32) return gmma::Layout_MN_SW32_Atom<T>{};
    else if constexpr (S == Swizzle::bytes_64) return gmma::Layout_MN_SW64_Atom<T>{};
    else return gmma::Layout_MN_SW128_Atom<T>{};
}

void say(int differing, const char* what, int bytes, int size) {
    std::fprintf(stderr, "%d differ: %s, elements of %d bytes, %d\n", differing, what, bytes, size);
}

template <class Tensor>
uint32_t place(Tensor& tensor, int row, int k) {
    return uint32_t(reinterpret_cast<uint8_t*>(cute::raw_pointer_cast(&tensor(row, k))) - memory);
}

// Two spans of K, one after the other.
template <class T, Swizzle S>
void k_major() {
    constexpr int SPAN = hopper::span_bytes(S), BYTES = sizeof(T), K = 2 * SPAN / BYTES;
    const auto layout = cute::tile_to_shape(k_major_atom<T, S>(), cute::Shape<cute::Int<ROWS>, cute::Int<K>>{});
    auto tensor = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<T*>(memory)), layout);
    int differing = 0;
    for (int row = 0; row < ROWS; ++row) {
        for (int k = 0; k < K; ++k) {
            const int byte = k * BYTES;
            differing += place(tensor, row, k) != byte / SPAN * (ROWS * SPAN) + hopper::swizzled(S, row * SPAN + byte % SPAN);
        }
    }
    const auto step = cute::local_tile(tensor, cute::Shape<cute::Int<ROWS>, cute::Int<STEP_BYTES / BYTES>>{}, cute::make_coord(0, 0));
    const uint64_t found = gmma::make_gmma_desc<gmma::Major::K>(step).desc_;
    const uint64_t ours = hopper::matrix_descriptor(0, S, S == Swizzle::none ? ROWS * SPAN : 16, 8 * SPAN);
    say(differing + ((found & ~START) != ours), "K-major, rows of bytes", BYTES, SPAN);
}

// Two spans of M or N, one after the other.
template <class T, Swizzle S>
void mn_major() {
    constexpr int SPAN = hopper::span_bytes(S), BYTES = sizeof(T), WIDTH = SPAN / BYTES, K = ROWS;
    using Order = cute::Step<cute::_2, cute::_1>;
    const auto layout = cute::tile_to_shape(mn_major_atom<T, S>(), cute::Shape<cute::Int<2 * WIDTH>, cute::Int<K>>{}, Order{});
    auto tensor = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<T*>(memory)), layout);
    int differing = 0;
    for (int i = 0; i < 2 * WIDTH; ++i) {
        for (int k = 0; k < K; ++k) {
            differing += place(tensor, i, k) != i / WIDTH * (K * SPAN) + hopper::swizzled(S, k * SPAN + i % WIDTH * BYTES);
        }
    }
    const auto step = cute::local_tile(tensor, cute::Shape<cute::Int<2 * WIDTH>, cute::Int<STEP_BYTES / BYTES>>{}, cute::make_coord(0, 0));
    const uint64_t found = gmma::make_gmma_desc<gmma::Major::MN>(step).desc_;
    const unsigned tile = K * SPAN, group = 8 * SPAN;
    const uint64_t ours = S == Swizzle::none ? hopper::matrix_descriptor(0, S, group, tile) : hopper::matrix_descriptor(0, S, tile, group);
    say(differing + ((found & ~START) != ours), "MN-major, rows of bytes", BYTES, SPAN);
}

template <int N>
void accumulators() {
    const cute::GMMA::CLayout_64xN<N> layout;
    int differing = 0;
    for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < N / 2; ++i) {
            differing += int(layout(thread, i)) != hopper::accumulator_column(thread, i) * 64 + hopper::accumulator_row(thread, i);
        }
    }
    say(differing, "accumulators, columns", 4, N);
}

template <class Layout>
void operand(int bytes, Layout layout) {
    int differing = 0;
    for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < 16 / bytes; ++i) {
            differing += int(layout(thread, i)) != hopper::operand_k(bytes, thread, i) * 64 + hopper::operand_row(bytes, thread, i);
        }
    }
    say(differing, "A in registers, bytes of K", bytes, STEP_BYTES);
}

template <Swizzle S>
void shared() {
    k_major<cute::bfloat16_t, S>();
    k_major<uint8_t, S>();
    mn_major<cute::bfloat16_t, S>();
}

}  // namespace

int main() {
    shared<Swizzle::none>();
    shared<Swizzle::bytes_32>();
    shared<Swizzle::bytes_64>();
    shared<Swizzle::bytes_128>();
    accumulators<8>();
    accumulators<64>();
    accumulators<128>();
    accumulators<256>();
    operand(2, cute::GMMA::ALayout_64x16{});
    operand(1, cute::GMMA::ALayout_64x32{});
}
