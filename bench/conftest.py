"""`pytest bench/ --benchmark-only`: each bench_<stem>.py names ops, and every default workload of them becomes a test per backend.

On a GPU these are CUDA and Triton kernels, marked gpu; without one the reference on a few small workloads. Peers come with --peers.
What pytest-benchmark shows are the samples of the measurement (CUDA-graph replay on a GPU), not the time of the test; the whole record
stands in extra_info, and with --records FILE in that file too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llama4_kernels.bench import record, workloads
from llama4_kernels.bench.measure import Job
from llama4_kernels.bench.plan import plan
from llama4_kernels.bench.runner import JOB_SECONDS, Runner
from llama4_kernels.ops.backend import default_device

# For bench.calibration, of which --doctest-modules imports each module; after whatever holds the installed package
sys.path.append(str(Path(__file__).parents[1]))


class Clock:
    """A timer for pytest-benchmark that stands still, but for the samples it is told to pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def skip(self, seconds: float) -> None:
        self.now += seconds


def pytest_addoption(parser):
    group = parser.getgroup("llama4_kernels benchmarks")
    group.addoption("--workloads", action="append", help="names or patterns, such as 'fused_moe/*/tp8/*'; a short list if not given")
    group.addoption("--peers", action="store_true", help="measure the peers too")
    group.addoption("--records", type=Path, help="file that the records are added to")
    group.addoption("--job-seconds", type=float, default=JOB_SECONDS, help="the most that one measurement may take (%(default)g)")


def pytest_generate_tests(metafunc):
    if "job" not in metafunc.fixturenames:
        return
    config = metafunc.config
    ops, patterns = metafunc.module.OPS, config.getoption("--workloads")
    named_here = workloads.select(patterns, ops, default_device().type)
    jobs = plan(ops, patterns, None, None if config.getoption("--peers") else ["none"]) if named_here else []
    marks = [pytest.mark.gpu] if torch.cuda.is_available() else []
    metafunc.parametrize("job", [pytest.param(job, id=name(job), marks=[*marks, pytest.mark.benchmark(timer=Clock())]) for job in jobs])


def name(job: Job) -> str:
    return f"{job.workload}-{job.backend}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a run that is cut short should have comes first: our CUDA kernels, then peers, of the whole layer before those of its parts."""

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        job = getattr(getattr(item, "callspec", None), "params", {}).get("job")
        if not isinstance(job, Job):  # nothing of a file was asked for
            return False, False, False
        return job.backend == "triton", job.peer, job.peer and not job.workload.startswith("fused_moe/")

    items.sort(key=place)


@pytest.fixture(scope="session")
def runner(pytestconfig):
    with Runner(job_seconds=pytestconfig.getoption("--job-seconds")) as running:
        yield running


@pytest.fixture
def measured(job: Job, runner: Runner, benchmark, request):
    """Runs the job, and hands its samples to pytest-benchmark. Fails where a backend does; a peer's failure is expected to happen."""
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled")
    done = next(runner.run([job]), None)
    if done is None:
        pytest.skip("this peer is not installed")
    if path := request.config.getoption("--records"):
        record.append(path, [done])
    if done.status == "unavailable":
        pytest.skip(done.reason)
    if done.status != "ok":
        (pytest.xfail if job.peer else pytest.fail)(f"{done.status}: {done.reason}")
    clock = request.node.get_closest_marker("benchmark").kwargs["timer"]
    samples = iter(done.timing.samples_us)
    benchmark.pedantic(lambda: clock.skip(next(samples) / 1e6), rounds=done.timing.rounds)
    benchmark.group = job.workload
    benchmark.extra_info.update(record.to_json(done))
    return done
