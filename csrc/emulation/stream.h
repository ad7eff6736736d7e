// Launches in the order of a stream. Each runs at once; or they are held, and a dependent one then begins before the one ahead of it, which
// runs when nobody can go on without it: as late as programmatic dependent launch allows.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "emulation/scheduler.h"

namespace emulation {

class Stream {
public:
    void submit(bool dependent, std::function<void()> run) {
        launches_.push_back({std::move(run), dependent, false, false});
        if (!held_) finish();
    }

    // From now on launches wait for finish().
    void hold() { held_ = true; }

    // Run what is held, the last launch first where they are dependent. Their arguments must still be there.
    void finish() {
        struct Emptied {
            Stream& stream;
            ~Emptied() {
                stream.launches_.clear();
                stream.running_ = NONE;
                stream.held_ = false;
            }
        } emptied{*this};
        run_through(int(launches_.size()) - 1);
    }

    // The running thread waits for what its launch depends on.
    void wait_for_ahead(Site site) {
        const int ahead = running_ - 1;
        if (ahead < 0 || !launches_[running_].dependent || launches_[ahead].begun) return;
        scheduler().wait_for_ahead(site, [this, ahead] { run_through(ahead); });
    }

    // The running thread reads what was written before the launch ahead of its own, which is to wait before it launches dependents.
    void ahead_has_waited(Site site) {
        const int ahead = running_ - 1, before = ahead - 1;
        if (ahead < 0 || !launches_[running_].dependent || launches_[ahead].begun) return;
        launches_[ahead].relied_on = true;
        if (before < 0 || launches_[before].begun) return;
        scheduler().wait_for_ahead(site, [this, before] { run_through(before); });
    }

    // Whether the launch behind the running one takes it to have waited already.
    bool is_relied_on() const { return launches_[running_].relied_on; }

private:
    static constexpr int NONE = -1;

    struct Launch {
        std::function<void()> run;
        bool dependent, begun;
        bool relied_on;  // see ahead_has_waited
    };

    // The launch that waits goes on afterwards as if nothing had been.
    struct Interruption {
        ~Interruption() {
            innermost = outer;
            threadIdx = thread, blockIdx = block, blockDim = threads, gridDim = blocks;
        }
        Scheduler own;
        Scheduler* outer = std::exchange(innermost, &own);
        dim3 thread = threadIdx, block = blockIdx, threads = blockDim, blocks = gridDim;
    };

    // This launch, and what it needs of those ahead.
    void run_through(int last) {
        if (last < 0 || launches_[last].begun) return;
        if (!launches_[last].dependent) run_through(last - 1);
        launches_[last].begun = true;
        const int waiting = std::exchange(running_, last);
        if (waiting == NONE) {
            launches_[last].run();
        } else {
            Interruption interruption;
            launches_[last].run();
        }
        running_ = waiting;
    }

    std::vector<Launch> launches_;
    int running_ = NONE;
    bool held_ = false;
};

inline Stream stream;

}  // namespace emulation
