// The order in which threads take turns: those of a block, of the blocks of a cluster, or of several clusters.
//
// A thread runs until it has to wait. Who goes on is drawn at random among those that can; only when nobody can, one of the asynchronous
// copies under way is completed, again drawn at random: as late as the program allows. When there is no copy either, the launch ends with
// an error that says where each thread waits.
#pragma once

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation/block.h"

namespace emulation {

inline std::minstd_rand dice;  // goes on from launch to launch, so that every run tries another order

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
    void poll(Site site, const char* waits_for) {
        polling_.push_back(current_);
        wait(site, waits_for);
    }

    // The running thread waits for `ahead`, which runs when nobody can go on without it.
    void wait_for_ahead(Site site, std::function<void()> ahead) {
        ahead_ = std::move(ahead);
        behind_.push_back(current_);
        wait(site, "the kernel ahead");
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
        std::shuffle(numbers.begin(), numbers.end(), dice);
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
            if (!loads.empty()) {
                complete(take(loads));
            } else if (!behind_.empty()) {
                std::exchange(ahead_, {})();
                ready_ = std::exchange(behind_, {});
            } else if (polling_.empty() || ++idle_rounds_ > MAX_IDLE_ROUNDS) {
                return nullptr;
            }
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
        std::swap(from[dice() % from.size()], from.back());
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
        behind_.clear();
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
    std::vector<Thread*> ready_, polling_, behind_;
    std::function<void()> ahead_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    Fiber main_;
    std::exception_ptr error_;
    size_t alive_ = 0;
    int idle_rounds_ = 0;
};

// Of a launch that runs while a thread of another one waits for it.
inline Scheduler* innermost = nullptr;

inline Scheduler& scheduler() {
    static Scheduler outermost;
    return innermost ? *innermost : outermost;
}

inline Thread& current() { return scheduler().current(); }

// Block `rank` of the cluster, to reach its shared memory, which is only there while the block runs.
inline Block& peer(unsigned rank, Site site, const char* what) {
    Block& block = scheduler().block(rank);
    const auto refuse = [&](const char* why) {
        scheduler().fail(site, std::string(what) + " block " + std::to_string(rank) + " of the cluster, which " + why);
    };
    if (has_ended(block)) refuse("has ended");
    if (&block != current().block && scheduler().cluster().rendezvous.generation == 0)
        refuse("may not have begun: no barrier of the cluster came before");
    return block;
}

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
    if (has_ended(*current_->block)) end_block(*current_->block);
}

inline void Scheduler::end_block(Block& block) {
    const Site end;
    for (const Load& load : loads) {
        if (load.block == &block) fail(load.site, "the block ends with this copy to its shared memory under way");
    }
    for (const auto& [address, barrier] : block.memory_barriers) {
        if (barrier.bytes != 0) fail(end, "the block ends with " + std::to_string(barrier.bytes) + " bytes expected at an mbarrier");
    }
    if (block.must_wait)
        fail(end, "the block of a dependent launch ends without wait_for_dependencies: the next launch takes the one ahead for ended");
    for (size_t id = 0; id < block.barriers.size(); ++id) {
        if (block.barriers[id].arrived)
            fail(end, "the block ends with " + std::to_string(block.barriers[id].arrived) + " threads at barrier " + std::to_string(id));
    }
    std::memset(block.shared.get(), POISON, block.shared_bytes);  // for those that still read it
    unsigned registers = 0;
    for (const Thread& thread : block.threads) registers += unsigned(thread.registers);
    const unsigned threads = unsigned(block.threads.size());
    const unsigned at_launch = std::min(255u, (65536 / threads) & ~7u);
    if (registers > at_launch * threads)
        fail(end,
             "setmaxnreg gives out " + std::to_string(registers) + " registers, the launch had " + std::to_string(at_launch * threads));
}

}  // namespace emulation
