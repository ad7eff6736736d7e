"""How fast blocks of a cluster read one another's shared memory."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from bench.calibration import gpu
from bench.calibration.native import call
from bench.calibration.measurement import PLANNED_SMS, Case, Figures, Measurement, WrongResult
from bench.calibration.measurements.bandwidth import exclusive_or
from llama4_kernels.bench.record import Figure

BYTES = 64 << 10  # of each block's shared memory
REPEATS = 511
THREADS = 512
WORD = 0xFFFFFFFF


def cases() -> list[Case]:
    """A cluster of 1 reads its own shared memory. Each block counts its own cycles, since not all clusters may run at once."""
    return [Case({"cluster": size}, bytes=PLANNED_SMS // size * size * REPEATS * BYTES) for size in (1, 2, 4, 8, 16)]


def measure(case: Case) -> Figures:
    size = case.parameters["cluster"]
    blocks = gpu.sms() // size * size
    checksums = torch.zeros(blocks, THREADS, dtype=torch.int32, device=gpu.DEVICE)
    cycles = torch.zeros(blocks, dtype=torch.int64, device=gpu.DEVICE)
    call("cluster_read", BYTES, REPEATS, size, checksums, cycles, blocks)
    check(checksums, size, REPEATS)
    return {"per_cycle": Figure(REPEATS * BYTES / float(cycles.double().median()), "B/cycle per SM")}


def check(checksums: Tensor, size: int, repeats: int) -> None:
    """Each block reads the others of its cluster in turn, from the next one on."""
    contents = [exclusive_or(words(rank)) for rank in range(size)]
    for rank in range(size):
        distances = itertools.islice(itertools.cycle(range(1, size) if size > 1 else (0,)), repeats)
        expected = functools.reduce(lambda value, distance: value ^ contents[(rank + distance) % size], distances, 0)
        if (found := exclusive_or(checksums[rank])) != expected:
            raise WrongResult(f"block {rank} of a cluster of {size} read words whose exclusive or is {found:#x}, not {expected:#x}")


def words(rank: int) -> Tensor:
    """What block `rank` holds, as int32."""
    first = (rank << 20 | torch.arange(BYTES // 16)) * 2654435761 & WORD
    pieces = torch.stack([first, first * 3, first * 5, first * 7], 1) & WORD
    return pieces.to(torch.int32)


MEASUREMENTS = (Measurement("cluster/read", "How fast does a cluster read its distributed shared memory?", 12, cases, measure),)
