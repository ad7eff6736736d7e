"""`llama4-kernels bench` and `pytest bench/`, on this machine, with the model `tiny`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
from typer.testing import CliRunner

from bench import measurement
from llama4_kernels import available_backends
from llama4_kernels.bench import formats, machine, plan, readme, record
from llama4_kernels.bench.measure import Job
from llama4_kernels.cli.main import app
from llama4_kernels.ops.backend import OPS as STEMS

ROOT = Path(__file__).parents[2]
TINY = "fused_moe/fp8/tiny/tp1/t4"


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_a_run_prints_a_table_with_a_repro_line_for_each_row_and_keeps_records(tmp_path):
    out = tmp_path / "new" / "results.json"
    ran = invoke("--workload", TINY, "--backend", "reference", "--rounds", 3, "--out", out)
    assert ran.exit_code == 0, ran.output
    assert f"llama4-kernels bench --workload {TINY} --backend reference" in ran.output
    assert "floor/time" in ran.output and "1 record added to" in ran.output
    (done,) = record.read(out).records
    assert (done.workload, done.backend, done.status, done.timing.rounds) == (TINY, "reference", "ok", 3)


def test_the_repro_line_of_a_record_measures_it_again(tmp_path):
    (job,) = plan.plan(patterns=[TINY], backends=["reference"])
    program, command, *arguments = job.repro.split()
    assert (program, command) == ("llama4-kernels", "bench")
    assert invoke(*arguments, "--out", tmp_path / "again.json").exit_code == 0
    assert [(done.workload, done.backend) for done in record.read(tmp_path).records] == [(TINY, "reference")]


def test_a_record_says_which_switches_were_set(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA4_KERNELS_PDL", "0")
    out = tmp_path / "results.json"
    assert invoke("--workload", TINY, "--backend", "reference", "--rounds", 3, "--out", out).exit_code == 0
    (done,) = record.read(out).records
    assert "LLAMA4_KERNELS_PDL=0" in done.notes
    assert done.repro == f"LLAMA4_KERNELS_PDL=0 llama4-kernels bench --workload {TINY} --backend reference"
    assert Job(TINY, "torch", peer=True).repro.startswith("llama4-kernels bench")


def test_a_switch_of_another_value_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA4_KERNELS_PDL", "off")
    ran = invoke("--workload", TINY, "--backend", "reference", "--out", tmp_path / "results.json")
    assert ran.exit_code == 2 and "bench: LLAMA4_KERNELS_PDL is 'off', needs 0 or 1" in ran.output and not list(tmp_path.iterdir())


@pytest.mark.skipif(not available_backends("fused_moe")["cuda"], reason="CUDA runs here")
def test_a_backend_that_was_asked_for_and_cannot_run_is_an_error(tmp_path):
    ran = invoke("--workload", TINY, "--backend", "cuda", "--out", tmp_path / "results.json")
    assert ran.exit_code == 1 and f"bench: {TINY} on cuda unavailable: " in ran.output
    assert "floor/time" not in ran.output and "Each row again" not in ran.output


def test_ctrl_c_ends_a_run_at_once_and_without_a_traceback(tmp_path):
    arguments = ("--workload", "quantize_per_token/fp8/tiny/tp1/t4", "--peer", "hangs", "--peer-module", "planted_peers")
    command = [
        sys.executable,
        "-c",
        "from llama4_kernels.cli.main import app; app()",
        "bench",
        *arguments,
        "--out",
        tmp_path / "results.json",
    ]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))}
    as_in_a_shell = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, **as_in_a_shell)
    try:
        started = ran.stdout.readline()  # machine and ceilings: the worker gets the job
        time.sleep(1)
        os.killpg(ran.pid, signal.SIGINT)
        output, _ = ran.communicate(timeout=20)
    finally:
        ran.kill()
    assert "copy" in started and ran.returncode == 130 and "Traceback" not in output, output


def test_a_wrong_peer_is_shown_and_fails_nothing(tmp_path):
    out = tmp_path / "results.json"
    names = [argument for name in ("right", "wrong", "raises", "absent") for argument in ("--peer", name)]
    ran = invoke("--workload", "quantize_per_token/fp8/tiny/tp1/t4", *names, "--peer-module", "planted_peers", "--out", out)
    assert ran.exit_code == 0, ran.output
    assert [done.status for done in record.read(out).records] == ["ok", "wrong", "failed", "unavailable"]
    assert "wrong: its error against the reference" in ran.output and "Not measured: quantize_per_token on absent" in ran.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workload", "nothing"], "workload is 'nothing', needs a name such as"),
        (["--op", "moe"], "op is 'moe', needs one of"),
        (["--backend", "cudnn"], "backend is 'cudnn', needs one of cuda, triton, reference"),
        (["--op", "rope_qk_norm", "--workload", TINY], "nothing to measure"),
        (["--workload", TINY, "--peer", "deepgemm"], "peer is 'deepgemm', needs all, none, or one of fbgemm_cutlass"),
        (["--workload", TINY, "--peer-module", "no_such_module"], "No module named 'no_such_module'"),
        (["--measured", ROOT], "needs --compare"),
        (["--measured", ROOT, "--compare", ROOT, "--op", "rope_qk_norm"], "'--op': has no effect with --measured"),
        (["--measured", ROOT, "--compare", ROOT, "--out", "f"], "'--out': has no effect with --measured"),
        (["--measured", ROOT, "--compare", ROOT, "--no-refcheck"], "'--refcheck': has no effect with --measured"),
        (["--workload", TINY, "--backend", "reference", "--out", "/proc/nowhere.json"], "No such file or directory: '/proc/nowhere.json'"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, complaint):
    ran = invoke(*arguments)
    assert ran.exit_code == 2
    assert complaint in " ".join(ran.output.replace("│", " ").split())


@pytest.mark.parametrize(("factor", "code", "verdict"), [(1.1, 1, "1 slower"), (1.0, 0, "1 same"), (0.9, 0, "1 faster")])
def test_compare_exits_with_1_on_a_real_regression_only(tmp_path, factor, code, verdict):
    base, now = tmp_path / "base.json", tmp_path / "now.json"
    record.append(base, [synthetic.benchmark()])
    record.append(now, [synthetic.benchmark(us=80.0 * factor, seed=1)])
    ran = invoke("--measured", now, "--compare", base)
    assert ran.exit_code == code, ran.output
    assert verdict in ran.output


def test_compare_names_a_backend_that_broke_and_reads_round_a_bad_line(tmp_path):
    base, now = tmp_path / "base.json", tmp_path / "now.json"
    record.append(base, [synthetic.benchmark()])
    with base.open("a") as file:
        file.write("{cut off")
    record.append(now, [synthetic.benchmark(status="wrong", reason="error 0.5")])
    ran = invoke("--measured", now, "--compare", base)
    assert ran.exit_code == 1
    assert f"{base}:2: not JSON" in ran.output and "is broken: llama4-kernels bench" in ran.output


def test_what_is_measured_now_is_compared_with_what_the_same_file_held_before(tmp_path):
    """The reference has become slower than a record of a microsecond says, and a record is added to that file."""
    path = tmp_path / "results.json"
    past = synthetic.benchmark(TINY, "reference", us=1.0, noise=0, machine=machine.this_machine(), date="2020-01-01T00:00:00Z")
    record.append(path, [past])
    ran = invoke("--workload", TINY, "--backend", "reference", "--out", path, "--compare", path)
    assert ran.exit_code == 1 and "1 slower" in ran.output, ran.output
    assert len(record.read(path).records) == 2


def test_a_failure_that_was_mended_since_is_none(tmp_path):
    base, now = tmp_path / "base.json", tmp_path / "now.json"
    record.append(base, [synthetic.benchmark()])
    broken = synthetic.benchmark(status="failed", reason="old crash", timing=None, date="2020-01-01T00:00:00Z")
    record.append(now, [broken, synthetic.benchmark(seed=1)])
    ran = invoke("--measured", now, "--compare", base)
    assert ran.exit_code == 0 and "old crash" not in ran.output, ran.output


def test_compare_with_another_gpu_says_that_nothing_was_measured_again(tmp_path):
    base, now = tmp_path / "base.json", tmp_path / "now.json"
    record.append(base, [synthetic.benchmark(machine=dataclasses.replace(synthetic.GPU, device="NVIDIA H100"))])
    record.append(now, [synthetic.benchmark()])
    ran = invoke("--measured", now, "--compare", base)
    assert ran.exit_code == 0 and "nothing of the base was measured again" in ran.output


def test_what_is_named_is_what_is_planned():
    def planned(**asked) -> list[tuple[str, bool]]:
        return [(job.backend, job.peer) for job in plan.plan(patterns=[TINY], **asked)]

    ours, of_peers = [job for job in planned() if not job[1]], [job for job in planned() if job[1]]
    assert ours and ("sglang", True) in of_peers
    assert planned(backends=["reference"]) == [("reference", False)]
    assert planned(peer_names=["sglang"]) == [("sglang", True)]
    assert planned(peer_names=["none"]) == ours and planned(peer_names=["all"]) == of_peers
    assert planned(backends=["reference"], peer_names=["sglang"]) == [("reference", False), ("sglang", True)]


def test_pytest_bench_runs_anywhere_and_gives_samples_and_records(tmp_path):
    command = [Path(sys.executable).with_name("pytest"), "bench/", "--benchmark-only", "-q", "-p", "no:cacheprovider", "--workloads", TINY]
    files = ["--benchmark-json", str(tmp_path / "pytest.json"), "--records", str(tmp_path / "records.json")]
    left_out = ("PYTEST_XDIST_WORKER", "PYTHONPATH")  # a worker measures nothing
    environ = {name: value for name, value in os.environ.items() if name not in left_out}
    ran = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, env=environ)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (done,) = record.read(tmp_path / "records.json").records
    (shown,) = json.loads((tmp_path / "pytest.json").read_text())["benchmarks"]
    assert shown["stats"]["median"] == pytest.approx(done.timing.median_us / 1e6, rel=1e-4)
    assert shown["stats"]["rounds"] == done.timing.rounds and shown["extra_info"]["workload"] == TINY


@pytest.mark.parametrize(
    "fault",
    [
        {"check": None},
        {"floor": record.Floor(60.0, "memory", float("nan"))},
        {"floor": record.Floor(60.0, "memory", 1.36)},
        {"launches": 0},
        {"timing": dataclasses.replace(synthetic.benchmark().timing, samples_us=(80.0, 0.0))},
    ],
    ids=["not checked", "no ratio", "under the floor", "no launch", "no time"],
)
def test_pytest_bench_refuses_what_makes_no_sense(fault):
    sound = synthetic.benchmark()
    measurement.test_a_measurement_makes_sense(sound)
    with pytest.raises(AssertionError):
        measurement.test_a_measurement_makes_sense(dataclasses.replace(sound, **fault))


def test_every_op_of_the_workloads_has_a_benchmark_file_of_its_stem():
    from llama4_kernels.bench.workloads import OPS

    named = [(op, path.stem) for path in (ROOT / "bench").glob("bench_*.py") for op in OPS if f'"{op}"' in path.read_text()]
    assert sorted(op for op, _ in named) == sorted(OPS)
    assert {(op, f"bench_{stem}") for op, stem in STEMS.items()} <= set(named)


def test_the_whole_chain_from_measurement_to_formats_readme_and_site(tmp_path):
    out, site, text = tmp_path / "results.json", tmp_path / "site", tmp_path / "README.md"
    attention = "chunked_attention/bf16/tiny/tp1/local/b2/q1/c100/p16"
    assert invoke("--workload", TINY, "--workload", attention, "--backend", "reference", "--rounds", 3, "--out", out).exit_code == 0
    text.write_text(f"{readme.START}\n{readme.END}\n")
    exports = [argument for form in formats.FORMATS for argument in ("--export", f"{form}={tmp_path / form}.json")]
    ran = CliRunner().invoke(app, ["report", str(out), "--out", str(site), "--readme", str(text), *exports])
    assert ran.exit_code == 0, ran.output
    assert "3 pages written" in ran.output and readme.NOTHING in text.read_text()
    assert {page.name for page in (site / "workload").iterdir()} == {f"{name.replace('/', '-')}.html" for name in (TINY, attention)}
    written = {form: json.loads((tmp_path / f"{form}.json").read_text()) for form in formats.FORMATS}
    assert len(written["pytest"]["benchmarks"]) == len(written["action"]) == 2 and len(written["oss"]) >= 2 * 4


def test_report_without_results_names_the_folder_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["report", "--out", "site"])
    assert ran.exit_code == 1 and f"{tmp_path}/bench/results holds no folder of results" in ran.output and not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give at least one of --out, --readme and --export"),
        (["--export", "oss"], "needs format=path"),
        (["--export", "csv=x"], "needs one of pytest, oss"),
    ],
)
def test_report_says_what_it_needs(arguments, complaint, tmp_path):
    record.append(tmp_path / "results.json", [synthetic.benchmark()])
    ran = CliRunner().invoke(app, ["report", str(tmp_path), *arguments])
    assert ran.exit_code in (1, 2) and complaint in " ".join(ran.output.replace("│", " ").split())
