"""Two sets of results side by side: what got slower for certain, and what is noise."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from llama4_kernels.bench.record import Benchmark, Record

CONFIDENCE = 0.99
# The same kernel on the same card differs from one run to the next by about this much, however narrow each run's own interval is
MARGIN = 0.03
RESAMPLES = 2000
MANY = 30  # samples, whose median lies between their quartiles with more than CONFIDENCE
Key = tuple[str, str, bool, str]


@dataclass(frozen=True)
class Comparison:
    """One workload on one backend or peer and device, now and before.

    verdict: "slower" or "faster" (the whole interval of the ratio lies beyond 1 ± MARGIN), "same", "broken" (was right and no longer
    is), "repaired", "new" (not before), or "gone" (not now). ratio: median time now / before, None where one of them has no time.
    """

    now: Benchmark | None
    before: Benchmark | None
    verdict: str
    ratio: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the ratio."""
        return None if self.ratio is None else ratio_interval(self.now.timing.samples_us, self.before.timing.samples_us)

    @property
    def is_regression(self) -> bool:
        """Of our own kernels: what a peer does is no fault of theirs."""
        return self.verdict in ("slower", "broken") and not (self.now or self.before).peer

    @property
    def record(self) -> Benchmark:
        return self.now or self.before


def key(record: Benchmark) -> Key:
    """What two records must share to be compared."""
    return record.workload, record.backend, record.peer, record.machine.device


def latest(records: Iterable[Record]) -> dict[Key, Benchmark]:
    """The newest benchmark of each key; the later one in the order given where dates are equal."""
    newest: dict[Key, Benchmark] = {}
    for record in records:
        if isinstance(record, Benchmark) and (key(record) not in newest or record.date >= newest[key(record)].date):
            newest[key(record)] = record
    return newest


def compare(now: Iterable[Record], before: Iterable[Record]) -> list[Comparison]:
    """Every key of either side, those of `now` first; each side's newest record counts."""
    newer, older = latest(now), latest(before)
    return [compare_two(newer.get(each), older.get(each)) for each in dict.fromkeys([*newer, *older])]


def compare_two(now: Benchmark | None, before: Benchmark | None) -> Comparison:
    if now is None or before is None:
        return Comparison(now, before, "gone" if now is None else "new")
    if before.status != "ok":
        return Comparison(now, before, "repaired" if now.status == "ok" else "same")
    if now.status != "ok":
        return Comparison(now, before, "broken")
    samples = now.timing.samples_us, before.timing.samples_us
    ratio = statistics.median(samples[0]) / statistics.median(samples[1])
    return Comparison(now, before, _verdict(ratio, *samples), ratio)


def _verdict(ratio: float, now: tuple[float, ...], before: tuple[float, ...]) -> str:
    """What the interval says; it is not needed where the ratio lies within the margin, or the middle halves of the samples far apart."""
    if abs(ratio - 1) <= MARGIN:
        return "same"
    if min(len(now), len(before)) >= MANY:
        (now_low, _, now_high), (before_low, _, before_high) = (
            statistics.quantiles(samples, method="inclusive") for samples in (now, before)
        )
        if now_low > before_high * (1 + MARGIN):
            return "slower"
        if now_high < before_low * (1 - MARGIN):
            return "faster"
    low, high = ratio_interval(now, before)
    return "slower" if low > 1 + MARGIN else "faster" if high < 1 - MARGIN else "same"


@functools.cache
def ratio_interval(now: tuple[float, ...], before: tuple[float, ...]) -> tuple[float, float]:
    """The interval of the ratio of the medians, by a percentile bootstrap; the same samples give the same interval."""
    import numpy as np
    from scipy.stats import bootstrap

    if len(now) < 2 or len(before) < 2:
        return 0.0, float("inf")  # one sample says nothing of its own spread

    def of_medians(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile", "rng": np.random.default_rng(0)}
    interval = bootstrap((now, before), of_medians, vectorized=True, **options).confidence_interval
    return float(interval.low), float(interval.high)
