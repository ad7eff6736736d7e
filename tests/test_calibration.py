"""bench/calibration without a GPU: its plan, its command line, and what becomes of measurements that crash, hang or give wrong results."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.calibration import __main__ as command
from bench.calibration import measurement, plan, runner
from bench.calibration import peers as peer_steps
from bench.calibration.measurement import Case, Measurement, Unavailable, WrongResult, timed
from bench.calibration.measurements import MEASUREMENTS
from llama4_kernels import use_backend
from llama4_kernels.bench import measure, peers, record, workloads
from llama4_kernels.bench.machine import Machine
from llama4_kernels.bench.record import Benchmark, Calibration, Ceilings, Figure
from llama4_kernels.bench.timing import summary

ROOT = Path(__file__).parents[1]
HOPPER = Machine("NVIDIA H200", "gpu", "9.0", 700.0, "580.1", "13.0", "2.11.0", "3.6.0", "3.12.3", "0123abc" * 5, False)
AMPERE = Machine("NVIDIA A100", "gpu", "8.0", 400.0, "580.1", "13.0", "2.11.0", "3.6.0", "3.12.3", "0123abc" * 5, False)
RUN = "20260101T000000Z-0123abc"


def invoke(*arguments: str):
    return CliRunner().invoke(command.app, list(arguments))


def test_the_time_boxes_add_up_to_what_was_promised():
    assert plan.BUILD_SECONDS + sum(step.seconds for step in MEASUREMENTS) <= plan.CHIP_SECONDS == 480
    assert sum(step.seconds for step in peer_steps.PEERS) <= plan.PEERS_SECONDS == 600


def test_every_peer_has_a_time_box_and_no_other_name():
    for op, seconds in peer_steps.SECONDS.items():
        assert seconds.keys() == peers.peers_of(op).keys(), op


def test_questions_are_unique_and_every_case_can_be_recorded():
    assert len({step.question for step in plan.STEPS}) == len(plan.STEPS)
    for step in MEASUREMENTS:
        cases = step.cases()
        assert len({json.dumps(case.parameters, sort_keys=True) for case in cases}) == len(cases) > 0, step.question
        for case in cases:
            assert case.bytes >= 0 and case.flops >= 0
            one = Calibration(
                step.question, step.title, {"time": Figure(1.0, "us")}, HOPPER, RUN, record.now(), "", parameters=case.parameters
            )
            assert record.from_json(record.to_json(one)) == one


def test_peers_meet_llama_4():
    names = [case.parameters["workload"] for step in peer_steps.PEERS for case in step.cases()]
    for part in ("scout/tp8/t1", "maverick/tp8/t8192", "scout/tp1/t64", "maverick/tp1/t8192"):
        assert all(f"{op}/fp8/{part}" in names for op in ("grouped_gemm", "fused_moe", "route_top1"))
    for part in ("b1/q1/c1024", "b256/q1/c8192", "b8/q1/c131072", "b1/q131072/c131072"):
        assert f"chunked_attention/bf16/scout/tp8/local/{part}/p64" in names
    assert all(case.bytes > 0 for step in peer_steps.PEERS for case in step.cases())


def test_dry_run_prints_every_case_with_bytes_and_flops():
    shown = invoke("--dry-run", "--only", "bandwidth/copy", "--only", "matmul/fp8")
    assert shown.exit_code == 0
    assert "    mib 64, l2 cold: 134 MB, 0 flop\n" in shown.output
    assert "    layer square, m 8192, n 8192, k 8192: 268 MB, 1.1 Tflop\n" in shown.output
    assert "2 steps, 40 s at most, and 60 s to compile the kernels" in shown.output
    assert len(invoke("--dry-run").output.splitlines()) > 300


def test_list_names_the_measurements_and_the_peers():
    lines = invoke("--list").output.splitlines()
    assert [line.split()[0] for line in lines] == [step.question for step in plan.STEPS]


def test_only_takes_first_parts_and_refuses_what_is_none():
    assert [step.question for step in plan.select(["launch"], peers=False)] == ["launch/graph", "launch/dependent", "launch/barrier"]
    assert {step.question for step in plan.select(["peers/fused_moe"], peers=False)} >= {"peers/fused_moe/sglang"}
    assert not [step for step in plan.select([], peers=False) if step.question.startswith("peers/")]
    refused = invoke("--list", "--only", "launc")
    assert refused.exit_code == 2 and "'launc' is no question" in re.sub(r"[│\s]+", " ", refused.output)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shown = invoke("--out", str(tmp_path))
    assert shown.exit_code == 1 and "torch sees no GPU" in shown.output and not list(tmp_path.iterdir())


def test_a_process_that_hangs_is_killed_with_its_children():
    started = time.monotonic()
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); subprocess.run(['sleep', '60'])"
    lines: list[str] = []
    ended = runner.execute([sys.executable, "-c", code], 1.5, lines.append)
    assert time.monotonic() - started < 20
    assert ended.code is None and ended.reason.startswith("not done after ")
    assert is_gone(int(lines[0]))


def test_a_process_ends_with_the_one_that_runs_it():
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        os.kill(os.getpid(), signal.SIGUSR1)

    def stop(*_) -> None:
        raise SystemExit(1)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(SystemExit):
            runner.execute([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], 60, say)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert is_gone(int(lines[0]))


def is_gone(pid: int) -> bool:
    """Whether a process ends within a second; one that was killed may be left as a zombie for its parent."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_children_do_not_outlive_their_process():
    lines: list[str] = []
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    ended = runner.execute([sys.executable, "-c", code], 20, lines.append)
    assert ended.reason == "" and ended.seconds < 10 and is_gone(int(lines[0]))


def test_a_process_that_crashes_leaves_its_last_words():
    ended = runner.execute([sys.executable, "-c", "print('one'); raise SystemExit('out of registers')"], 20, lambda line: None)
    assert ended.reason == "exit code 1: out of registers"
    killed = runner.execute([sys.executable, "-c", "import os; os.abort()"], 20, lambda line: None)
    assert killed.reason == "exit code -6: it said nothing"


@pytest.fixture
def steps():
    """Two measurements, of which the first needs a Hopper GPU."""
    cases = [Case({"mib": size}, bytes=size << 20) for size in (1, 2)]
    return [
        Measurement("first", "The first?", 9, lambda: cases, lambda case: {}),
        Measurement("second", "The second?", 9, lambda: cases, lambda case: {}, hopper=False),
    ]


def fake_process(written, ended):
    """Stands in for runner.execute: appends the records that `written` has for a question, and ends as `ended` has it."""

    def execute(process, seconds, say):
        if process[2] != "bench.calibration.worker":
            return runner.Ended(0, 1.0)
        _, _, _, question, file, _ = process
        record.append(Path(file), written.get(question, []))
        return ended.get(question, runner.Ended(0, 2.0))

    return execute


def calibration(question: str, size: int) -> Calibration:
    return Calibration(question, "?", {"bandwidth": Figure(100.0 * size, "GB/s")}, HOPPER, RUN, record.now(), "", parameters={"mib": size})


def test_a_step_that_is_not_done_keeps_its_records_and_the_rest_goes_on(steps, monkeypatch, tmp_path):
    written = {"first": [calibration("first", 1)], "second": [calibration("second", 1), calibration("second", 2)]}
    monkeypatch.setattr(runner, "execute", fake_process(written, {"first": runner.Ended(None, 9.0)}))
    file = tmp_path / "records.json"
    first, second = runner.run(steps, file, HOPPER, RUN, lambda line: None)
    assert first.reason == "not done after 9 s" and len(first.records) == 1 and first.cases == 2
    assert second.reason == "" and len(second.records) == 2
    contents = record.read(file)
    assert not contents.problems
    statuses = [(each.question, each.status, each.reason) for each in contents.records]
    assert statuses[1] == ("first", "failed", "not done after 9 s; 1 of 2 cases measured")
    assert [status for _, status, _ in statuses] == ["ok", "failed", "ok", "ok"]
    assert command.is_failure(first) and not command.is_failure(second)
    assert command.best(second.records) == "200 GB/s (mib 2)"


def test_another_gpu_skips_what_needs_hopper_and_measures_the_rest(steps, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "execute", fake_process({"second": [calibration("second", 1)]}, {}))
    file = tmp_path / "records.json"
    first, second = runner.run(steps, file, AMPERE, RUN, lambda line: None)
    assert first.reason == "NVIDIA A100 has compute capability 8.0, needs 9.0" and not first.records
    assert not second.reason and len(second.records) == 1
    assert [each.status for each in record.read(file).records] == ["unavailable", "ok"]


def test_kernels_that_do_not_compile_are_the_reason(steps, monkeypatch, tmp_path):
    def execute(process, seconds, say):
        return runner.Ended(1, 1.0, "no nvcc") if process[2] == "bench.calibration.native" else runner.Ended(0, 1.0)

    monkeypatch.setattr(runner, "execute", execute)
    first, second = runner.run(steps, tmp_path / "records.json", HOPPER, RUN, lambda line: None)
    assert first.reason == "the kernels were not compiled: exit code 1: no nvcc" and not second.reason


def test_a_peer_that_is_not_done_gets_a_record_for_each_workload_left(monkeypatch, tmp_path):
    step = peer_steps.PEERS[0]
    names = [case.parameters["workload"] for case in step.cases()]
    known = Benchmark(step.op, names[0], step.peer, HOPPER, RUN, record.now(), "", peer=True, status="failed", reason="?")
    monkeypatch.setattr(runner, "execute", fake_process({step.question: [known]}, {step.question: runner.Ended(-11, 3.0, "segfault")}))
    file = tmp_path / "records.json"
    list(runner.run([step], file, HOPPER, RUN, lambda line: None))
    contents = record.read(file)
    assert not contents.problems
    assert [each.workload for each in contents.records] == names
    assert {each.reason for each in contents.records[1:]} == {"exit code -11: segfault"}


@pytest.fixture
def peer_step(monkeypatch):
    """A peer on two workloads that a CPU can do."""
    tiny = [workloads.parse(f"grouped_gemm/fp8/tiny/tp1/t{tokens}") for tokens in (1, 8)]
    monkeypatch.setattr(peer_steps, "workloads_of", lambda op: tiny)
    monkeypatch.setattr(measure, "start", lambda options: measure.Session(HOPPER, Ceilings(100.0, {"fp32": 1.0}), "another run", options))
    return peer_steps.PeerStep("grouped_gemm", "torch", 9)


def test_a_peer_is_checked_and_timed_on_every_workload(peer_step, monkeypatch):
    def build(name, problem):
        with use_backend("reference"):
            out = problem.call(**problem.arguments)
        wrong = 1 + (problem.workload.tokens == 8)
        return peers.Case(lambda: out * wrong, problem.canonical, "computed beforehand")

    monkeypatch.setattr(peers, "build", build)
    right, wrong = peer_step.records(RUN)
    assert right.status == "ok" and right.peer and right.backend == "torch" and right.run == RUN and right.floor.ratio > 0
    assert wrong.status == "wrong" and wrong.workload.endswith("t8") and "its error against the reference" in wrong.reason


def test_a_peer_that_is_not_installed_is_recorded_once(peer_step, monkeypatch):
    def build(name, problem):
        raise peers.NotInstalled("no such package")

    monkeypatch.setattr(peers, "build", build)
    (only,) = peer_step.records(RUN)
    assert (only.status, only.reason) == ("unavailable", "no such package")


def test_a_case_that_fails_is_a_record_and_the_next_is_measured(monkeypatch):
    def answer_of(case: Case):
        answers = {
            1: {"time": Figure(2.0, "us")},
            2: WrongResult("differs"),
            3: Unavailable("no room"),
            4: ValueError("odd"),
            5: {"time": Figure(math.nan, "us")},
        }
        answer = answers[case.parameters["n"]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(measurement, "this_machine", lambda: HOPPER)
    monkeypatch.setattr(measurement, "clocks", lambda device: None)
    found = list(Measurement("q", "?", 1, lambda: [Case({"n": n}) for n in range(1, 6)], answer_of).records(RUN))
    assert [(each.status, each.reason) for each in found] == [
        ("ok", ""),
        ("wrong", "differs"),
        ("unavailable", "no room"),
        ("failed", "ValueError: odd"),
        ("wrong", "time: not a finite number"),
    ]
    assert found[0].figures["time"].value == 2.0 and all(record.from_json(record.to_json(each)) == each for each in found)


def test_rates_are_those_of_the_median_time():
    figures = timed(Case({}, bytes=2000, flops=6_000_000), summary("cuda_graph", True, [1.0, 2.0, 9.0]))
    assert figures["time"] == Figure(2.0, "us")
    assert figures["bandwidth"] == Figure(1.0, "GB/s") and figures["rate"] == Figure(3.0, "TFLOP/s")


def test_the_worker_records_every_case_in_a_process_of_its_own(tmp_path):
    """Where there is no GPU each case fails, and says so."""
    file, lines = tmp_path / "records.json", []
    worker = ["env", "CUDA_VISIBLE_DEVICES=", sys.executable, "-m", "bench.calibration.worker", "bandwidth/torch_copy", str(file), RUN]
    assert runner.execute(worker, 60, lines.append).reason == ""
    contents = record.read(file)
    cases = plan.find("bandwidth/torch_copy").cases()
    assert not contents.problems and [each.parameters for each in contents.records] == [case.parameters for case in cases]
    assert all(each.status == "failed" and re.search("CUDA|NVIDIA", each.reason) and each.run == RUN for each in contents.records)
    assert len(lines) == len(cases) and lines[0].startswith("mib 4096, l2 cold: failed: ")
