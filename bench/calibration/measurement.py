"""What a measurement is: one question to the hardware, the cases that answer it, and how a case is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llama4_kernels.bench import record
from llama4_kernels.bench.machine import Machine, clocks, this_machine
from llama4_kernels.bench.record import Calibration, Figure, Record, Timing
from llama4_kernels.bench.timing import one_line

Figures = Mapping[str, Figure]
CLOCKS_SECONDS = 1.0  # between two looks at the clocks, each of which takes a process
PLANNED_SMS = 132  # of an H200, for bytes and flops of a plan


class WrongResult(RuntimeError):
    """What was timed did not compute what it should: its time answers nothing."""


class Unavailable(RuntimeError):
    """This case cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Case:
    """One point of a measurement. bytes, flops: what one call moves (read plus written) and computes."""

    parameters: Mapping[str, str | int | float | bool]
    bytes: int = 0
    flops: int = 0


def in_line(parameters: Mapping[str, Any]) -> str:
    """Parameters as words."""
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


class Step(Protocol):
    """What runs in a process of its own: a measurement of the chip, or a peer.

    question: the identifier in records, for ever. title: the question in words. seconds: its time box, start of the process included.
    hopper: whether it needs kernels of ours, and so a GPU of compute capability 9.0. cases: in the order of their worth, since the time box
    may cut the last ones off; a pure function.
    """

    @property
    def question(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def seconds(self) -> int: ...
    @property
    def hopper(self) -> bool: ...
    def cases(self) -> Sequence[Case]: ...

    def records(self, run: str) -> Iterator[Record]:
        """Measure: the record of each case in turn; one that fails becomes a record that says why."""

    def missing(self, machine: Machine, run: str, status: str, reason: str, known: Collection[Mapping[str, Any]]) -> Sequence[Record]:
        """Records that say why cases have none among `known`, the records that were written."""


@dataclass(frozen=True)
class Measurement:
    """A Step whose cases `measure` answers, on the GPU, by figures; it raises WrongResult or Unavailable."""

    question: str
    title: str
    seconds: int
    cases: Callable[[], Sequence[Case]]
    measure: Callable[[Case], Figures]
    hopper: bool = True

    def records(self, run: str) -> Iterator[Calibration]:
        machine, device = this_machine(), torch.device("cuda", 0)
        before, looked = clocks(device), time.monotonic()
        for case in self.cases():
            figures, status, reason = self._outcome(case)
            after = before
            if time.monotonic() - looked > CLOCKS_SECONDS:
                after, looked = clocks(device), time.monotonic()
            more = {"parameters": case.parameters, "clocks_before": before, "clocks_after": after}
            yield self._record(machine, run, status, reason, figures=figures, **more)
            before = after

    def missing(self, machine: Machine, run: str, status: str, reason: str, known: Collection[Mapping[str, Any]]) -> list[Calibration]:
        return [self._record(machine, run, status, f"{reason}; {len(known)} of {len(self.cases())} cases measured")]

    def _outcome(self, case: Case) -> tuple[Figures, str, str]:
        try:
            figures = self.measure(case)
            if odd := [name for name, figure in figures.items() if not math.isfinite(figure.value)]:
                raise WrongResult(f"{', '.join(odd)}: not a finite number")
            return figures, "ok", ""
        except WrongResult as error:
            return {}, "wrong", str(error)
        except Unavailable as error:
            return {}, "unavailable", str(error)
        except Exception as error:  # one case must not take the others with it
            return {}, "failed", one_line(error)

    def _record(self, machine: Machine, run: str, status: str, reason: str, figures: Figures | None = None, **more: Any) -> Calibration:
        repro = f"python -m bench.calibration --only {self.question} --out OUT"
        what = {"question": self.question, "title": self.title, "figures": figures or {}, "status": status, "reason": reason}
        return Calibration(**what, machine=machine, run=run, date=record.now(), repro=repro, **more)


def timed(case: Case, timing: Timing) -> dict[str, Figure]:
    """The median time of a call and its spread, and with it the rates of the case's bytes and flops."""
    figures = {"time": Figure(timing.median_us, "us"), "time_p10": Figure(timing.p10_us, "us"), "time_p90": Figure(timing.p90_us, "us")}
    if case.bytes:
        figures["bandwidth"] = Figure(case.bytes / timing.median_us / 1e3, "GB/s")
    if case.flops:
        figures["rate"] = Figure(case.flops / timing.median_us / 1e6, "TFLOP/s")
    return figures
