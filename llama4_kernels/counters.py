"""Counters on the device that kernels find at 0 and leave at 0: the last block to arrive is told by the ticket that it draws."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 4096
_counters: dict[tuple[torch.device, int], Tensor] = {}
_outgrown: list[Tensor] = []  # a graph captured with them still counts in them


def tickets(device: torch.device, count: int) -> Tensor:
    """[n >= count] int32 counters, all 0, of the current stream: launches on two streams may overlap, and those on one do not count at the
    same time. With programmatic dependent launch a kernel may start before the one ahead of it has ended, so a kernel draws tickets only
    after it has waited for that one (wait_for_dependencies in csrc/hopper/dependent_launch.cuh). A CUDA graph counts where the stream did
    that it was captured on: graphs captured on one stream must not be replayed at the same time, nor beside its own launches. Where that
    stream never counted so far before, the graph gets counters of its own, and a fill of them ahead of each launch: warm up on the stream
    that captures."""
    if device.type != "cuda":
        return _counters_of((device, 0), device, count, keep=True)
    stream = torch.cuda.current_stream(device).cuda_stream
    # A graph's memory is only filled by its replay, so counters made while capturing belong to that graph alone.
    return _counters_of((device, stream), device, count, keep=not torch.cuda.is_current_stream_capturing())


def _counters_of(key: tuple[torch.device, int], device: torch.device, count: int, *, keep: bool) -> Tensor:
    found = _counters.get(key)
    if found is not None and len(found) >= count:
        return found
    counters = torch.zeros(max(count, _SMALLEST), dtype=torch.int32, device=device)
    if keep:
        if found is not None:
            _outgrown.append(found)
        _counters[key] = counters
    return counters
