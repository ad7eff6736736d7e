"""Finding the last program to arrive, which then finishes what all have prepared, without a second launch.

Every program stores its part and takes a ticket with an acquire-release atomic; who draws the last one sees all parts. It also sets the
counter back to 0, so that the next launch, or the next replay of a CUDA graph, starts afresh. Integers only: the result does not depend on
who comes last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SMALLEST = 4096
_counters: dict[tuple[torch.device, int], Tensor] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """`count` counters, all 0, of the current stream: launches on one stream never overlap, those on two may."""
    if device.type != "cuda":
        return _counters_of((device, 0), device, count, keep=True)
    stream = torch.cuda.current_stream(device).cuda_stream
    # A graph's memory is only filled by its replay, so counters made while capturing belong to that graph alone.
    return _counters_of((device, stream), device, count, keep=not torch.cuda.is_current_stream_capturing())


def _counters_of(key: tuple[torch.device, int], device: torch.device, count: int, *, keep: bool) -> Tensor:
    counters = _counters.get(key)
    if counters is None or len(counters) < count:
        counters = torch.zeros(max(count, _SMALLEST), dtype=torch.int32, device=device)
        if keep:
            _counters[key] = counters
    return counters


@triton.jit
def is_last(counter, arrivals):
    """Whether this program is the last of `arrivals` to call this with `counter`; if so, it sees what the others stored before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(counter, 0)
    return last
