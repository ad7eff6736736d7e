// Host twin of hopper/barrier.cuh.
#pragma once

#include "emulation/scheduler.h"

namespace emulation {

inline MemoryBarrier& memory_barrier(const void* word, Site site) {
    Block& block = scheduler().owner(word, site, "the mbarrier");
    const auto found = block.memory_barriers.find(block.address(word));
    if (found == block.memory_barriers.end()) scheduler().fail(site, "the mbarrier was not initialised");
    uint64_t stored;
    std::memcpy(&stored, word, sizeof stored);
    if (stored != block.address(word)) scheduler().fail(site, "the mbarrier was overwritten");
    return found->second;
}

inline void complete_phase_if_over(MemoryBarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    for (auto& [thread, parity] : std::exchange(barrier.waiting, {})) {
        if ((barrier.phase & 1) != parity) scheduler().wake(*thread);
        else barrier.waiting.emplace_back(thread, parity);
    }
}

inline void arrive(const void* word, Site site, unsigned arrivals = 1) {
    MemoryBarrier& barrier = memory_barrier(word, site);
    if (barrier.pending < arrivals)
        scheduler().fail(site, "more arrivals at the mbarrier than the " + std::to_string(barrier.arrivals) + " of its phase");
    barrier.pending -= arrivals;
    complete_phase_if_over(barrier);
}

inline void complete_bytes(const void* word, size_t bytes, Site site) {
    MemoryBarrier& barrier = memory_barrier(word, site);
    barrier.bytes -= int64_t(bytes);
    complete_phase_if_over(barrier);
}

}  // namespace emulation

namespace llama4_kernels::hopper {

using emulation::Site;

inline uint32_t shared_address(const void* pointer) {
    return emulation::scheduler().owner(pointer, Site::here(), "the operand").address(pointer);
}

struct Barrier {
    void init(unsigned arrivals, Site site = Site::here()) {
        emulation::Block& block = emulation::scheduler().owner(this, site, "the mbarrier");
        if (reinterpret_cast<uintptr_t>(this) % 8) emulation::scheduler().fail(site, "the mbarrier's address is not a multiple of 8");
        if (arrivals == 0 || arrivals >= 1u << 20)
            emulation::scheduler().fail(site, "an mbarrier of " + std::to_string(arrivals) + " arrivals");
        emulation::MemoryBarrier barrier;
        barrier.arrivals = barrier.pending = arrivals;
        if (!block.memory_barriers.emplace(block.address(this), barrier).second)
            emulation::scheduler().fail(site, "the mbarrier is initialised twice");
        state = block.address(this);
    }

    void arrive(Site site = Site::here()) { emulation::arrive(this, site); }

    void arrive_for(unsigned arrivals, Site site = Site::here()) { emulation::arrive(this, site, arrivals); }

    void arrive_expect(unsigned bytes, Site site = Site::here()) {
        emulation::MemoryBarrier& barrier = emulation::memory_barrier(this, site);
        barrier.bytes += bytes;
        if (barrier.bytes >= 1 << 20) emulation::scheduler().fail(site, "an mbarrier expects 2^20 bytes or more");
        emulation::arrive(this, site);
    }

    void arrive_remote(unsigned rank, Site site = Site::here()) {
        emulation::Block& block = emulation::peer(rank, site, "an arrival in");
        emulation::arrive(block.shared.get() + (shared_address(this) - emulation::FIRST_SHARED_ADDRESS), site);
    }

    void wait(unsigned parity, Site site = Site::here()) {
        if (is_complete(parity, site)) return;
        emulation::memory_barrier(this, site).waiting.emplace_back(&emulation::current(), parity);
        emulation::scheduler().wait(site, "an mbarrier", uint32_t(state), parity);
    }

    uint64_t state;

private:
    bool is_complete(unsigned parity, Site site) {
        if (parity > 1) emulation::scheduler().fail(site, "the parity " + std::to_string(parity) + " is neither 0 nor 1");
        if (!emulation::current().block->holds(this))
            emulation::scheduler().fail(site, "an mbarrier of another block can only be arrived at");
        return (emulation::memory_barrier(this, site).phase & 1) != parity;
    }
};

inline void fence_barrier_init() {
    for (auto& [address, barrier] : emulation::current().block->memory_barriers) barrier.visible = true;
}

inline emulation::Rendezvous& named_barrier(unsigned id, unsigned threads, Site site) {
    if (id >= 16 || threads == 0 || threads % WARP || threads > blockDim.x) {
        emulation::scheduler().fail(site, "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
    }
    emulation::Rendezvous& barrier = emulation::current().block->barriers[id];
    if (barrier.arrived == 0) barrier.count = threads;
    if (barrier.count != threads) {
        emulation::scheduler().fail(site, "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, others say " +
                                              std::to_string(barrier.count));
    }
    return barrier;
}

inline void named_barrier_sync(unsigned id, unsigned threads, Site site = Site::here()) {
    emulation::scheduler().arrive_and_wait(named_barrier(id, threads, site), site, "named barrier", id);
}

inline void named_barrier_arrive(unsigned id, unsigned threads, Site site = Site::here()) {
    emulation::scheduler().arrive(named_barrier(id, threads, site));
}

}  // namespace llama4_kernels::hopper
