// A block on the host: its threads, its shared memory, and what is under way in both.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "emulation/fiber.h"

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned WARP = 32;
constexpr unsigned WARPGROUP = 128;
constexpr size_t MAX_SHARED_BYTES = 227 << 10;
constexpr uint32_t FIRST_SHARED_ADDRESS = 1024;  // where the dynamic shared memory of a block without static one starts
constexpr int POISON = 0xff;                     // NaN in every floating-point type

// Where in the kernel's source a call stands; a default argument of the functions that can wait or fail.
struct Site {
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

    std::string text() const {
        const std::string path = file;
        return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
    }

    const char* file = "";
    int line = 0;
};

struct Block;
struct Cluster;

// What copies under way do with a byte of shared memory.
enum class Owner : uint8_t { nobody, written, read };

// cp.async and bulk stores of one thread, in groups that it ends with commit.
struct Transfer {
    std::function<void()> read;   // takes the source, and for a copy to shared memory writes it
    std::function<void()> write;  // makes a store visible in global memory
};
using TransferGroup = std::vector<Transfer>;

// Accumulators of one thread that products under way will write; the registers themselves hold NaN meanwhile.
struct InFlight {
    float* registers;
    unsigned products = 0;
    std::vector<float> values;
};

struct Thread {
    Block* block = nullptr;
    unsigned index = 0;
    bool done = false;

    Fiber* fiber = nullptr;

    Site waits_at;
    const char* waits_for = "";
    uint32_t waits_on = 0;  // a named barrier, or the address of an mbarrier
    unsigned waits_parity = 0;

    TransferGroup open_copies, open_stores;
    std::deque<TransferGroup> copies, stores, unwritten_stores;
    uint64_t copy_groups_completed = 0;
    uint64_t last_fence = 0;  // the number of its latest proxy fence among those of its block

    uint64_t products_issued = 0, groups_committed = 0;
    bool product_fence = false;
    std::vector<InFlight> accumulators;

    uint64_t cluster_phase = 0;
    int registers = 0;
};

// `count` threads meet.
struct Rendezvous {
    unsigned count = 0;
    unsigned arrived = 0;
    uint64_t generation = 0;
    std::vector<Thread*> waiting;
};

// What cp.async wrote last to a chunk of shared memory: by whom, and how many proxy fences its block had seen by then.
struct Copied {
    const Thread* by = nullptr;
    uint64_t fences = 0;
};

struct MemoryBarrier {
    unsigned arrivals = 0, pending = 0;
    int64_t bytes = 0;
    unsigned phase = 0;
    bool visible = false;  // to asynchronous copies
    std::vector<std::pair<Thread*, unsigned>> waiting;
};

// What lanes of a warp hand to one another; two rounds of values, so that a fast lane does not overwrite what a slow one still reads.
struct Exchange {
    unsigned mask;
    Rendezvous rendezvous;
    std::array<std::array<uint64_t, WARP>, 2> values{};
};

// A product of a warpgroup, collected from its threads.
struct Product {
    int columns = 0, k_bytes = 0, element_bytes = 0;
    bool a_in_registers = false, a_is_mn_major = false, b_is_mn_major = false, accumulate = false;
    uint64_t a = 0, b = 0;
    Site site;
    unsigned threads = 0;
    uint64_t fence = ~uint64_t(0);  // the earliest of its threads' latest proxy fences
    std::array<float*, WARPGROUP> accumulators{};
    std::array<std::array<uint32_t, 4>, WARPGROUP> a_registers{};
};

struct Warpgroup {
    std::deque<std::unique_ptr<Product>> products;  // not yet complete
    uint64_t first = 0;                             // the number of the first of them
    std::deque<uint64_t> groups;                    // number past the last product of each committed group
    uint64_t first_group = 0;
    int pending = 0;
    Rendezvous rendezvous{WARPGROUP};
};

struct Block {
    Block(dim3 index, unsigned threads, size_t shared_bytes)
        : index(index),
          threads(threads),
          exchanges(threads / WARP),
          warpgroups((threads + WARPGROUP - 1) / WARPGROUP),
          shared_bytes(shared_bytes),
          shared(allocate(shared_bytes), &std::free),
          fenced(shared_bytes, POISON),
          fence_of(shared_bytes / PAGE + 1),
          owners(shared_bytes / CHUNK + 1),
          copied(shared_bytes / CHUNK + 1) {
        std::memset(shared.get(), POISON, shared_bytes);
        for (unsigned i = 0; i < threads; ++i) {
            this->threads[i].block = this;
            this->threads[i].index = i;
        }
    }

    bool holds(const void* pointer) const {
        const auto* byte = static_cast<const uint8_t*>(pointer);
        return byte >= shared.get() && byte < shared.get() + shared_bytes;
    }

    uint32_t address(const void* pointer) const {
        return uint32_t(static_cast<const uint8_t*>(pointer) - shared.get()) + FIRST_SHARED_ADDRESS;
    }

    // An asynchronous unit writes to shared memory; a null source poisons.
    void write(uint32_t address, const void* from, size_t bytes) {
        const size_t begin = address - FIRST_SHARED_ADDRESS;
        for (uint8_t* to : {shared.get() + begin, fenced.data() + begin}) {
            from ? std::memcpy(to, from, bytes) : std::memset(to, POISON, bytes);
        }
        std::fill(copied.begin() + begin / CHUNK, copied.begin() + (begin + bytes + CHUNK - 1) / CHUNK, Copied{});
    }

    // cp.async of `thread` has written a chunk.
    void note_copy(uint32_t address, const Thread& thread) { copied[(address - FIRST_SHARED_ADDRESS) / CHUNK] = {&thread, proxy_fences}; }

    // Whether a product may read what cp.async wrote to a chunk: who copied has had a proxy fence since, or all who multiply, whose
    // earliest is given.
    bool is_copy_fenced(uint32_t address, uint64_t readers_fence) const {
        const Copied& last = copied[(address - FIRST_SHARED_ADDRESS) / CHUNK];
        return !last.by || std::max(last.by->last_fence, readers_fence) > last.fences;
    }

    void own(uint32_t address, size_t bytes, Owner owner) {
        const size_t begin = address - FIRST_SHARED_ADDRESS;
        std::fill(owners.begin() + begin / CHUNK, owners.begin() + (begin + bytes + CHUNK - 1) / CHUNK, owner);
    }

    Owner owner_of(uint32_t address) const { return owners[(address - FIRST_SHARED_ADDRESS) / CHUNK]; }

    bool is_owned(uint32_t address, size_t bytes) const {
        const size_t begin = address - FIRST_SHARED_ADDRESS;
        const auto first = owners.begin() + begin / CHUNK, last = owners.begin() + (begin + bytes + CHUNK - 1) / CHUNK;
        return std::any_of(first, last, [](Owner owner) { return owner != Owner::nobody; });
    }

    // Whether an asynchronous unit may read these bytes: they did not change since the last proxy fence of any thread.
    bool is_fenced(const void* pointer, size_t bytes) {
        const size_t begin = size_t(static_cast<const uint8_t*>(pointer) - shared.get());
        if (std::memcmp(shared.get() + begin, fenced.data() + begin, bytes) == 0) return true;
        for (size_t page = begin / PAGE; page <= (begin + bytes - 1) / PAGE; ++page) {
            const size_t start = page * PAGE, size = std::min(PAGE, shared_bytes - start);
            if (std::memcmp(shared.get() + start, fenced.data() + start, size) == 0) continue;
            if (fence_of[page] == proxy_fences) return false;
            std::memcpy(fenced.data() + start, shared.get() + start, size);
            fence_of[page] = proxy_fences;
        }
        return true;
    }

    dim3 index;
    Cluster* cluster = nullptr;
    std::vector<Thread> threads;
    std::vector<std::deque<Exchange>> exchanges;  // of each warp, one for each mask
    std::vector<Warpgroup> warpgroups;
    std::array<Rendezvous, 16> barriers{};
    std::unordered_map<uint32_t, MemoryBarrier> memory_barriers;
    size_t shared_bytes;
    std::unique_ptr<uint8_t, decltype(&std::free)> shared;
    uint64_t proxy_fences = 0;
    bool must_wait = false;  // until a thread has called wait_for_dependencies

private:
    static constexpr size_t PAGE = 128;
    static constexpr size_t CHUNK = 16;

    static uint8_t* allocate(size_t bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 1024, bytes) != 0) throw std::bad_alloc();
        return static_cast<uint8_t*>(memory);
    }

    std::vector<uint8_t> fenced;     // the bytes as the last proxy fence or asynchronous write left them
    std::vector<uint64_t> fence_of;  // of each page: how many proxy fences there had been when it was last taken over
    std::vector<Owner> owners;       // of each chunk
    std::vector<Copied> copied;      // of each chunk, until an asynchronous unit writes it
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    Rendezvous rendezvous;
};

// A copy to shared memory under way.
struct Load {
    std::function<void()> complete;
    Block* block;
    Site site;
};

inline bool has_ended(const Block& block) {
    return std::all_of(block.threads.begin(), block.threads.end(), [](const Thread& thread) { return thread.done; });
}

}  // namespace emulation
