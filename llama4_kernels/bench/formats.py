"""Results in the formats that other tools read.

    pytest   the JSON of pytest-benchmark, for `pytest-benchmark compare`
    oss      the PyTorch OSS benchmark database, version 3: a list of metrics
    action   github-action-benchmark, tool customSmallerIsBetter: a list of names and values

Only workloads that were measured and found right are written; what failed has no figure in any of these.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llama4_kernels.bench.record import Benchmark, Record, to_json
from llama4_kernels.bench.workloads import parse

REPOSITORY = "llama4_kernels"


def write(form: str, path: Path, records: Iterable[Record]) -> None:
    """Write the benchmarks among `records` as the file `path`; ValueError for a form that there is not."""
    if form not in FORMATS:
        raise ValueError(f"format is {form!r}, needs one of {', '.join(FORMATS)}")
    measured = [record for record in records if isinstance(record, Benchmark) and record.status == "ok"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(FORMATS[form](measured), indent=1, allow_nan=False) + "\n")


def display_name(record: Benchmark) -> str:
    """A workload and who computed it, as one name."""
    return f"{record.workload}[{record.backend}]"


def pytest_benchmark(records: list[Benchmark]) -> dict[str, Any]:
    import pytest_benchmark
    from pytest_benchmark.stats import Stats

    def one(record: Benchmark) -> dict[str, Any]:
        stats = Stats()
        for sample in record.timing.samples_us:
            stats.update(sample / 1e6)
        return {
            "group": record.workload,
            "name": display_name(record),
            "fullname": f"bench::{display_name(record)}",
            "params": {"workload": record.workload, "backend": record.backend},
            "param": f"{record.workload}-{record.backend}",
            "extra_info": _without_samples(record),
            "options": _options(record),
            "stats": {**stats.as_dict(), "iterations": 1, "data": list(stats.data)},
        }

    newest = max((record.date for record in records), default="")
    machine = next((record.machine for record in reversed(records) if record.date == newest), None)
    return {
        "machine_info": {} if machine is None else {"node": machine.slug, "python_version": machine.python, "device": machine.device},
        "commit_info": {} if machine is None else {"id": machine.commit, "dirty": machine.dirty, "project": REPOSITORY},
        "benchmarks": [one(record) for record in records],
        "datetime": newest,
        "version": pytest_benchmark.__version__,
    }


def _options(record: Benchmark) -> dict[str, Any]:
    return {"disable_gc": False, "timer": record.timing.method, "min_rounds": record.timing.rounds, "warmup": True}


def _without_samples(record: Benchmark) -> dict[str, Any]:
    data = to_json(record)
    data["timing"] = {name: value for name, value in data["timing"].items() if name != "samples_us"}
    return data


def oss_benchmark(records: list[Benchmark]) -> list[dict[str, Any]]:
    """One entry for each metric of each record; every extra_info is a map of strings, as the database's columns are."""
    return [entry for record in records for entry in _oss_entries(record)]


def _oss_entries(record: Benchmark) -> Iterable[dict[str, Any]]:
    workload, machine = parse(record.workload), record.machine
    target = record.floor.us if record.floor else None
    metrics: list[tuple[str, str, list[float], float | None]] = [("latency", "us", list(record.timing.samples_us), target)]
    metrics += [
        (name, unit, [value], None)
        for name, unit, value in (
            ("memory_bandwidth", "GB/s", record.achieved_gb_s),
            ("throughput", "TFLOP/s", record.achieved_tflop_s),
            ("floor_ratio", "1", record.floor.ratio if record.floor else None),
            ("peak_memory", "B", record.peak_memory_bytes),
            ("launches", "1", record.launches),
        )
        if value is not None
    ]
    common = {
        "benchmark": {
            "name": f"{REPOSITORY} {record.op}",
            "mode": "inference",
            "dtype": workload.dtype,
            "extra_info": _strings({"device": machine.device, "method": record.timing.method, "run": record.run, "repro": record.repro}),
        },
        "model": {"name": record.workload, "type": "kernel", "backend": record.backend, "origins": ["peer" if record.peer else REPOSITORY]},
        "runners": [{"name": machine.device, "type": machine.kind, "gpu_info": machine.device if machine.kind == "gpu" else ""}],
        "dependencies": {
            REPOSITORY: {"sha": machine.commit or "", "extra_info": _strings({"dirty": machine.dirty})},
            "torch": {"version": machine.torch, "extra_info": _strings({"cuda": machine.cuda, "driver": machine.driver})},
            "triton": {"version": machine.triton or "", "extra_info": {}},
        },
    }
    for name, unit, values, bound in metrics:
        metric = {"name": name, "benchmark_values": values, "extra_info": {"unit": unit}}
        yield {**common, "metric": metric if bound is None else {**metric, "target_value": bound}}


def _strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}


def github_action(records: list[Benchmark]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{display_name(record)} on {record.machine.device}",
            "unit": "us",
            "value": record.timing.median_us,
            "range": f"± {statistics.stdev(record.timing.samples_us) if record.timing.rounds > 1 else 0.0:.3g}",
            "extra": f"p10 {record.timing.p10_us:.4g} us, p90 {record.timing.p90_us:.4g} us, {record.timing.rounds} rounds\n{record.repro}",
        }
        for record in records
    ]


FORMATS: dict[str, Callable[[list[Benchmark]], Any]] = {"pytest": pytest_benchmark, "oss": oss_benchmark, "action": github_action}
