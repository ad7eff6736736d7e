// Host twin of hopper/memory.cuh.
#pragma once

#include "emulation/scheduler.h"

namespace llama4_kernels::hopper {

inline unsigned load_acquire(const unsigned* from, emulation::Site site = emulation::Site::here()) {
    emulation::scheduler().poll(site, "a value in global memory");
    return *static_cast<const volatile unsigned*>(from);
}

inline unsigned add_acquire_release(unsigned* to, unsigned value) {
    const unsigned old = *to;
    *to += value;
    return old;
}

inline void prefetch_l2(const void*) {}

}  // namespace llama4_kernels::hopper
