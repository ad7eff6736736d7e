"""Finding the last program to arrive, which then finishes what all have prepared, without a second launch.

Every program stores its part and takes a ticket with an acquire-release atomic; who draws the last one sees all parts. It also sets the
counter back to 0, so that the next launch, or the next replay of a CUDA graph, starts afresh. Integers only: the result does not depend on
who comes last.
"""

import triton
import triton.language as tl


@triton.jit
def is_last(counter, arrivals):
    """Whether this program is the last of `arrivals` to call this with `counter`; if so, it sees what the others stored before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(counter, 0)
    return last
