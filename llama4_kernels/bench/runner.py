"""Runs jobs in a process of their own, so that a kernel or peer that crashes or hangs costs its own record and nothing else."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection

import torch

from llama4_kernels.bench import measure, record
from llama4_kernels.bench.measure import Job, Options, Session
from llama4_kernels.bench.peers import NotInstalled
from llama4_kernels.bench.record import Benchmark
from llama4_kernels.ops.backend import default_device

JOB_SECONDS = 600.0  # a first call may compile for minutes
START_SECONDS = 120.0
STOP_SECONDS = 30.0


class Runner:
    """A context manager; `run` gives the record of each job as it comes.

    options: of the measurement. peer_modules: importable modules that register peers of their own. job_seconds: the most that one job
    may take. session: machine, ceilings and name of the run, measured when the first worker starts.
    """

    def __init__(self, options: Options | None = None, peer_modules: Sequence[str] = (), job_seconds: float = JOB_SECONDS):
        self._options, self._modules, self._seconds = options or Options(), tuple(peer_modules), job_seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._absent: dict[tuple[str, str], str] = {}
        self.session: Session | None = None

    def __enter__(self) -> Runner:
        self._start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._pipe is not None:
            self._pipe.close()
        self._stop(kill=error is not None)

    def run(self, jobs: Iterable[Job]) -> Iterator[Benchmark]:
        """The record of each job. A peer that is not installed gives one record for each op, and none for further workloads."""
        for job in jobs:
            key = (job.workload.partition("/")[0], job.backend)
            if job.peer and key in self._absent:
                continue
            done, installed = self._one(job)
            if not installed:
                self._absent[key] = done.reason
            yield done

    def _one(self, job: Job) -> tuple[Benchmark, bool]:
        if self._process is None:
            self._start()
        self._pipe.send(job)
        try:
            if not self._pipe.poll(self._seconds):
                self._stop(kill=True)
                return self.session.failure(job, f"not done after {self._seconds:g} s, its process was killed"), True
            done, installed, usable = self._pipe.recv()
        except (EOFError, ConnectionError):
            return self.session.failure(job, f"its process died: {self._cause_of_death()}"), True
        if not usable:
            self._stop()
        return done, installed

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._options, self._modules, self.session))
        self._process.start()
        theirs.close()
        try:
            if not self._pipe.poll(START_SECONDS):
                self._stop(kill=True)
                raise RuntimeError(f"the measuring process has not measured the ceilings after {START_SECONDS:g} s, and was killed")
            answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"the measuring process did not start: {self._cause_of_death()}") from error
        if isinstance(answer, Exception):
            self._stop()
            raise answer
        self.session = answer

    def _stop(self, kill: bool = False) -> None:
        if self._process is None:
            return
        if kill:
            self._process.kill()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(STOP_SECONDS)  # a process that waits for a GPU may outlive that
        self._process = None

    def _cause_of_death(self) -> str:
        self._process.join(STOP_SECONDS)
        code = self._process.exitcode
        self._process = None
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _work(pipe: Connection, options: Options, modules: Sequence[str], session: Session | None) -> None:
    """The worker: answers jobs until its end of the pipe closes, or until the GPU can no longer be used from this process. Ctrl-C is for
    the parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for module in modules:
            importlib.import_module(module)
        session = session or measure.start(options)
    except Exception as error:  # handed to the parent, which raises it
        pipe.send(error)
        return
    pipe.send(session)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        done, installed = _answer(job, session)
        usable = _usable()
        pipe.send((done, installed, usable))
        if not usable:
            return


def _answer(job: Job, session: Session) -> tuple[Benchmark, bool]:
    """The record of a job, and whether its peer is installed."""
    try:
        done = measure.run(job, session)
        record.to_json(done)
    except NotInstalled as error:
        return session.failure(job, str(error), "unavailable"), False
    except ValueError as error:
        return session.failure(job, f"its figures cannot be recorded: {error}"), True
    return done, True


def _usable() -> bool:
    """Whether the GPU still answers: an illegal access takes the whole context with it."""
    if default_device().type == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
