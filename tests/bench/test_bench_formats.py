"""Results in the formats of other tools, read by those tools or checked against their schemas."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import pytest
import synthetic

from llama4_kernels.bench import formats, record
from llama4_kernels.bench.measure import Job, Options, run, start

SCHEMAS = Path(__file__).parent / "schemas"
SYNTHETIC = [
    synthetic.benchmark(),
    synthetic.benchmark(backend="sglang", peer=True, us=160.0),
    synthetic.benchmark("chunked_attention/bf16/scout/tp8/local/b64/q1/c8192/p64", launches=None, floor=None),
    synthetic.benchmark(status="wrong", reason="error 0.3"),
    synthetic.benchmark(backend="cuda", status="unavailable", reason="not built", timing=None, floor=None),
    synthetic.calibration(),
]


@pytest.fixture(scope="module")
def measured() -> list[record.Record]:
    """What this machine really measures, and made-up results of a GPU."""
    return [run(Job("fused_moe/fp8/tiny/tp1/t4", "reference"), start(Options(rounds=3))), *SYNTHETIC]


def written(form: str, path: Path, records: list[record.Record]):
    formats.write(form, path, records)
    return json.loads(path.read_text())


@pytest.mark.parametrize(("form", "schema"), [("oss", "oss_benchmark_v3"), ("action", "github_action_benchmark")])
def test_a_format_keeps_to_its_schema(form, schema, tmp_path, measured):
    validator = jsonschema_rs.validator_for(json.loads((SCHEMAS / f"{schema}.json").read_text()))
    entries = written(form, tmp_path / "out.json", measured)
    assert entries and [error.message for error in validator.iter_errors(entries)] == []


@pytest.mark.parametrize(("form", "schema"), [("oss", "oss_benchmark_v3"), ("action", "github_action_benchmark")])
def test_the_schemas_notice_what_is_missing(form, schema, tmp_path):
    validator = jsonschema_rs.validator_for(json.loads((SCHEMAS / f"{schema}.json").read_text()))
    (entry, *_) = written(form, tmp_path / "out.json", SYNTHETIC)
    for name in ("metric", "benchmark", "model") if form == "oss" else ("name", "unit", "value"):
        assert not validator.is_valid([{key: value for key, value in entry.items() if key != name}]), name


def test_only_right_results_are_written(tmp_path):
    names = [entry["name"] for entry in written("action", tmp_path / "new" / "folders" / "out.json", SYNTHETIC)]
    assert names == [
        "fused_moe/fp8/scout/tp8/t64[triton] on NVIDIA H200",
        "fused_moe/fp8/scout/tp8/t64[sglang] on NVIDIA H200",
        "chunked_attention/bf16/scout/tp8/local/b64/q1/c8192/p64[triton] on NVIDIA H200",
    ]


def test_values_are_those_of_the_record(tmp_path):
    done = SYNTHETIC[0]
    assert written("action", tmp_path / "action.json", [done])[0]["value"] == done.timing.median_us
    metrics = {entry["metric"]["name"]: entry["metric"] for entry in written("oss", tmp_path / "oss.json", [done])}
    assert metrics["latency"]["benchmark_values"] == list(done.timing.samples_us)
    assert metrics["latency"]["target_value"] == done.floor.us
    assert metrics["memory_bandwidth"]["benchmark_values"] == [done.achieved_gb_s]


def test_pytest_benchmark_compares_our_file(tmp_path, measured):
    """Its own command reads the file, and shows our median in microseconds."""
    path = tmp_path / "out.json"
    shown = written("pytest", path, measured)["benchmarks"]
    command = shutil.which("pytest-benchmark") or str(Path(sys.executable).parent / "pytest-benchmark")
    arguments = ["compare", str(path), "--columns=median,rounds", "--sort=name", f"--csv={tmp_path / 'out.csv'}"]
    ran = subprocess.run([command, "--storage", str(tmp_path), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    csv = (tmp_path / "out.csv").read_text()
    assert len(shown) == 4 and all(entry["name"] in csv for entry in shown)
    assert str(SYNTHETIC[0].timing.rounds) in csv


def test_nothing_measured_gives_empty_files(tmp_path):
    assert written("oss", tmp_path / "oss.json", []) == written("action", tmp_path / "action.json", []) == []
    assert written("pytest", tmp_path / "pytest.json", [])["benchmarks"] == []


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="format is 'csv', needs one of pytest, oss, action"):
        formats.write("csv", tmp_path / "out.csv", [])
