// Programmatic dependent launch: a kernel launched with LaunchConfig::dependent may start before the one ahead of it in the stream has
// ended.
#pragma once

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/dependent_launch.h"
#else

namespace llama4_kernels::hopper {

// Wait until the kernels that this one depends on have ended and their writes are visible; returns at once in a plain launch.
__device__ inline void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the next kernel start once every block has called this or ended. It says nothing about writes: those are seen after
// wait_for_dependencies.
__device__ inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace llama4_kernels::hopper

#endif
