"""What launches and barriers cost: kernels in a CUDA graph, programmatic dependent launch, barriers of a block, a cluster and the grid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from bench.calibration import gpu
from bench.calibration.native import call
from bench.calibration.measurement import Case, Figures, Measurement, timed
from llama4_kernels.bench.record import Figure

CHAIN = 100  # kernels of a graph
FEW, MANY = 64, 1088  # barriers of a launch
BODY_CYCLES = 4000
PLAIN, DEPENDENT, EARLY = "plain", "dependent", "dependent, triggered early"


def graph_cases() -> list[Case]:
    return [Case({"blocks_per_sm": blocks, "threads": threads}) for blocks, threads in itertools.product((0, 1, 8), (128, 384))]


def measure_graph(case: Case) -> Figures:
    blocks = max(1, gpu.sms() * case.parameters["blocks_per_sm"])
    return timed(case, gpu.time([functools.partial(call, "empty_launch", case.parameters["threads"], blocks)] * CHAIN))


def dependent_cases() -> list[Case]:
    """Chains of kernels whose prologue needs nothing of the kernel before."""
    return [
        Case({"prologue_cycles": cycles, "launch": how}) for cycles, how in itertools.product((0, 1000, 4000), (PLAIN, DEPENDENT, EARLY))
    ]


def measure_dependent(case: Case) -> Figures:
    prologue, how = case.parameters["prologue_cycles"], case.parameters["launch"]
    launch = functools.partial(call, "link_launch", prologue, BODY_CYCLES, how != PLAIN, how == EARLY, gpu.sms())
    return timed(case, gpu.time([launch] * CHAIN))


def barrier_cases() -> list[Case]:
    """cluster: blocks of a cluster."""
    scopes = [{"scope": "block"}, *({"scope": "cluster", "cluster": size} for size in (2, 4, 8, 16)), {"scope": "grid"}]
    return [Case({**scope, "threads": threads}) for scope, threads in itertools.product(scopes, (128, 384))]


def measure_barrier(case: Case) -> Figures:
    """The slope between two numbers of barriers, so that launches cancel."""
    launch = _barriers(case)
    few, many = (gpu.time([functools.partial(launch, repeats)] * 4).median_us for repeats in (FEW, MANY))
    return {"time": Figure((many - few) / (MANY - FEW), "us")}


def _barriers(case: Case) -> Callable[[int], None]:
    scope, threads, sms = case.parameters["scope"], case.parameters["threads"], gpu.sms()
    if scope == "block":
        return lambda repeats: call("block_barriers", repeats, threads, sms)
    if scope == "cluster":
        size = case.parameters["cluster"]
        return lambda repeats: call("cluster_barriers", repeats, size, threads, size)
    counter = torch.zeros(1, dtype=torch.int32, device=gpu.DEVICE)
    return lambda repeats: call("grid_barriers", repeats, counter, threads, sms)


MEASUREMENTS = (
    Measurement("launch/graph", "What does an empty kernel cost in a CUDA graph?", 12, graph_cases, measure_graph),
    Measurement(
        "launch/dependent", "How much of a kernel's prologue does a dependent launch hide?", 12, dependent_cases, measure_dependent
    ),
    Measurement("launch/barrier", "What does a barrier cost in a block, a cluster and the grid?", 12, barrier_cases, measure_barrier),
)
