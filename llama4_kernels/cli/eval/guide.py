"""The scores that SGLang's guide for Llama 4 gives, and what a score measured here says about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
POWER = 0.8
QUESTIONS = 12032  # of MMLU-Pro's test split, which the guide's scores are over


@dataclass(frozen=True)
class GuideScore:
    """Accuracy on MMLU-Pro in percent: as Meta published it, and as the guide measured it with SGLang."""

    official: float
    sglang: float


GUIDE = {"scout": GuideScore(74.3, 75.2), "maverick": GuideScore(80.5, 80.7)}


@dataclass(frozen=True)
class Comparison:
    """A measured score against one of the guide's, all in percentage points.

    difference: measured − theirs, with its standard error, and low … high, its 95 % confidence interval.
    detectable: the drop that a run of this size notices in four of five cases.
    """

    theirs: float
    difference: float
    stderr: float
    low: float
    high: float
    detectable: float

    @property
    def verdict(self) -> str:
        """ "agrees" where the interval holds 0, else "lower" or "higher"."""
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "agrees"


def compare(score: float, stderr: float, theirs: float) -> Comparison:
    """score, stderr, theirs: accuracies in percent.

    The guide gives no standard error: theirs is the binomial one of its score over QUESTIONS. The two runs are taken as independent. They
    answer the same questions, so the true error of the difference is smaller; the interval is too wide rather than too narrow.
    """
    their_stderr = 100 * math.sqrt(theirs / 100 * (1 - theirs / 100) / QUESTIONS)
    total = math.hypot(stderr, their_stderr)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    difference = score - theirs
    detectable = (z + NormalDist().inv_cdf(POWER)) * total
    return Comparison(theirs, difference, total, difference - z * total, difference + z * total, detectable)


def model_in(name: str) -> str | None:
    """The guide's model that a server's model name speaks of, or None."""
    found = [model for model in GUIDE if model in name.lower()]
    return found[0] if len(found) == 1 else None
