"""Which steps run, in which order, and for how long at most."""

from __future__ import annotations

from collections.abc import Sequence

from bench.calibration.measurement import Step
from bench.calibration.measurements import MEASUREMENTS
from bench.calibration.peers import PEERS

BUILD_SECONDS = 60  # for compiling the kernels
CHIP_SECONDS, PEERS_SECONDS = 8 * 60, 10 * 60  # which all time boxes together keep
STEPS: tuple[Step, ...] = (*MEASUREMENTS, *PEERS)


def find(question: str) -> Step:
    """The step of a question."""
    return next(step for step in STEPS if step.question == question)


def select(only: Sequence[str], peers: bool) -> list[Step]:
    """The steps whose questions are named, or begin with a name and a slash. If none is: the measurements, with `peers` those of peers too.

    ValueError for a name of none.
    """
    for name in only:
        if not any(_is(step, name) for step in STEPS):
            known = ", ".join(step.question for step in STEPS)
            raise ValueError(f"{name!r} is no question, needs one of {known}, or the first parts of one")
    if only:
        return [step for step in STEPS if any(_is(step, name) for name in only)]
    return list(STEPS if peers else MEASUREMENTS)


def _is(step: Step, name: str) -> bool:
    return f"{step.question}/".startswith(f"{name.rstrip('/')}/")
