"""What it takes to stream weights through shared memory at the rate of a copy: bytes in flight, blocks, and the way tiles are fetched."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bench.calibration import gpu
from bench.calibration.native import call
from bench.calibration.measurement import Case, Figures, Measurement, WrongResult, timed
from bench.calibration.measurements.bandwidth import exclusive_or

COLUMNS = 5120  # hidden size: K of gate_up
ROWS = 3072  # of an expert at TP 8, all its weights taken as rows of 5120 bytes: 15.73 MB
SPAN = 128
CONSUMER_WARPS = 4
BOXES, CONTIGUOUS = "boxes", "contiguous"
SCOUT = 17  # experts that a large batch reads, the shared one included


def cases() -> list[Case]:
    return [
        Case(
            {
                "experts": experts,
                "fetch": fetch,
                "tile_kib": tile_rows * SPAN // 1024,
                "stages": stages,
                "blocks_per_sm": blocks_per_sm,
                "kib_in_flight": tile_rows * SPAN // 1024 * stages * blocks_per_sm,
                "evict_first": evict_first,
            },
            bytes=experts * ROWS * COLUMNS,
        )
        for experts, fetch, tile_rows, stages, blocks_per_sm, evict_first in points()
    ]


def points() -> Iterator[tuple[int, str, int, int, float, bool]]:
    """experts, fetch, rows of a tile, stages, blocks per SM, evict_first: one at a time is changed from what a GEMM would do."""
    stages_of = {64: (2, 3, 4, 6, 8, 12, 16, 24), 128: (2, 3, 4, 6, 8, 12), 256: (2, 3, 4, 6), 32: (4, 8, 16, 32)}
    for fetch, tile_rows in itertools.product((BOXES, CONTIGUOUS), stages_of):
        for stages in stages_of[tile_rows]:
            yield SCOUT, fetch, tile_rows, stages, 1, False
    for blocks_per_sm, stages in itertools.product((0.25, 0.5, 2), (4, 8)):
        yield SCOUT, BOXES, 64, stages, blocks_per_sm, False
    for stages in (4, 8, 16):
        yield SCOUT, BOXES, 64, stages, 1, True
    for experts, stages in itertools.product((2, 4), (4, 8, 16, 24)):
        yield experts, BOXES, 64, stages, 1, False


def measure(case: Case) -> Figures:
    parameters = case.parameters
    launches = [stream(matrix, parameters) for matrix in gpu.cold_buffers(case.bytes)]
    launches[0]()
    if exclusive_or(checksums()[: blocks(parameters) * CONSUMER_WARPS]) != _expected(case.bytes):
        raise WrongResult("the exclusive or of what was streamed is not that of the weights")
    return timed(case, gpu.time(launches))


def stream(matrix: torch.Tensor, parameters: Mapping[str, Any]) -> Callable[[], None]:
    """The launch that reads a matrix of COLUMNS columns as `parameters` say."""
    rows = matrix.numel() // COLUMNS
    tile_rows = parameters["tile_kib"] * 1024 // SPAN
    how = (tile_rows, parameters["stages"], parameters["fetch"] == BOXES, parameters["evict_first"])
    return functools.partial(call, "weight_stream", matrix, rows, COLUMNS, *how, checksums(), blocks(parameters))


def blocks(parameters: Mapping[str, Any]) -> int:
    return round(gpu.sms() * parameters["blocks_per_sm"])


@functools.cache
def checksums() -> torch.Tensor:
    return torch.zeros(2 * gpu.sms() * CONSUMER_WARPS, dtype=torch.int32, device=gpu.DEVICE)


@functools.cache
def _expected(size: int) -> int:
    return exclusive_or(gpu.cold_buffers(size)[0].view(torch.int32))


MEASUREMENTS = (
    Measurement("weight_stream", "What does it take to stream weights through shared memory at the rate of a copy?", 40, cases, measure),
)
