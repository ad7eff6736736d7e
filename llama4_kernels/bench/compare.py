"""Two sets of results side by side: what got slower for certain, and what is noise."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llama4_kernels.bench.record import Benchmark, Record

CONFIDENCE = 0.99
# The same kernel on the same card differs from one run to the next by about this much, however narrow each run's own interval is
MARGIN = 0.03
RESAMPLES = 2000
Key = tuple[str, str, bool, str]


@dataclass(frozen=True)
class Comparison:
    """One workload on one backend or peer and device, now and before.

    ratio: median time now / before, with low and high the ends of its bootstrap interval; None where one of them has no time.
    verdict: "slower" or "faster" (the whole interval lies beyond 1 ± MARGIN), "same", "broken" (was right and no longer is),
    "repaired", "new" (not before), or "gone" (not now).
    """

    now: Benchmark | None
    before: Benchmark | None
    verdict: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None

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
    ratio, low, high = ratio_interval(now.timing.samples_us, before.timing.samples_us)
    verdict = "slower" if low > 1 + MARGIN else "faster" if high < 1 - MARGIN else "same"
    return Comparison(now, before, verdict, ratio, low, high)


@functools.cache
def ratio_interval(now: tuple[float, ...], before: tuple[float, ...]) -> tuple[float, float, float]:
    """The ratio of the medians, and its interval by a percentile bootstrap; the same samples give the same interval."""
    from scipy.stats import bootstrap

    ratio = float(np.median(now) / np.median(before))
    if len(now) < 2 or len(before) < 2:
        return ratio, 0.0, float("inf")  # one sample says nothing of its own spread

    def of_medians(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile", "rng": np.random.default_rng(0)}
    interval = bootstrap((now, before), of_medians, vectorized=True, **options).confidence_interval
    return ratio, float(interval.low), float(interval.high)
