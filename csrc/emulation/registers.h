// Host twin of hopper/registers.cuh.
#pragma once

#include "emulation/scheduler.h"

namespace llama4_kernels::hopper {

template <int COUNT>
void increase_registers() {
    static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0);
    emulation::current().registers = COUNT;
}

template <int COUNT>
void decrease_registers() {
    increase_registers<COUNT>();
}

}  // namespace llama4_kernels::hopper
