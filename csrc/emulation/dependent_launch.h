// Host twin of hopper/dependent_launch.cuh.
#pragma once

#include "emulation/stream.h"

namespace llama4_kernels::hopper {

inline void wait_for_dependencies(emulation::Site site = emulation::Site::here()) {
    emulation::current().block->must_wait = false;
    emulation::stream.wait_for_ahead(site);
}

inline void launch_dependents() {}

}  // namespace llama4_kernels::hopper
