"""Whether data brought into L2 ahead of its use is still there after other data has streamed through."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bench.calibration import gpu
from bench.calibration.native import call
from bench.calibration.measurement import Case, Figures, Measurement, Unavailable
from bench.calibration.measurements import weight_stream
from llama4_kernels.bench.record import Figure

MIB = 1 << 20
LINE_STRIDE = 4096  # bytes between the lines that are looked at
STREAMED = (0, 16, 32, 64, 128, 256)  # MiB
PREFETCHED = (5, 16)  # MiB: the down projection of an expert at TP 8, and all of its weights
ROUNDS = 5


def cases() -> list[Case]:
    return [
        Case({"prefetched_mib": prefetched, "streamed_mib": streamed, "evict_first": evict_first}, bytes=(prefetched + streamed) * MIB)
        for prefetched, evict_first, streamed in itertools.product(PREFETCHED, (False, True), STREAMED)
    ]


def measure(case: Case) -> Figures:
    kept, other = (gpu.random_bytes(size * MIB, seed) for seed, size in enumerate((case.parameters["prefetched_mib"], 2 * max(STREAMED))))
    streamed = case.parameters["streamed_mib"] * MIB
    threshold = hit_or_miss(kept, other)
    shares = []
    for _ in range(ROUNDS):
        evict(other)
        call("l2_prefetch", kept, kept.numel(), gpu.sms())
        if streamed:
            stream(other[:streamed], case.parameters["evict_first"])
        shares.append(float((probe(kept) < threshold).float().mean()))
    return {"still_there": Figure(100 * sorted(shares)[ROUNDS // 2], "%"), "threshold": Figure(threshold, "cycles")}


def hit_or_miss(kept: Tensor, other: Tensor) -> float:
    """The cycles between those of a load that hits L2 and of one that misses."""
    evict(other)
    misses = probe(kept).float().median()
    hits = probe(kept).float().median()
    if misses < 1.2 * hits:
        raise Unavailable(f"hits take {float(hits):.0f} cycles and misses {float(misses):.0f}: too close to be told apart")
    return float(hits + misses) / 2


def probe(buffer: Tensor) -> Tensor:
    """Cycles of the load of a line in every LINE_STRIDE bytes."""
    cycles = torch.zeros(buffer.numel() // LINE_STRIDE, dtype=torch.int32, device=gpu.DEVICE)
    call("l2_probe", buffer, cycles.numel(), LINE_STRIDE, cycles, gpu.sms())
    return cycles


def evict(other: Tensor) -> None:
    stream(other, evict_first=False)


def stream(matrix: Tensor, evict_first: bool) -> None:
    parameters = {"tile_kib": 8, "stages": 16, "fetch": weight_stream.CONTIGUOUS, "evict_first": evict_first, "blocks_per_sm": 1}
    weight_stream.stream(matrix, parameters)()


MEASUREMENTS = (Measurement("l2/prefetch", "Does data that was prefetched into L2 survive a stream of weights?", 15, cases, measure),)
