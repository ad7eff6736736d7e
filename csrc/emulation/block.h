// The threads of one block, of the blocks of one cluster or of several of them, and the order in which they take turns.
//
// A thread runs until it has to wait. Who goes on is drawn at random among those that can; only when nobody can, one of the asynchronous copies
// under way is completed, again drawn at random: as late as the program allows. When there is no copy either, the launch ends with an error
// that says where each thread waits.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
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
          owners(shared_bytes / CHUNK + 1) {
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
        uint8_t* const copies[] = {shared.get() + (address - FIRST_SHARED_ADDRESS), fenced.data() + (address - FIRST_SHARED_ADDRESS)};
        for (uint8_t* to : copies) from ? std::memcpy(to, from, bytes) : std::memset(to, POISON, bytes);
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

class Scheduler {
public:
    // Clusters that run together, from start to end.
    void run(std::vector<Cluster> clusters, const std::function<void()>& kernel) {
        kernel_ = &kernel;
        clusters_ = std::move(clusters);
        alive_ = 0;
        for (Cluster& cluster : clusters_) {
            for (const auto& block : cluster.blocks) {
                block->cluster = &cluster;
                cluster.rendezvous.count += unsigned(block->threads.size());
                for (Thread& thread : block->threads) {
                    if (alive_ == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>(&Scheduler::body));
                    thread.fiber = fibers_[alive_++].get();
                    ready_.push_back(&thread);
                }
            }
        }
        Thread* first = next();
        enter(*first);
        Fiber::change(main_, *first->fiber);
        std::exception_ptr error = std::exchange(error_, nullptr);
        if (!error && alive_ > 0) error = std::make_exception_ptr(std::runtime_error(deadlock()));
        forget(bool(error));
        if (error) std::rethrow_exception(error);
    }

    // Keep those of about a block: a process may have 65530 mappings, two a stack, and each library that it loads has a scheduler.
    void give_back_stacks() { fibers_.resize(std::min(fibers_.size(), KEPT_STACKS)); }

    // The running thread waits until it is woken.
    void wait(Site site, const char* waits_for, uint32_t waits_on = 0, unsigned parity = 0) {
        Thread& self = *current_;
        self.waits_at = site;
        self.waits_for = waits_for;
        self.waits_on = waits_on;
        self.waits_parity = parity;
        leave(self);
    }

    void wake(Thread& thread) {
        idle_rounds_ = 0;
        ready_.push_back(&thread);
    }

    // The running thread looks again at something that another one may change: let the others go first.
    void poll(Site site, const char* waits_for, uint32_t waits_on = 0, unsigned parity = 0) {
        polling_.push_back(current_);
        wait(site, waits_for, waits_on, parity);
    }

    // True where all have arrived, in the last of them.
    bool arrive(Rendezvous& at) {
        if (++at.arrived < at.count) return false;
        at.arrived = 0;
        ++at.generation;
        for (Thread* thread : at.waiting) wake(*thread);
        at.waiting.clear();
        return true;
    }

    void arrive_and_wait(Rendezvous& at, Site site, const char* waits_for, uint32_t waits_on = 0) {
        if (arrive(at)) return;
        at.waiting.push_back(current_);
        wait(site, waits_for, waits_on);
    }

    Thread& current() { return *current_; }

    // The block of the cluster that a shared-memory pointer lies in.
    Block& owner(const void* pointer, Site site, const char* what) {
        if (current_->block->holds(pointer)) return *current_->block;
        for (const auto& block : cluster().blocks) {
            if (block->holds(pointer)) return *block;
        }
        fail(site, std::string(what) + " is not in shared memory, or past its end");
    }

    // 0 to count - 1, in an order drawn at random.
    std::vector<unsigned> shuffled(unsigned count) {
        std::vector<unsigned> numbers(count);
        std::iota(numbers.begin(), numbers.end(), 0u);
        std::shuffle(numbers.begin(), numbers.end(), random_);
        return numbers;
    }

    // Of the running thread.
    Cluster& cluster() { return *current_->block->cluster; }
    Block& block(unsigned rank) { return *cluster().blocks.at(rank); }
    unsigned rank() {
        const auto& blocks = cluster().blocks;
        return unsigned(std::find_if(blocks.begin(), blocks.end(), [&](auto& block) { return block.get() == current_->block; }) -
                        blocks.begin());
    }
    unsigned blocks() { return unsigned(cluster().blocks.size()); }

    [[noreturn]] void fail(Site site, const std::string& what) {
        std::ostringstream text;
        text << site.text() << ": " << what << " (thread " << current_->index << " of block " << current_->block->index.x << ")";
        throw std::runtime_error(text.str());
    }

    std::vector<Load> loads;

private:
    static constexpr int MAX_IDLE_ROUNDS = 1000;
    static constexpr size_t KEPT_STACKS = 512;

    static void body();

    void enter(Thread& thread) {
        current_ = &thread;
        threadIdx = dim3(thread.index, 0, 0);
        blockIdx = thread.block->index;
    }

    void leave(Thread& self) {
        Thread* thread = next();
        if (thread == &self) return;
        if (thread) enter(*thread);
        Fiber::change(*self.fiber, thread ? *thread->fiber : main_);
    }

    // Who goes on; null where nobody can.
    Thread* next() {
        for (;;) {
            if (!ready_.empty()) return take(ready_);
            const bool copied = !loads.empty();
            if (copied) complete(take(loads));
            if (!copied && (polling_.empty() || ++idle_rounds_ > MAX_IDLE_ROUNDS)) return nullptr;
            ready_.insert(ready_.end(), polling_.begin(), polling_.end());
            polling_.clear();
        }
    }

    // In the name of a thread of the copy's block, whoever runs.
    void complete(const Load& load) {
        struct Restored {
            Thread *&current, *running = current;
            ~Restored() { current = running; }
        } restored{current_};
        current_ = &load.block->threads.front();
        load.complete();
    }

    template <class T>
    T take(std::vector<T>& from) {
        std::swap(from[random_() % from.size()], from.back());
        T taken = std::move(from.back());
        from.pop_back();
        return taken;
    }

    void end_thread();
    void end_block(Block& block);

    // Leave no trace of a launch; fibers that an error stopped half way cannot be used again.
    void forget(bool failed) {
        if (failed) fibers_.clear();
        ready_.clear();
        polling_.clear();
        loads.clear();
        clusters_.clear();
        idle_rounds_ = 0;
    }

    static std::string describe(const Thread& thread) {
        if (thread.done) return "ended";
        std::ostringstream text;
        text << "waits at " << thread.waits_at.text() << " for " << thread.waits_for;
        const auto barrier = thread.block->memory_barriers.find(thread.waits_on);
        if (barrier != thread.block->memory_barriers.end()) {
            const MemoryBarrier& at = barrier->second;
            text << " at shared byte " << thread.waits_on - FIRST_SHARED_ADDRESS << ", parity " << thread.waits_parity
                 << "; it is in phase " << at.phase << " and lacks " << at.pending << " of " << at.arrivals << " arrivals and " << at.bytes
                 << " bytes";
        } else if (thread.waits_on) {
            text << " " << thread.waits_on;
        }
        return text.str();
    }

    std::string deadlock() const {
        std::ostringstream text;
        text << "deadlock";
        for (const Cluster& cluster : clusters_) {
            for (const auto& block : cluster.blocks) {
                std::map<std::string, std::vector<unsigned>> places;
                for (const Thread& thread : block->threads) places[describe(thread)].push_back(thread.index);
                for (const auto& [place, threads] : places) {
                    text << "\n  block " << block->index.x << ", " << threads.size() << " threads from " << threads.front() << " to "
                         << threads.back() << ": " << place;
                }
            }
        }
        return text.str();
    }

    Thread* current_ = nullptr;
    const std::function<void()>* kernel_ = nullptr;
    std::vector<Cluster> clusters_;
    std::vector<Thread*> ready_, polling_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    Fiber main_;
    std::exception_ptr error_;
    std::minstd_rand random_;
    size_t alive_ = 0;
    int idle_rounds_ = 0;
};

inline Scheduler& scheduler() {
    static Scheduler scheduler;
    return scheduler;
}

inline Thread& current() { return scheduler().current(); }

inline void Scheduler::body() {
    Scheduler& self = scheduler();
    for (;;) {
        Thread* thread = nullptr;
        try {
            (*self.kernel_)();
            self.end_thread();
            thread = self.next();
        } catch (...) {
            self.error_ = std::current_exception();
        }
        Fiber& fiber = *self.current_->fiber;
        if (thread) self.enter(*thread);
        Fiber::change(fiber, thread ? *thread->fiber : self.main_);
    }
}

inline void Scheduler::end_thread() {
    const Site end;
    if (!current_->open_stores.empty() || !current_->stores.empty())
        fail(end, "a thread ends before its bulk stores have read shared memory");
    if (!current_->accumulators.empty()) fail(end, "a thread ends with products of wgmma under way");
    for (const TransferGroup& group : current_->unwritten_stores) {
        for (const Transfer& store : group) store.write();
    }
    current_->done = true;
    --alive_;
    const auto& threads = current_->block->threads;
    if (std::all_of(threads.begin(), threads.end(), [](const Thread& thread) { return thread.done; })) end_block(*current_->block);
}

inline void Scheduler::end_block(Block& block) {
    const Site end;
    for (const Load& load : loads) {
        if (load.block == &block) fail(load.site, "the block ends with this copy to its shared memory under way");
    }
    for (const auto& [address, barrier] : block.memory_barriers) {
        if (barrier.bytes != 0) fail(end, "the block ends with " + std::to_string(barrier.bytes) + " bytes expected at an mbarrier");
    }
    for (size_t id = 0; id < block.barriers.size(); ++id) {
        if (block.barriers[id].arrived)
            fail(end, "the block ends with " + std::to_string(block.barriers[id].arrived) + " threads at barrier " + std::to_string(id));
    }
    unsigned registers = 0;
    for (const Thread& thread : block.threads) registers += unsigned(thread.registers);
    const unsigned threads = unsigned(block.threads.size());
    const unsigned at_launch = std::min(255u, (65536 / threads) & ~7u);
    if (registers > at_launch * threads)
        fail(end,
             "setmaxnreg gives out " + std::to_string(registers) + " registers, the launch had " + std::to_string(at_launch * threads));
}

}  // namespace emulation
