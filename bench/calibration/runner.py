"""Runs steps one after another, each in a process with a time box, so that a crash or a hang loses only itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.calibration import native
from bench.calibration.measurement import Step
from bench.calibration.plan import BUILD_SECONDS
from llama4_kernels.bench import record
from llama4_kernels.bench.machine import Machine

HOPPER = "9.0"
MOST_REASON = 300  # characters
LAST_SECONDS = 5.0  # for a killed process to end
Say = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: None where its time was up. words: the last line of its standard error."""

    code: int | None
    seconds: float
    words: str = ""

    @property
    def reason(self) -> str:
        if self.code is None:
            return f"not done after {self.seconds:.0f} s"
        return "" if self.code == 0 else f"exit code {self.code}: {self.words}"


@dataclass(frozen=True)
class Outcome:
    """What came of a step. cases: how many it has. records: those that it wrote, as JSON. reason: why the rest is missing, or ""."""

    step: Step
    cases: int
    records: Sequence[Mapping[str, Any]]
    seconds: float
    reason: str


def run(steps: Sequence[Step], file: Path, machine: Machine, run_id: str, say: Say) -> Iterator[Outcome]:
    """The outcome of each step, in order; its records go to `file`, and some that say why others are missing."""
    why_not = _why_no_hopper(machine, say) if any(step.hopper for step in steps) else ""
    for number, step in enumerate(steps, 1):
        say(f"[{number}/{len(steps)}] {step.question}: {step.title}")
        known = len(_lines(file))
        cannot = step.hopper and why_not
        if cannot:
            ended, reason = Ended(0, 0.0), why_not
        else:
            command = [sys.executable, "-m", "bench.calibration.worker", step.question, str(file), run_id]
            ended = execute(command, step.seconds, lambda line: say(f"    {line}"))
            reason = ended.reason
        written = [json.loads(line) for line in _lines(file)[known:]]
        if reason:
            say(f"    {reason}")
            record.append(file, step.missing(machine, run_id, "unavailable" if cannot else "failed", reason, written))
        yield Outcome(step, len(step.cases()), written, ended.seconds, reason)


def execute(command: Sequence[str], seconds: float, say: Say) -> Ended:
    """Run a command and give each line of its output to `say`; none of its children outlives it, and it neither its time nor this call."""
    started, errors = time.monotonic(), []
    process = subprocess.Popen(
        command, cwd=native.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    # Threads, since the pipes of a process that hangs in the driver may stay open after it was killed
    readers = [_reader(process.stdout, lambda line: say(line.rstrip("\n"))), _reader(process.stderr, errors.append)]
    code = None
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):  # where nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=LAST_SECONDS)
        for reader in readers:
            reader.join(timeout=LAST_SECONDS)
    words = next((line.strip() for line in reversed(errors) if line.strip()), "it said nothing")
    return Ended(code, time.monotonic() - started, words[:MOST_REASON])


def _reader(pipe: IO[str], take: Say) -> threading.Thread:
    thread = threading.Thread(target=lambda: [take(line) for line in pipe], daemon=True)
    thread.start()
    return thread


def _why_no_hopper(machine: Machine, say: Say) -> str:
    """Why no step with kernels of ours can run here, or "" once these are built."""
    if machine.capability != HOPPER:
        return f"{machine.device} has compute capability {machine.capability}, needs {HOPPER}"
    say("compiling the kernels")
    ended = execute([sys.executable, "-m", "bench.calibration.native"], BUILD_SECONDS, lambda line: None)
    return f"the kernels were not compiled: {ended.reason}" if ended.reason else ""


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
