// CUDA's intrinsics as kernels use them: the block's barrier, warp shuffles, votes and reductions, atomics, and bit and arithmetic
// functions.
#pragma once

#include <cmath>

#include "emulation/scheduler.h"

namespace emulation {

template <class To, class From>
To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// Every lane's value, in every lane of `mask`.
inline std::array<uint64_t, WARP> exchange(unsigned mask, uint64_t value, Site site, const char* name) {
    Thread& thread = current();
    const unsigned lane = thread.index % WARP;
    if (!(mask >> lane & 1)) scheduler().fail(site, std::string(name) + ": the mask leaves out the lane that calls");
    auto& exchanges = thread.block->exchanges[thread.index / WARP];
    auto found = std::find_if(exchanges.begin(), exchanges.end(), [&](const Exchange& exchange) { return exchange.mask == mask; });
    if (found == exchanges.end()) found = exchanges.insert(found, Exchange{mask, Rendezvous{unsigned(__builtin_popcount(mask))}});
    auto& values = found->values[found->rendezvous.generation % 2];
    values[lane] = value;
    scheduler().arrive_and_wait(found->rendezvous, site, name);
    return values;
}

template <class T>
uint64_t to_lane(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return word;
}

template <class T>
T from_lane(uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

template <class T>
T shuffle(unsigned mask, T value, int from, Site site) {
    const auto values = exchange(mask, to_lane(value), site, "a shuffle");
    return from >= 0 && from < int(WARP) && (mask >> from & 1) ? from_lane<T>(values[from]) : value;
}

// This lane's part of a warp cut into parts of `width` lanes.
inline int part(int width) { return int(current().index % WARP) / width * width; }

template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine, Site site) {
    const auto values = exchange(mask, to_lane(value), site, "a reduction");
    bool first = true;
    T result{};
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(mask >> lane & 1)) continue;
        result = first ? from_lane<T>(values[lane]) : combine(result, from_lane<T>(values[lane]));
        first = false;
    }
    return result;
}

template <class T, class Combine>
T atomic(T* at, Combine combine) {
    const T old = *at;
    *at = combine(old);
    return old;
}

}  // namespace emulation

using std::max;
using std::min;

inline void __syncthreads(emulation::Site site = emulation::Site::here()) {
    emulation::Rendezvous& barrier = emulation::current().block->barriers[0];
    barrier.count = blockDim.x;
    emulation::scheduler().arrive_and_wait(barrier, site, "__syncthreads");
}

inline void __syncwarp(unsigned mask = ~0u, emulation::Site site = emulation::Site::here()) {
    emulation::exchange(mask, 0, site, "__syncwarp");
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, emulation::Site site = emulation::Site::here()) {
    return emulation::shuffle(mask, value, emulation::part(width) + lane % width, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, emulation::Site site = emulation::Site::here()) {
    return emulation::shuffle(mask, value, int(emulation::current().index % emulation::WARP) ^ bits, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, emulation::Site site = emulation::Site::here()) {
    const int lane = int(emulation::current().index % emulation::WARP), from = lane - int(by);
    return emulation::shuffle(mask, value, from < emulation::part(width) ? lane : from, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, emulation::Site site = emulation::Site::here()) {
    const int lane = int(emulation::current().index % emulation::WARP), from = lane + int(by);
    return emulation::shuffle(mask, value, from >= emulation::part(width) + width ? lane : from, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
    const auto values = emulation::exchange(mask, predicate != 0, site, "a vote");
    unsigned result = 0;
    for (unsigned lane = 0; lane < emulation::WARP; ++lane) result |= unsigned((mask >> lane & 1) && values[lane]) << lane;
    return result;
}

inline int __any_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
    return __ballot_sync(mask, predicate, site) == mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, emulation::Site site = emulation::Site::here()) {
    const auto values = emulation::exchange(mask, emulation::to_lane(value), site, "a match");
    unsigned result = 0;
    for (unsigned lane = 0; lane < emulation::WARP; ++lane)
        result |= unsigned((mask >> lane & 1) && values[lane] == emulation::to_lane(value)) << lane;
    return result;
}

template <class T>
T __reduce_max_sync(unsigned mask, T value, emulation::Site site = emulation::Site::here()) {
    return emulation::reduce(mask, value, [](T a, T b) { return std::max(a, b); }, site);
}

template <class T>
T __reduce_min_sync(unsigned mask, T value, emulation::Site site = emulation::Site::here()) {
    return emulation::reduce(mask, value, [](T a, T b) { return std::min(a, b); }, site);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, emulation::Site site = emulation::Site::here()) {
    return emulation::reduce(mask, value, [](T a, T b) { return T(a + b); }, site);
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, emulation::Site site = emulation::Site::here()) {
    return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; }, site);
}

inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, emulation::Site site = emulation::Site::here()) {
    return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a ^ b; }, site);
}

template <class T>
T atomicAdd(T* at, T value) {
    return emulation::atomic(at, [&](T old) { return T(old + value); });
}

inline unsigned atomicInc(unsigned* at, unsigned last) {
    return emulation::atomic(at, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

template <class T>
T atomicMax(T* at, T value) {
    return emulation::atomic(at, [&](T old) { return std::max(old, value); });
}

template <class T>
T atomicMin(T* at, T value) {
    return emulation::atomic(at, [&](T old) { return std::min(old, value); });
}

template <class T>
T atomicExch(T* at, T value) {
    return emulation::atomic(at, [&](T) { return value; });
}

template <class T>
T atomicCAS(T* at, T expected, T value) {
    return emulation::atomic(at, [&](T old) { return old == expected ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* from) {
    return *from;
}

template <class T>
T __ldcg(const T* from) {
    return *from;
}

// Time that passes whenever it is looked at, and says nothing of a GPU's.
inline long long clock64() {
    static long long cycles = 0;
    return ++cycles;
}

inline unsigned __float_as_uint(float value) { return emulation::bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return emulation::bits<float>(value); }
inline int __float_as_int(float value) { return emulation::bits<int>(value); }
inline float __int_as_float(int value) { return emulation::bits<float>(value); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }

// The larger of each half.
inline unsigned __vmaxu2(unsigned a, unsigned b) { return std::max(a & 0xffff0000u, b & 0xffff0000u) | std::max(a & 0xffffu, b & 0xffffu); }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
