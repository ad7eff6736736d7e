"""Records as a run would write them, with figures that are made up."""

from __future__ import annotations

import dataclasses
import random
import statistics
from typing import Any

from llama4_kernels.bench import record, workloads
from llama4_kernels.bench.machine import Machine

GPU = Machine("NVIDIA H200", "gpu", "9.0", 700.0, "580.0", "13.0", "2.14.1", "3.8.0", "3.12.1", "a" * 40, False)
CEILINGS = record.Ceilings(4300.0, {"bf16": 790.0, "fp8": 1400.0})


def samples(median: float, noise: float, seed: int, rounds: int = 50) -> tuple[float, ...]:
    """Times around a median: most within `noise` of it, a few far above, as clocks and other work on a machine make them."""
    generator = random.Random(seed)
    times = [median * (1 + generator.gauss(0, noise)) for _ in range(rounds)]
    return tuple(time * 1.5 if generator.random() < 0.03 else time for time in times)


def benchmark(
    name: str = "fused_moe/fp8/scout/tp8/t64",
    backend: str = "triton",
    *,
    us: float = 80.0,
    noise: float = 0.01,
    seed: int = 0,
    **fields: Any,
) -> record.Benchmark:
    """A record of the workload `name` that took `us` microseconds or so."""
    workload = workloads.parse(name)
    work = workloads.work(workload)
    times = samples(us, noise, seed)
    tenths = statistics.quantiles(times, n=10)
    median = statistics.median(times)
    least = work.bytes / CEILINGS.copy_gb_s / 1e3
    complete = record.Benchmark(
        workload.op, name, backend, GPU, "20261124T120000Z-aaaaaaa", "2026-11-24T12:00:00Z", f"llama4-kernels bench --workload {name}",
        timing=record.Timing("cuda_graph", True, median, tenths[0], tenths[-1], len(times), times), bytes=work.bytes,
        flops=work.total_flops, achieved_gb_s=work.bytes / median / 1e3, achieved_tflop_s=work.total_flops / median / 1e6,
        ceilings=CEILINGS, floor=record.Floor(least, "memory", least / median), check=record.Check(1e-3, 4e-3, "reference"), launches=3,
    )  # fmt: skip
    return dataclasses.replace(complete, **fields)


def calibration(**fields: Any) -> record.Calibration:
    figures = {"copy": record.Figure(4300.0, "GB/s")}
    plain = record.Calibration(
        "copy_bandwidth", "How fast is a device copy?", figures, GPU, "run", "2026-11-24T12:00:00Z", "llama4-kernels bench"
    )
    return dataclasses.replace(plain, **fields)
