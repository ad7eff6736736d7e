"""Measuring on a GPU: graphs, cold caches, launches and ceilings are what they claim to be."""

from __future__ import annotations

import functools

import pytest
import torch

from llama4_kernels import use_backend
from llama4_kernels.bench import ceilings, inputs, measure, timing, workloads
from llama4_kernels.bench.measure import Job, Options

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def session() -> measure.Session:
    return measure.start(Options(rounds=10))


def test_ceilings_are_those_of_a_hopper_gpu(session):
    assert 1000 < session.ceilings.copy_gb_s < 5000
    assert 200 < session.ceilings.matmul_tflop_s["bf16"] < 1100 and 400 < session.ceilings.matmul_tflop_s["fp8"] < 2200


def test_no_kernel_reads_far_above_the_copy_ceiling(session):
    x = torch.ones(1 << 28, device=GPU)
    timed, _ = timing.time_calls([x.sum], GPU, 10)
    assert x.nbytes / timed.median_us / 1e3 < 1.25 * session.ceilings.copy_gb_s


@pytest.mark.parametrize("workload", ["quantize_per_token/fp8/scout/tp8/t64", "fused_moe/fp8/scout/tp8/t64"])
def test_a_kernel_is_timed_by_graph_replay_checked_and_under_its_floor(session, workload):
    done = measure.run(Job(workload, "triton"), session)
    assert done.status == "ok", done.reason
    assert done.timing.method == "cuda_graph" and done.timing.cold_l2 and done.timing.rounds == 10
    assert done.launches >= 1 and done.peak_memory_bytes > 0 and done.check.error <= done.check.bound
    assert 0 < done.floor.ratio < 1.1
    assert done.clocks_before.sm_mhz is None or done.clocks_before.sm_mhz > 100


def test_what_cannot_be_captured_is_timed_without_a_graph_and_says_so(session):
    done = measure.run(Job("fused_moe/fp8/tiny/tp1/t4", "reference"), session)
    assert done.status == "ok" and done.timing.method == "cuda_events"
    assert any("without a CUDA graph" in note for note in done.notes)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_graph_holds_what_the_op_launches_and_nothing_else(backend):
    """Ops whose blocks draw tickets find their counters there."""
    problem = inputs.make(workloads.parse("fused_moe/fp8/tiny/tp1/t4"), GPU)
    with use_backend(backend):
        call = functools.partial(problem.call, **problem.arguments)
        assert timing.count_launches(timing.captured(call, GPU), GPU) == timing.count_launches(call, GPU)


def test_short_calls_share_a_replay(session):
    done = measure.run(Job("quantize_per_token/fp8/scout/tp8/t64", "triton"), session)
    assert done.timing.calls == timing.MAX_CALLS


def test_launches_are_counted():
    x = torch.ones(1024, device=GPU)
    assert timing.count_launches(lambda: x + 1, GPU) == 1
    assert timing.count_launches(lambda: ((x + 1) * 2).clone(), GPU) == 3


def test_peak_memory_is_that_of_one_call():
    x = torch.ones(1 << 20, device=GPU)
    assert (1 << 22) <= timing.peak_memory(lambda: x + 1, GPU) < (1 << 23)


def test_a_buffer_that_fits_in_the_l2_cache_is_read_from_memory():
    """16 MB: from a warm cache it would come at several times the copy bandwidth."""
    x = torch.ones(1 << 22, device=GPU)
    timed, _ = timing.time_calls([x.sum], GPU, 20)
    bandwidth = x.nbytes / timed.median_us / 1e3
    assert bandwidth < 1.1 * ceilings.copy_gb_s(GPU)
