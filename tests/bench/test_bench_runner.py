"""A run measures every job: what crashes, hangs, is wrong or absent is reported as such, and what comes after it is measured."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llama4_kernels.bench import measure, record
from llama4_kernels.bench import runner as runner_module
from llama4_kernels.bench.measure import Job, Options
from llama4_kernels.bench.runner import Runner

ONE, FOUR = "quantize_per_token/fp8/tiny/tp1/t1", "quantize_per_token/fp8/tiny/tp1/t4"


@pytest.fixture(scope="module")
def results():
    """The planted peers and the reference on two workloads, in one run."""
    names = ("right", "wrong", "nan", "misshapen", "raises", "absent", "choosy", "dies", "exits", "hangs")
    jobs = [Job(ONE, name, peer=True) for name in names]
    jobs += [Job(FOUR, name, peer=True) for name in names if name not in ("dies", "exits", "hangs")]
    jobs.append(Job(FOUR, "reference"))
    with Runner(Options(rounds=3), ["planted_peers"], job_seconds=15) as runner:
        return {(done.workload, done.backend): done for done in runner.run(jobs)}


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("right", "ok", ""),
        ("wrong", "wrong", "its error against the reference is 1.0e-01, needs at most 4e-03"),
        ("nan", "wrong", "its error against the reference is not a finite number, needs at most 4e-03"),
        ("raises", "failed", "RuntimeError: "),
        ("dies", "failed", "its process died: SIGSEGV"),
        ("exits", "failed", "its process died: exit code 3"),
        ("hangs", "failed", "not done after 15 s, its process was killed"),
    ],
)
def test_each_peer_gets_the_verdict_that_it_earned(results, name, status, reason):
    done = results[ONE, name]
    assert (done.status, done.peer) == (status, True)
    assert done.reason.startswith(reason) and bool(done.reason) == bool(reason)


def test_a_result_of_another_shape_is_wrong(results):
    assert results[FOUR, "misshapen"].status == "wrong"


def test_a_peer_that_is_not_installed_is_reported_once(results):
    assert results[ONE, "absent"].status == "unavailable" and "no_such_package" in results[ONE, "absent"].reason
    assert (FOUR, "absent") not in results


def test_a_peer_may_leave_out_a_workload(results):
    assert results[ONE, "choosy"].status == "ok"
    assert (results[FOUR, "choosy"].status, results[FOUR, "choosy"].reason) == ("unavailable", "needs one token")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's figures")
def test_what_comes_last_is_measured(results, tmp_path):
    done = results[FOUR, "reference"]
    assert done.status == "ok" and done.timing.rounds == 3 and measure.ON_CPU in done.notes
    assert done.timing.method == "wall_clock" and not done.timing.cold_l2 and done.launches is None
    assert done.check is None and "not checked: this is what others are checked against" in done.notes
    assert done.timing.p10_us <= done.timing.median_us <= done.timing.p90_us
    assert done.floor.ratio == pytest.approx(done.floor.us / done.timing.median_us)
    record.append(tmp_path / "all.json", results.values())
    assert record.read(tmp_path) == record.Contents(tuple(results.values()), ())


def test_all_records_of_a_run_say_so(results):
    assert len({done.run for done in results.values()}) == 1
    measured = [done for done in results.values() if done.ceilings]
    assert len({done.ceilings.copy_gb_s for done in measured}) == 1 and measured[0].ceilings.matmul_tflop_s["fp32"] > 0


def test_a_process_that_does_not_start_is_killed(tmp_path, monkeypatch):
    (tmp_path / "sleepy_peers.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(runner_module, "START_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match=r"has not measured the ceilings after 0\.5 s, and was killed"), Runner(Options(), ["sleepy_peers"]):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_a_backend_that_cannot_run_here_is_unavailable():
    session = measure.start()
    done = measure.run(Job(ONE, "triton"), session)
    assert done.status == "unavailable" and done.reason
    assert measure.run(Job("quantize_per_token/fp8/tiny/tp1/none", "reference"), session).reason.startswith("ValueError: workload is")


def test_a_module_of_peers_that_does_not_import_stops_the_run_at_its_start():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Runner(peer_modules=["no_such_module"]).__enter__()


def test_without_refcheck_nothing_is_checked():
    import planted_peers  # noqa: F401

    session = measure.start(Options(refcheck=False, rounds=3))
    done = measure.run(Job(FOUR, "wrong", peer=True), session)
    assert (done.status, done.check) == ("ok", None)


def test_measuring_needs_no_package_of_the_extra():
    """As on a GPU host without network: torch is there, what reads results and draws is not."""
    code = """
import sys
for name in ("jsonschema_rs", "jinja2", "plotly", "rich", "scipy", "typer", "numpy", "sglang"):
    sys.modules[name] = None
from llama4_kernels.bench import measure, plan, record, runner
(job,) = plan.plan(patterns=["quantize_per_token/fp8/tiny/tp1/t4"], backends=["reference"])
done = measure.run(job, measure.start(measure.Options(rounds=3)))
record.to_json(done)
print(done.status, done.reason)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == ["ok"], ran.stdout + ran.stderr
