"""The one form of every result: a JSON object on a line of its own, described field by field in record.schema.json.

Two kinds share it. A `Benchmark` is one workload on one backend or peer; a `Calibration` is one question to the hardware and the figures
that answer it. A file of results holds any mix of both, from any machines: `append` writes it, `read` reads it and reports what it cannot.
Units are SI: microseconds, GB/s = 1e9 B/s, TFLOP/s = 1e12 flop/s.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llama4_kernels.bench.machine import Clocks, Machine

SCHEMA = 1
SCHEMA_FILE = Path(__file__).parent / "record.schema.json"
STATUSES = ("ok", "wrong", "failed", "unavailable")
PROBLEMS_SHOWN = 5  # of one file
RESULTS = Path("bench/results")  # a folder for each device, below the folder that a command is called in


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    method: "cuda_graph" (a replayed graph between CUDA events), "cuda_events" (calls between events, where no graph can be captured) or
    "wall_clock" (calls on a CPU). cold_l2: whether the inputs were out of the GPU's L2 cache before each call.
    samples_us: the mean time of a call in each round. calls: how many a round has; None in records from before it was kept.
    """

    method: str
    cold_l2: bool
    median_us: float
    p10_us: float
    p90_us: float
    rounds: int
    samples_us: tuple[float, ...]
    calls: int | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run: device copy (bytes read plus bytes written), and matrix multiplication by dtype."""

    copy_gb_s: float
    matmul_tflop_s: Mapping[str, float]


@dataclass(frozen=True)
class Floor:
    """The least time that the work can take at the ceilings, bound by "memory" or "compute"; ratio = floor / median time."""

    us: float
    bound: str
    ratio: float


@dataclass(frozen=True)
class Check:
    """‖out − expected‖ / ‖expected‖ for the input that was timed, None where that is no finite number, and the bound."""

    error: float | None
    bound: float
    against: str


@dataclass(frozen=True)
class Benchmark:
    """One workload on one backend, or on one peer.

    status: "ok"; "wrong" (timed, but the check failed: no figure to compare); "failed" (raised); "unavailable" (could not run here).
    reason: why, where status is not "ok". run: the same for all records of one run. date: UTC, ISO 8601.
    bytes, flops: what the workload must move and multiply at least, see workloads.work.
    """

    op: str
    workload: str
    backend: str
    machine: Machine
    run: str
    date: str
    repro: str
    peer: bool = False
    status: str = "ok"
    reason: str = ""
    timing: Timing | None = None
    bytes: int | None = None
    flops: int | None = None
    achieved_gb_s: float | None = None
    achieved_tflop_s: float | None = None
    ceilings: Ceilings | None = None
    floor: Floor | None = None
    check: Check | None = None
    launches: int | None = None
    peak_memory_bytes: int | None = None
    clocks_before: Clocks | None = None
    clocks_after: Clocks | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    value: float
    unit: str


@dataclass(frozen=True)
class Calibration:
    """One question to the hardware and the figures that answer it.

    question: an identifier that stays the same for ever, such as "copy_bandwidth" or "tma/stages". title: the question in words.
    parameters: what it was measured with. figures: name -> number and unit.
    """

    question: str
    title: str
    figures: Mapping[str, Figure]
    machine: Machine
    run: str
    date: str
    repro: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""
    clocks_before: Clocks | None = None
    clocks_after: Clocks | None = None
    notes: tuple[str, ...] = ()


Record = Benchmark | Calibration
_KINDS: dict[str, type] = {"benchmark": Benchmark, "calibration": Calibration}


@dataclass(frozen=True)
class Contents:
    """What could be read, and a line for everything that could not."""

    records: tuple[Record, ...]
    problems: tuple[str, ...]


def now() -> str:
    """The time as records hold it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def run_id(machine: Machine, date: str) -> str:
    """What the records of one run have in common."""
    return f"{re.sub(r'[-:]', '', date)}-{machine.short_commit}"


def results_path(folder: Path, machine: Machine, date: str) -> Path:
    """<folder>/<gpu>/<date>-<commit>.json, where the results of a run are kept."""
    return folder / machine.slug / f"{date[:10]}-{machine.short_commit}{'-dirty' if machine.dirty else ''}.json"


def to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    return {"schema": SCHEMA, "kind": kind, **_plain(record)}


def from_json(data: Mapping[str, Any]) -> Record:
    """The record of a JSON object; ValueError where it is not one of this schema version, naming the field."""
    found = data.get("schema")
    if found != SCHEMA or isinstance(found, bool):
        raise ValueError(f"schema version is {found!r}, needs {SCHEMA}: measure again, or read it with the release that wrote it")
    error = next(iter(_validator().iter_errors(data)), None)
    if error is not None:
        where = "/".join(map(str, error.instance_path)) or "the record"
        raise ValueError(f"{where}: {error.message[:200]}")
    fields = {name: value for name, value in data.items() if name not in ("schema", "kind")}
    return _build(_KINDS[data["kind"]], fields)


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, which is made where it is missing, each on disk before the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(to_json(record), allow_nan=False, ensure_ascii=False) + "\n")
            file.flush()


def read(*paths: Path) -> Contents:
    """The records of files, or of every *.json file below folders; what cannot be read becomes a problem that names file and line."""
    records: list[Record] = []
    problems: list[str] = []
    for path in _files(paths, problems):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path}: cannot be read: {error}")
            continue
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        found, bad = _records(lines)
        records += found
        shown = bad[:PROBLEMS_SHOWN] if found else bad[:1]
        problems += [f"{path}:{number}: {problem}" for number, problem in shown]
        if not lines:
            problems.append(f"{path}: is empty")
        elif not found:
            problems.append(f"{path}: none of its {len(lines)} lines is a record")
        elif len(bad) > len(shown):
            problems.append(f"{path}: {len(bad) - len(shown)} more lines are no records")
    return Contents(tuple(records), tuple(problems))


def _records(lines: Iterable[tuple[int, str]]) -> tuple[list[Record], list[tuple[int, str]]]:
    """The records of numbered lines, and the number and problem of each line that is none."""
    found: list[Record] = []
    bad: list[tuple[int, str]] = []
    for number, line in lines:
        try:
            data = json.loads(line)
            if not isinstance(data, dict):
                raise ValueError(f"is a JSON {type(data).__name__}, needs to be one record")
            found.append(from_json(data))
        except json.JSONDecodeError as error:
            bad.append((number, f"not JSON: {error.msg}; each line needs to be one record"))
        except ValueError as error:
            bad.append((number, str(error)))
    return found, bad


def _files(paths: Iterable[Path], problems: list[str]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*.json"))
            if not inside:
                problems.append(f"{path}: holds no *.json file")
            yield from inside
        elif path.exists():
            yield path
        else:
            problems.append(f"{path}: does not exist")


@functools.cache
def _validator() -> Any:
    import jsonschema_rs

    return jsonschema_rs.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))


def _plain(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a record cannot hold {value}: leave the field out, and say why in reason or notes")
    return value


_PARTS: dict[str, type] = {
    "machine": Machine,
    "clocks_before": Clocks,
    "clocks_after": Clocks,
    "timing": Timing,
    "ceilings": Ceilings,
    "floor": Floor,
    "check": Check,
}


def _build(cls: type, data: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name in _PARTS and value is not None:
            value = _build(_PARTS[name], value)
        elif name == "figures":
            value = {figure: Figure(**parts) for figure, parts in value.items()}
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)
