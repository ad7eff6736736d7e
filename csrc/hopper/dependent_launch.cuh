// Programmatic dependent launch: a kernel launched with LaunchConfig::dependent may start before the one ahead of it in the stream has
// ended.
#pragma once

#ifdef LLAMA4_KERNELS_EMULATION
#include "emulation/dependent_launch.h"
#else

namespace llama4_kernels::hopper {

// Wait until the kernels that this one depends on have ended and their writes are visible; returns at once in a plain launch.
__device__ inline void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the next kernel start once every block has called this or ended. It says nothing about this kernel's writes: those are seen after
// wait_for_dependencies. Called after wait_for_dependencies, it tells the next kernel that those ahead of this one have ended.
__device__ inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Before wait_for_dependencies: says that what kernels before the one ahead wrote may be read, since the one ahead calls launch_dependents
// after its own wait. Read through L2 (__ldcg): L1 may hold what stood there when this multiprocessor last read it. The emulation checks
// the order.
__device__ inline void ahead_has_waited() {}

}  // namespace llama4_kernels::hopper

#endif
