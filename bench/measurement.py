"""The one test of every bench_<stem>.py."""

from __future__ import annotations

import math

from llama4_kernels.bench.record import Benchmark

MOST_OF_A_GPU = 1.25  # floor / time: what only reads may pass the copy ceiling by less, see tests/test_bench_gpu.py


def test_a_measurement_makes_sense(measured: Benchmark) -> None:
    assert measured.timing.rounds == len(measured.timing.samples_us) and all(sample > 0 for sample in measured.timing.samples_us)
    assert math.isfinite(measured.floor.ratio) and measured.floor.ratio > 0
    is_oracle = measured.backend == "reference" and not measured.peer
    assert (measured.check is None) == is_oracle, "it was timed, and nothing compared"
    if measured.timing.method != "wall_clock":
        assert measured.floor.ratio < MOST_OF_A_GPU, "faster than the hardware: something was not computed, or not timed"
        assert measured.launches >= 1
