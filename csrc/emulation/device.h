// CUDA on the host, for tests without a GPU: blocks run one after another, each thread of a block as a fiber.
//
// What a GPU leaves undefined shows: shared memory starts as NaNs and is exactly as large as asked for (so that AddressSanitizer guards
// it), threads take turns in an order that changes from round to round, and when all of them wait the launch ends with an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#undef __device__
#undef __global__
#undef __launch_bounds__
#define __device__
#define __global__
#define __launch_bounds__(...)

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned WARP = 32;

// All of `count` threads must arrive before any goes on.
struct Barrier {
    unsigned count;
    unsigned arrived = 0;
    uint64_t generation = 0;
};

struct Warp {
    Barrier barrier{WARP};
    std::array<uint32_t, WARP> values{};
};

class Block {
public:
    Block(unsigned threads, size_t shared_bytes, std::function<void()> kernel)
        : barrier{threads}, warps(threads / WARP), shared(allocate(shared_bytes), &std::free),
          kernel_(std::move(kernel)), fibers_(threads), main_{} {
        std::memset(shared.get(), 0xff, shared_bytes);
    }

    void run(std::minstd_rand& random) {
        running_ = this;
        for (Fiber& fiber : fibers_) start(fiber);
        for (size_t alive = fibers_.size(); alive > 0;) {
            progress_ = false;
            take_turns(random() % fibers_.size(), alive);
            if (!progress_) throw std::runtime_error(std::string("deadlock: all threads wait, one of them at ") + waits_at_);
        }
    }

    void wait(Barrier& at, const char* name) {
        const uint64_t generation = at.generation;
        progress_ = true;
        if (++at.arrived == at.count) {
            at.arrived = 0;
            ++at.generation;
            return;
        }
        while (at.generation == generation) {
            waits_at_ = name;
            swapcontext(&fibers_[threadIdx.x].context, &main_);
        }
        progress_ = true;
    }

    static Block& running() { return *running_; }

    Barrier barrier;
    std::vector<Warp> warps;
    std::unique_ptr<void, decltype(&std::free)> shared;

private:
    struct Fiber {
        ucontext_t context{};
        std::unique_ptr<char[]> stack = std::make_unique<char[]>(STACK_BYTES);
        bool done = false;
    };

    static void* allocate(size_t bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 1024, bytes) != 0) throw std::bad_alloc();
        return memory;
    }

    void start(Fiber& fiber) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = &main_;
        makecontext(&fiber.context, &Block::body, 0);
    }

    static void body() {
        try {
            running_->kernel_();
        } catch (...) {
            running_->error_ = std::current_exception();
        }
        running_->fibers_[threadIdx.x].done = true;
        running_->progress_ = true;
    }

    void take_turns(size_t first, size_t& alive) {
        for (size_t turn = 0; turn < fibers_.size(); ++turn) {
            Fiber& fiber = fibers_[(first + turn) % fibers_.size()];
            if (fiber.done) continue;
            threadIdx = dim3(unsigned((first + turn) % fibers_.size()), 0, 0);
            swapcontext(&main_, &fiber.context);
            if (error_) std::rethrow_exception(error_);
            alive -= fiber.done;
        }
    }

    static inline Block* running_ = nullptr;

    std::function<void()> kernel_;
    std::vector<Fiber> fibers_;
    ucontext_t main_;
    std::exception_ptr error_;
    const char* waits_at_ = "";
    bool progress_ = false;  // whether any thread passed or reached a barrier, or ended, in this round of turns
};

inline void* shared_memory() { return Block::running().shared.get(); }

inline Warp& warp() { return Block::running().warps[threadIdx.x / WARP]; }

// Every lane's value, in every lane.
inline std::array<uint32_t, WARP> gather_lanes(unsigned mask, uint32_t value, const char* name) {
    if (mask != 0xffffffffu) throw std::invalid_argument(std::string(name) + " is emulated for whole warps only");
    warp().values[threadIdx.x % WARP] = value;
    Block::running().wait(warp().barrier, name);
    const auto values = warp().values;
    Block::running().wait(warp().barrier, name);
    return values;
}

inline void run(const char* op, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    if (block.x % WARP || block.x > 1024 || block.y * block.z != 1) throw std::invalid_argument(std::string(op) + ": needs 1-D blocks of whole warps");
    static std::minstd_rand random;
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                Block(block.x, shared_bytes, kernel).run(random);
            }
        }
    }
}

template <class To, class From>
To bits(From value) {
    To result;
    static_assert(sizeof(To) == sizeof(From));
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

}  // namespace emulation

using std::max;

inline unsigned __float_as_uint(float value) { return emulation::bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return emulation::bits<float>(value); }

inline void __syncthreads() { emulation::Block::running().wait(emulation::Block::running().barrier, "__syncthreads"); }

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    const auto values = emulation::gather_lanes(mask, value, "__reduce_max_sync");
    return *std::max_element(values.begin(), values.end());
}

inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
    const auto values = emulation::gather_lanes(mask, emulation::bits<uint32_t>(value), "__shfl_xor_sync");
    return emulation::bits<float>(values[(threadIdx.x % emulation::WARP) ^ unsigned(distance)]);
}

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
