// Host twin of hopper/dependent_launch.cuh.
#pragma once

#include "emulation/stream.h"

namespace llama4_kernels::hopper {

inline void wait_for_dependencies(emulation::Site site = emulation::Site::here()) {
    emulation::current().block->must_wait = false;
    emulation::stream.wait_for_ahead(site);
}

inline void launch_dependents(emulation::Site site = emulation::Site::here()) {
    if (emulation::current().block->must_wait && emulation::stream.is_relied_on())
        emulation::scheduler().fail(site, "launch_dependents before wait_for_dependencies, and the next launch takes it for the reverse");
}

inline void ahead_has_waited(emulation::Site site = emulation::Site::here()) { emulation::stream.ahead_has_waited(site); }

}  // namespace llama4_kernels::hopper
