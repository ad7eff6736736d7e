"""What measurements need of the GPU: its size, random data, data that is out of its L2, and time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama4_kernels.bench.record import Timing
from llama4_kernels.bench.timing import estimate_us, time_calls

DEVICE = torch.device("cuda", 0)
L2_FOLDS = 4  # data this many times the L2 apart has left it
GRAPH_US = 2000.0
MOST_LAUNCHES = 1000  # of a graph


def sms() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size


@functools.lru_cache(maxsize=2)
def random_bytes(size: int, seed: int = 0) -> Tensor:
    """`size` random bytes (uint8). Zeros would draw less power and run faster than real data."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE, generator=generator)


def cold_buffers(size: int, seed: int = 0) -> list[Tensor]:
    """Buffers of `size` random bytes which, used in turn, are out of L2 each time: together they fill it L2_FOLDS times over."""
    count = max(2, -(-L2_FOLDS * l2_bytes() // size))
    return list(random_bytes(count * size, seed).view(count, size))


def time(launches: Sequence[Callable[[], object]], rounds: int = 20) -> Timing:
    """The time of one of several launches in a CUDA graph of them all, again and again for GRAPH_US: its own launch does not count then.

    RuntimeError where they cannot be captured.
    """
    launches[0]()
    replays = math.ceil(GRAPH_US / len(launches) / estimate_us(launches[0], DEVICE))
    timing, notes = time_calls([*launches] * min(replays, -(-MOST_LAUNCHES // len(launches))), DEVICE, rounds)
    if notes:
        raise RuntimeError(notes[0])
    return timing
