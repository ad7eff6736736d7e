// Host twin of hopper/wgmma.cuh.
//
// A thread that issues a product goes on at once: its accumulators are taken from it and hold NaN until a wait completes the product. The
// products of a warpgroup are computed at its wait, when all 128 threads have come, from what shared memory holds then.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "emulation/copies.h"

namespace emulation {

using llama4_kernels::hopper::Major;

constexpr int ROWS = 64;
constexpr int MAX_COLUMNS = 256;
constexpr int MAX_K = 32;

// Bits of the mantissa that sums of e4m3 products keep, where a test lets them keep fewer than fp32 has.
inline int e4m3_sum_bits = 0;

inline Warpgroup& warpgroup() { return current().block->warpgroups[current().index / WARPGROUP]; }

struct Operand {
    uint32_t address, leading, stride;
    Swizzle swizzle;
    bool mn_major;

    Operand(uint64_t descriptor, bool mn_major)
        : address(uint32_t(descriptor & 0x3fff) << 4),
          leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
          stride(uint32_t(descriptor >> 32 & 0x3fff) << 4),
          swizzle(descriptor >> 62 ? Swizzle(4 - (descriptor >> 62)) : Swizzle::none),
          mn_major(mn_major) {}

    uint32_t span() const { return llama4_kernels::hopper::span_bytes(swizzle); }

    // Address of a chunk of 16 bytes. K-major: `row` of M or N, `chunk` along K. MN-major: `row` of K, `chunk` along M or N.
    uint32_t chunk_address(uint32_t row, uint32_t chunk) const {
        const uint32_t in_tile = row / 8 * stride + row % 8 * span();
        if (swizzle != Swizzle::none) {
            const uint32_t chunks = mn_major ? span() / 16 : ~0u;
            return llama4_kernels::hopper::swizzled(swizzle, address + in_tile + chunk / chunks * leading + chunk % chunks * 16);
        }
        return mn_major ? address + row / 8 * leading + row % 8 * 16 + chunk * stride : address + in_tile + chunk * leading;
    }

    // 16 bytes, once it is sure that nothing is wrong with reading them.
    const uint8_t* chunk_at(Block& block, uint32_t row, uint32_t chunk, const Product& product) const {
        const uint32_t at = chunk_address(row, chunk);
        const Site site = product.site;
        if (at < FIRST_SHARED_ADDRESS || at - FIRST_SHARED_ADDRESS + 16 > block.shared_bytes) {
            scheduler().fail(
                site, "out of bounds: wgmma reads past the block's " + std::to_string(block.shared_bytes) + " bytes of shared memory");
        }
        const uint8_t* bytes = block.shared.get() + (at - FIRST_SHARED_ADDRESS);
        if (block.owner_of(at) == Owner::written) scheduler().fail(site, "wgmma reads shared memory that a copy under way still writes");
        if (!block.is_copy_fenced(at, product.fence))
            scheduler().fail(site, "wgmma reads what cp.async wrote, and neither who copied nor all who multiply had a "
                                   "fence_async_proxy since");
        if (!block.is_fenced(bytes, 16))
            scheduler().fail(site, "wgmma reads plain writes to shared memory without a fence_async_proxy after them");
        return bytes;
    }
};

inline const std::array<float, 256>& e4m3_values() {
    static const std::array<float, 256> values = [] {
        std::array<float, 256> table{};
        for (int code = 0; code < 256; ++code) {
            __nv_fp8_e4m3 value;
            value.__x = __nv_fp8_storage_t(code);
            table[code] = float(value);
        }
        return table;
    }();
    return values;
}

inline void decode(const uint8_t* bytes, int element_bytes, float* values) {
    if (element_bytes == 1) {
        const auto& table = e4m3_values();
        for (int i = 0; i < 16; ++i) values[i] = table[bytes[i]];
        return;
    }
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = uint32_t(bytes[2 * i] | bytes[2 * i + 1] << 8) << 16;
        std::memcpy(&values[i], &bits, sizeof bits);
    }
}

// values[k][row] of an operand of `rows` rows of M or N.
template <int ROW_STRIDE>
void decode_operand(const Operand& operand, Block& block, int rows, const Product& product, float (*values)[ROW_STRIDE]) {
    const int per_chunk = 16 / product.element_bytes, k = product.k_bytes / product.element_bytes;
    float chunk_values[16];
    for (int row = 0; row < (operand.mn_major ? k : rows); ++row) {
        for (int chunk = 0; chunk < (operand.mn_major ? rows : k) / per_chunk; ++chunk) {
            decode(operand.chunk_at(block, row, chunk, product), product.element_bytes, chunk_values);
            for (int i = 0; i < per_chunk; ++i) {
                const int along = chunk * per_chunk + i;
                (operand.mn_major ? values[row][along] : values[along][row]) = chunk_values[i];
            }
        }
    }
}

inline void decode_registers(const Product& product, float (*values)[ROWS]) {
    using namespace llama4_kernels::hopper;
    const int elements = 16 / product.element_bytes;
    float thread_values[16];
    for (int thread = 0; thread < int(WARPGROUP); ++thread) {
        decode(reinterpret_cast<const uint8_t*>(product.a_registers[thread].data()), product.element_bytes, thread_values);
        for (int i = 0; i < elements; ++i) {
            values[operand_k(product.element_bytes, thread, i)][operand_row(product.element_bytes, thread, i)] = thread_values[i];
        }
    }
}

inline std::vector<InFlight>::iterator find_accumulators(Thread& thread, const float* registers) {
    return std::find_if(thread.accumulators.begin(), thread.accumulators.end(),
                        [&](const InFlight& held) { return held.registers == registers; });
}

// sums += aᵀ · b, in the order of k.
template <int COLUMNS>
void multiply(int k, const float (*a)[ROWS], const float (*b)[MAX_COLUMNS], float (*sums)[MAX_COLUMNS]) {
    for (int row = 0; row < ROWS; ++row) {
        float line[COLUMNS];
        std::memcpy(line, sums[row], sizeof line);
        for (int i = 0; i < k; ++i) {
            const float factor = a[i][row];
            for (int column = 0; column < COLUMNS; ++column) line[column] += factor * b[i][column];
        }
        std::memcpy(sums[row], line, sizeof line);
    }
}

// The same with sums of e4m3_sum_bits: a sum and its k addends are cut off where the largest of them has its last bit, and so is the
// result.
inline void multiply_in_short(int k, int columns, const float (*a)[ROWS], const float (*b)[MAX_COLUMNS], float (*sums)[MAX_COLUMNS]) {
    const auto last_bit = [](double largest) {
        return largest == 0 || std::isnan(largest) ? 1.0 : std::ldexp(1.0, std::ilogb(largest) - e4m3_sum_bits);
    };
    for (int row = 0; row < ROWS; ++row) {
        for (int column = 0; column < columns; ++column) {
            double addends[MAX_K + 1] = {sums[row][column]}, largest = 0, sum = 0;
            for (int i = 0; i < k; ++i) addends[i + 1] = double(a[i][row]) * b[i][column];
            for (int i = 0; i <= k; ++i) largest = std::max(largest, std::abs(addends[i]));
            const double unit = last_bit(largest);
            for (int i = 0; i <= k; ++i) sum += std::trunc(addends[i] / unit);
            sum *= unit;
            sums[row][column] = float(std::trunc(sum / last_bit(std::abs(sum))) * last_bit(std::abs(sum)));
        }
    }
}

inline void compute(const Product& product, Block& block, unsigned first_thread) {
    using namespace llama4_kernels::hopper;
    alignas(64) static float a[MAX_K][ROWS], b[MAX_K][MAX_COLUMNS], sums[ROWS][MAX_COLUMNS];
    if (product.a_in_registers) {
        decode_registers(product, a);
    } else {
        decode_operand(Operand(product.a, product.a_is_mn_major), block, ROWS, product, a);
    }
    decode_operand(Operand(product.b, product.b_is_mn_major), block, product.columns, product, b);

    const int values = product.columns / 2;
    for (int thread = 0; thread < int(WARPGROUP); ++thread) {
        const float* held = find_accumulators(block.threads[first_thread + thread], product.accumulators[thread])->values.data();
        for (int i = 0; i < values; ++i)
            sums[accumulator_row(thread, i)][accumulator_column(thread, i)] = product.accumulate ? held[i] : 0.0f;
    }
    const int k = product.k_bytes / product.element_bytes;
    const auto multiply_columns = product.columns <= 32    ? &multiply<32>
                                  : product.columns <= 64  ? &multiply<64>
                                  : product.columns <= 128 ? &multiply<128>
                                                           : &multiply<256>;
    if (e4m3_sum_bits && product.element_bytes == 1) {
        multiply_in_short(k, product.columns, a, b, sums);
    } else {
        multiply_columns(k, a, b, sums);
    }
    for (int thread = 0; thread < int(WARPGROUP); ++thread) {
        float* held = find_accumulators(block.threads[first_thread + thread], product.accumulators[thread])->values.data();
        for (int i = 0; i < values; ++i) held[i] = sums[accumulator_row(thread, i)][accumulator_column(thread, i)];
    }
}

// Give the accumulators back to a thread whose last product on them is complete.
inline void release(Thread& thread, float* registers) {
    const auto held = find_accumulators(thread, registers);
    if (--held->products) return;
    std::memcpy(held->registers, held->values.data(), held->values.size() * sizeof(float));
    std::swap(*held, thread.accumulators.back());
    thread.accumulators.pop_back();
}

inline void complete_groups(Warpgroup& group, Block& block, unsigned first_thread, int pending) {
    for (; int(group.groups.size()) > pending; group.groups.pop_front(), ++group.first_group) {
        for (; group.first < group.groups.front(); ++group.first, group.products.pop_front()) {
            const Product& product = *group.products.front();
            if (product.threads != WARPGROUP) scheduler().fail(product.site, "not all threads of the warpgroup issued this product");
            compute(product, block, first_thread);
            for (unsigned thread = 0; thread < WARPGROUP; ++thread)
                release(block.threads[first_thread + thread], product.accumulators[thread]);
        }
    }
}

inline bool same(const Product& x, const Product& y) {
    return x.columns == y.columns && x.k_bytes == y.k_bytes && x.element_bytes == y.element_bytes && x.a_in_registers == y.a_in_registers &&
           x.a_is_mn_major == y.a_is_mn_major && x.b_is_mn_major == y.b_is_mn_major && x.accumulate == y.accumulate && x.a == y.a &&
           x.b == y.b;
}

inline void issue(Product product, float* accumulators, const uint32_t* a_registers) {
    Thread& thread = current();
    Warpgroup& group = warpgroup();
    const uint64_t number = thread.products_issued++ - group.first;
    if (number == group.products.size()) group.products.push_back(std::make_unique<Product>(product));
    Product& shared = *group.products[number];
    if (!same(shared, product)) scheduler().fail(product.site, "wgmma: descriptors or shapes differ within the warpgroup");
    const unsigned lane = thread.index % WARPGROUP;
    ++shared.threads;
    shared.fence = std::min(shared.fence, thread.last_fence);
    shared.accumulators[lane] = accumulators;
    if (a_registers) std::copy_n(a_registers, 4, shared.a_registers[lane].begin());

    auto held = find_accumulators(thread, accumulators);
    if (held == thread.accumulators.end()) {
        if (!thread.product_fence)
            scheduler().fail(product.site, "wgmma_fence is missing between the last use of the accumulators and this product");
        thread.accumulators.push_back({accumulators, 0, std::vector<float>(accumulators, accumulators + product.columns / 2)});
        held = std::prev(thread.accumulators.end());
        std::memset(accumulators, POISON, held->values.size() * sizeof(float));
    } else if (int(held->values.size()) != product.columns / 2) {
        scheduler().fail(product.site, "wgmma: the accumulators are in use by a product of another shape");
    }
    ++held->products;
}

inline void check_no_product_reads(Block& block, uint32_t address, size_t bytes, Site site) {
    for (const Warpgroup& group : block.warpgroups) {
        for (const auto& product : group.products) {
            const auto reads = [&](uint64_t descriptor, bool mn_major, int rows) {
                const Operand operand(descriptor, mn_major);
                const int per_chunk = 16 / product->element_bytes, k = product->k_bytes / product->element_bytes;
                for (int row = 0; row < (mn_major ? k : rows); ++row) {
                    for (int chunk = 0; chunk < (mn_major ? rows : k) / per_chunk; ++chunk) {
                        const uint32_t at = operand.chunk_address(row, chunk);
                        if (at + 16 > address && at < address + bytes) return true;
                    }
                }
                return false;
            };
            if ((!product->a_in_registers && reads(product->a, product->a_is_mn_major, ROWS)) ||
                reads(product->b, product->b_is_mn_major, product->columns)) {
                scheduler().fail(site, "a copy to shared memory that the wgmma at " + product->site.text() + " may still read");
            }
        }
    }
}

template <int N, int BYTES>
void issue(float (&d)[N / 2], const uint64_t* a, const uint32_t* a_registers, uint64_t b, Major a_major, Major b_major, bool accumulate,
           Site site) {
    Product product;
    product.columns = N;
    product.k_bytes = 32;
    product.element_bytes = BYTES;
    product.a_in_registers = a_registers != nullptr;
    product.a_is_mn_major = a_major == Major::mn;
    product.b_is_mn_major = b_major == Major::mn;
    product.accumulate = accumulate;
    product.a = a ? *a : 0;
    product.b = b;
    product.site = site;
    issue(product, d, a_registers);
}

}  // namespace emulation

namespace llama4_kernels::hopper {

inline void wgmma_fence() { emulation::current().product_fence = true; }

inline void wgmma_commit(Site site = Site::here()) {
    emulation::Thread& thread = emulation::current();
    emulation::Warpgroup& group = emulation::warpgroup();
    const uint64_t number = thread.groups_committed++ - group.first_group;
    if (number == group.groups.size()) group.groups.push_back(thread.products_issued);
    if (group.groups[number] != thread.products_issued)
        emulation::scheduler().fail(site, "wgmma: the threads of the warpgroup commit different products");
}

template <int PENDING>
void wgmma_wait(Site site = Site::here()) {
    emulation::Thread& thread = emulation::current();
    emulation::Warpgroup& group = emulation::warpgroup();
    if (group.rendezvous.arrived == 0) group.pending = PENDING;
    if (group.pending != PENDING) emulation::scheduler().fail(site, "wgmma: the threads of the warpgroup wait for different groups");
    if (group.rendezvous.arrived + 1 == group.rendezvous.count) {
        emulation::complete_groups(group, *thread.block, thread.index / WARPGROUP * WARPGROUP, PENDING);
    }
    emulation::scheduler().arrive_and_wait(group.rendezvous, site, "wgmma_wait in all threads of the warpgroup");
    thread.product_fence = false;
}

template <int N>
void wgmma_e4m3(float (&d)[N / 2], const uint64_t& a, uint64_t b, bool accumulate, Site site = Site::here()) {
    emulation::issue<N, 1>(d, &a, nullptr, b, Major::k, Major::k, accumulate, site);
}

template <int N>
void wgmma_e4m3(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Site site = Site::here()) {
    emulation::issue<N, 1>(d, nullptr, a, b, Major::k, Major::k, accumulate, site);
}

template <int N, Major A = Major::k, Major B = Major::k>
void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Site site = Site::here()) {
    emulation::issue<N, 2>(d, &a, nullptr, b, A, B, accumulate, site);
}

template <int N, Major B = Major::k>
void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Site site = Site::here()) {
    emulation::issue<N, 2>(d, nullptr, a, b, Major::k, B, accumulate, site);
}

}  // namespace llama4_kernels::hopper
