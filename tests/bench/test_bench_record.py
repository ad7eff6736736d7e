"""The record: what is written is read again, and what is no record is named with file and line."""

from __future__ import annotations

import dataclasses
import json

import jsonschema_rs
import pytest
import synthetic
import torch

from llama4_kernels.bench import machine, record
from llama4_kernels.ops.backend import default_device


def test_the_schema_is_one():
    jsonschema_rs.meta.validate(json.loads(record.SCHEMA_FILE.read_text()))


@pytest.mark.parametrize(
    "written",
    [
        synthetic.benchmark(),
        synthetic.benchmark(peer=True, backend="torch", notes=("use_fast_accum=True",)),
        synthetic.benchmark(status="wrong", reason="error 0.3", check=record.Check(None, 4e-3, "reference")),
        synthetic.benchmark(status="unavailable", reason="not installed", timing=None, floor=None, achieved_gb_s=None),
        synthetic.benchmark(clocks_before=machine.Clocks(1980.0, 3201.0, 100.5, 40.0), clocks_after=machine.Clocks(None, None, None, None)),
        synthetic.calibration(),
        synthetic.calibration(status="failed", reason="out of memory", figures={}, parameters={"bytes": 1 << 30, "kind": "copy"}),
    ],
    ids=lambda written: f"{type(written).__name__} {written.status}",
)
def test_what_is_written_is_read_again(tmp_path, written):
    for _ in range(2):
        record.append(tmp_path / "new" / "folders" / "file.json", [written])
    assert record.read(tmp_path) == record.Contents((written, written), ())


def test_every_field_of_the_dataclasses_is_in_the_schema():
    definitions = json.loads(record.SCHEMA_FILE.read_text())["$defs"]
    classes = {
        "benchmark": record.Benchmark,
        "calibration": record.Calibration,
        "machine": machine.Machine,
        "clocks": machine.Clocks,
        "timing": record.Timing,
        "ceilings": record.Ceilings,
        "floor": record.Floor,
        "check": record.Check,
    }
    for name, cls in classes.items():
        fields = {field.name for field in dataclasses.fields(cls)} | ({"schema", "kind"} if name in ("benchmark", "calibration") else set())
        later = {"calls"} if cls is record.Timing else set()  # than the first records of this version
        assert set(definitions[name]["properties"]) == set(definitions[name]["required"]) | later == fields, name


def changed(**fields) -> str:
    return json.dumps(record.to_json(synthetic.benchmark()) | fields)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"schema": 1, "kind"', ":1: not JSON"),
        (b"[1, 2]", ":1: is a JSON list"),
        (b'{"benchmarks": []}', ":1: schema version is None, needs 1"),
        (changed(schema=0).encode(), ":1: schema version is 0, needs 1"),
        (changed(schema=2).encode(), ":1: schema version is 2, needs 1"),
        (changed(surprise=1).encode(), "'surprise' was unexpected"),
        (changed(status="fine").encode(), ":1: status: "),
        (changed(timing=None).encode(), ":1: timing: "),
        (changed(status="failed").encode(), ":1: reason: "),
        (changed(timing={"median_us": -1}).encode(), ":1: timing"),
        (changed(machine=None).encode(), ":1: machine: "),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_what_is_no_record_is_named_and_the_rest_is_read(tmp_path, content, complaint):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_bytes(content)
    record.append(good, [synthetic.benchmark()])
    contents = record.read(bad, good)
    assert contents.records == (synthetic.benchmark(),)
    assert any(complaint in problem and problem.startswith(str(bad)) for problem in contents.problems), contents.problems


def test_a_line_cut_off_costs_that_line_only(tmp_path):
    path = tmp_path / "file.json"
    record.append(path, [synthetic.benchmark(), synthetic.benchmark(seed=1)])
    path.write_text(path.read_text()[:-50])
    contents = record.read(path)
    assert contents.records == (synthetic.benchmark(),)
    (problem,) = contents.problems
    assert problem.startswith(f"{path}:2: not JSON")


def test_a_file_of_another_kind_is_named_once_and_many_bad_lines_are_counted(tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rows": list(range(20))}, indent=1))
    lines = len(other.read_text().splitlines())
    assert [problem.split(": ")[1] for problem in record.read(other).problems] == ["not JSON", f"none of its {lines} lines is a record"]
    other.write_text(other.read_text() + "\n")
    record.append(other, [synthetic.benchmark()])
    assert record.read(other).problems[-1] == f"{other}: {lines - record.PROBLEMS_SHOWN} more lines are no records"


def test_a_missing_path_and_a_folder_without_results_are_problems(tmp_path):
    contents = record.read(tmp_path / "nothing.json", tmp_path)
    assert contents.problems == (f"{tmp_path / 'nothing.json'}: does not exist", f"{tmp_path}: holds no *.json file")


def test_a_folder_with_the_name_of_a_file_is_a_problem(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (problem,) = record.read(tmp_path).problems
    assert problem.startswith(f"{tmp_path / 'folder.json'}: cannot be read")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="cannot hold"):
        record.append(tmp_path / "file.json", [synthetic.benchmark(achieved_gb_s=value)])


def test_results_lie_under_the_gpu_by_date_and_commit(tmp_path):
    dirty = dataclasses.replace(synthetic.GPU, dirty=True, commit=None)
    assert record.results_path(tmp_path, synthetic.GPU, "2026-11-24T12:00:00Z") == tmp_path / "nvidia-h200" / "2026-11-24-aaaaaaa.json"
    assert record.results_path(tmp_path, dirty, "2026-11-24T12:00:00Z") == tmp_path / "nvidia-h200" / "2026-11-24-unknown-dirty.json"


def test_this_machine_is_described(monkeypatch):
    here = machine.this_machine()
    assert here.torch == torch.__version__ and here.device and here.kind == ("gpu" if torch.cuda.is_available() else "cpu")
    assert (machine.clocks(default_device()) is None) == (here.kind == "cpu")
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abcdef0123-dirty")
    assert (machine.this_machine().commit, machine.this_machine().dirty) == ("abcdef0123", True)
