"""One workload on one backend or peer: checked, timed, and set against the floor. Whatever goes wrong becomes part of the record."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from llama4_kernels import BackendError, available_backends, switches, use_backend
from llama4_kernels.bench import ceilings, inputs, peers, record, timing, workloads
from llama4_kernels.bench.machine import Machine, clocks, this_machine
from llama4_kernels.bench.peers import Case, NotInstalled, Unavailable
from llama4_kernels.bench.record import Benchmark, Ceilings, Check
from llama4_kernels.ops.backend import default_device

# Ops that a layer calls
PARTS = {"attention_part": ("rope_qk_norm", "chunked_attention"), "decoder_layer": ("rope_qk_norm", "chunked_attention", "fused_moe")}
ON_CPU = "the reference in plain PyTorch on a CPU: it shows that the chain works, and says nothing about a kernel's speed"


@dataclass(frozen=True)
class Job:
    """What to measure: a workload by name, on a backend, or on a peer where peer is true."""

    workload: str
    backend: str
    peer: bool = False

    @property
    def repro(self) -> str:
        command = f"llama4-kernels bench --workload {self.workload} --{'peer' if self.peer else 'backend'} {self.backend}"
        return " ".join([*self.switches, command])

    @property
    def switches(self) -> list[str]:
        """As a shell sets them, those of this process that say how our backends run."""
        return [] if self.peer else switches.given()


@dataclass(frozen=True)
class Options:
    """refcheck: compare results with the reference. rounds: samples, None for the timer's own number."""

    refcheck: bool = True
    rounds: int | None = None


@dataclass
class Session:
    """What the records of one run share."""

    machine: Machine
    ceilings: Ceilings
    run: str
    options: Options = field(default_factory=Options)

    def blank(self, job: Job) -> Benchmark:
        """The record of a job before anything is known."""
        op = job.workload.partition("/")[0]
        return Benchmark(op, job.workload, job.backend, self.machine, self.run, record.now(), job.repro, peer=job.peer)

    def failure(self, job: Job, reason: str, status: str = "failed") -> Benchmark:
        return replace(self.blank(job), status=status, reason=reason)


def start(options: Options | None = None) -> Session:
    """Measures the ceilings, and names the run; ValueError where a switch is neither 0 nor 1."""
    switches.given()
    device = default_device()
    machine = this_machine(device)
    return Session(machine, ceilings.measure(device), record.run_id(machine, record.now()), options or Options())


def missing(op: str, backend: str, device: torch.device) -> str:
    """Why `backend` cannot compute an op of the workloads, or ""."""
    reasons = (available_backends(part, device)[backend] for part in PARTS.get(op, (op,)))
    return next(filter(None, reasons), "")


def run(job: Job, session: Session) -> Benchmark:
    """The record of a job, whose reason any exception becomes. Only NotInstalled is raised, for a peer that no workload will bring back."""
    device = default_device()
    try:
        problem = _problem(job.workload, device)
        if not job.peer and (reason := missing(problem.workload.op, job.backend, device)):
            raise Unavailable(reason)
        with _backend(job):
            return _measure(job, problem, session, device)
    except NotInstalled:
        raise
    except Unavailable as error:
        return session.failure(job, str(error), "unavailable")
    except BackendError as error:
        return session.failure(job, error.reason, "unavailable")
    except Exception as error:  # of any kernel or peer: it is a result, and the next job does not depend on it
        return session.failure(job, timing.one_line(error))


@functools.lru_cache(maxsize=1)
def _problem(workload: str, device: torch.device) -> inputs.Problem:
    return inputs.make(workloads.parse(workload), device)


@contextlib.contextmanager
def _backend(job: Job) -> Iterator[None]:
    with contextlib.nullcontext() if job.peer else use_backend(job.backend):
        yield


def _build(job: Job, problem: inputs.Problem) -> Case:
    if job.peer:
        return peers.build(job.backend, problem)
    return Case(functools.partial(problem.call, **problem.arguments), problem.canonical)


def _measure(job: Job, problem: inputs.Problem, session: Session, device: torch.device) -> Benchmark:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier job held counts as free again
    before = clocks(device)
    # Ops that write into a cache must not write into the inputs of the next job
    held = _allocated(device)
    mine = problem.copy()
    case = _build(job, mine)
    footprint = _allocated(device) - held
    result = case.result(case.run())
    is_oracle = not job.peer and job.backend == "reference"
    check = _check(job, problem, result) if session.options.refcheck and not is_oracle else None
    del result
    single_us = timing.estimate_us(case.run, device)
    copies = 1 if case.single else timing.calls_per_replay(single_us, footprint, device)
    cases = [case, *(_build(job, problem.copy()) for _ in range(copies - 1))]
    timed, notes = timing.time_calls([each.run for each in cases], device, session.options.rounds)
    after = clocks(device)
    work = workloads.work(problem.workload, problem.distinct_experts)
    if is_oracle and session.options.refcheck:
        notes.append("not checked: this is what others are checked against")
    if device.type == "cpu":
        notes.append(ON_CPU)
    done = replace(
        session.blank(job),
        timing=timed,
        bytes=work.bytes,
        flops=work.total_flops,
        achieved_gb_s=work.bytes / timed.median_us / 1e3,
        achieved_tflop_s=work.total_flops / timed.median_us / 1e6,
        ceilings=session.ceilings,
        floor=ceilings.floor(work, session.ceilings, timed.median_us),
        check=check,
        launches=timing.count_launches(case.run, device),
        peak_memory_bytes=timing.peak_memory(case.run, device),
        clocks_before=before,
        clocks_after=after,
        notes=tuple(filter(None, (case.note, *job.switches, *notes))),
    )
    if check is None or (check.error is not None and check.error <= check.bound):
        return done
    found = "not a finite number" if check.error is None else f"{check.error:.1e}"
    return replace(done, status="wrong", reason=f"its error against the reference is {found}, needs at most {check.bound:.0e}")


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _check(job: Job, problem: inputs.Problem, result: object) -> Check:
    bound = peers.peers_of(problem.workload.op)[job.backend].bound if job.peer else problem.bound
    error = problem.error(result)
    return Check(error if math.isfinite(error) else None, bound, "the reference on the same input")
