// Host twin of hopper/dependent_launch.cuh: launches run one after another, so there is never anything to wait for.
#pragma once

namespace llama4_kernels::hopper {

inline void wait_for_dependencies() {}
inline void launch_dependents() {}

}  // namespace llama4_kernels::hopper
