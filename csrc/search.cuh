// A binary search.
#pragma once

#include "device.h"

namespace llama4_kernels {

// How many of the numbers from 0 to count − 1 hold, where those that do come first.
template <class Holds>
__device__ inline int count_first(int count, Holds holds) {
    int low = 0;
    while (low < count) {
        const int middle = (low + count) / 2;
        if (holds(middle)) {
            low = middle + 1;
        } else {
            count = middle;
        }
    }
    return low;
}

}  // namespace llama4_kernels
