"""What the pages show, from records: the newest result of each workload, its history with regressions, and what was not measured."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llama4_kernels.bench import compare, workloads
from llama4_kernels.bench.compare import Comparison
from llama4_kernels.bench.record import STATUSES, Benchmark, Calibration, Record
from llama4_kernels.bench.workloads import ATTENTION_OPS, OPS, Workload

FIRST = ("fused_moe", "chunked_attention", "decoder_layer", "grouped_gemm")


@dataclass(frozen=True)
class Shown:
    """A workload as the pages name it. x: what varies along its series, tokens or context; series: the rest of its name."""

    name: str
    parsed: Workload

    @property
    def href(self) -> str:
        return f"workload/{self.name.replace('/', '-')}.html"

    @property
    def x(self) -> int:
        return self.parsed.context if self.parsed.op in ATTENTION_OPS else self.parsed.tokens

    @property
    def series(self) -> str:
        """Of one op, model, dtype and tp: what else tells one line from another."""
        w = self.parsed
        if w.op not in ATTENTION_OPS:
            return w.layer or ""
        phase = "decode" if w.queries == 1 else "prefill" if w.queries == w.context else f"{w.queries} new tokens"
        return f"{w.layer} {phase}, batch {w.batch}"


@dataclass(frozen=True)
class Result:
    """A record, and what became of the one before it by the same backend on the same device."""

    record: Benchmark
    change: Comparison | None
    newest: bool

    @property
    def verdict(self) -> str:
        return self.change.verdict if self.change else ""

    @property
    def is_regression(self) -> bool:
        return self.change is not None and self.change.is_regression


@dataclass
class Results:
    """Everything that was read, in the order in which the pages show it."""

    workloads: list[Shown]
    results: list[Result]
    calibrations: list[Calibration]
    absent: list[tuple[str, str, str, str]]  # op, backend or peer, device, reason
    unknown: list[str] = field(default_factory=list)  # names of workloads that this version does not know

    @property
    def devices(self) -> list[str]:
        """The one measured last comes first."""
        newest: dict[str, str] = {}
        for result in self.results:
            machine = result.record.machine
            newest[machine.device] = max(newest.get(machine.device, ""), result.record.date)
        kinds = {result.record.machine.device: result.record.machine.kind for result in self.results}
        by_date = sorted(newest, key=newest.__getitem__, reverse=True)
        return sorted(by_date, key=lambda device: kinds[device] != "gpu")

    @property
    def has_gpu(self) -> bool:
        return any(result.record.machine.kind == "gpu" for result in self.results)

    @property
    def runs(self) -> list[tuple[str, str, str]]:
        """Date, commit and run, the first one first."""
        found = {(r.record.run): (r.record.date, _commit(r.record)) for r in reversed(self.results)}
        return sorted((date, commit, run) for run, (date, commit) in found.items())

    @property
    def ops(self) -> list[str]:
        """The whole layers first."""
        present = {shown.parsed.op for shown in self.workloads}
        return list(dict.fromkeys(op for op in (*FIRST, *OPS) if op in present))

    @property
    def by_context(self) -> tuple[str, ...]:
        """Ops whose workloads vary in context rather than tokens."""
        return ATTENTION_OPS

    @property
    def regressions(self) -> list[Result]:
        return [r for r in self.results if r.newest and r.is_regression]

    def page(self, workload: Shown) -> dict[str, Any]:
        """What the page of one workload shows."""
        mine = self._by_workload[workload.name]
        newest = [result for result in mine if result.newest]
        history: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        for result in mine:
            if result.record.timing and result.record.status == "ok":
                label = f"{result.record.backend} on {result.record.machine.device}"
                point = {"date": result.record.date, "commit": _commit(result.record), "us": result.record.timing.median_us}
                history[label].append({**point, "verdict": result.verdict, "regression": result.is_regression})
        newest.sort(key=lambda r: (r.record.machine.device, r.record.peer, r.record.status != "ok", _time(r.record)))
        return {"newest": newest, "history": history, "work": workloads.work(workload.parsed)}

    @functools.cached_property
    def _by_workload(self) -> dict[str, list[Result]]:
        found: dict[str, list[Result]] = collections.defaultdict(list)
        for result in self.results:
            found[result.record.workload].append(result)
        return found

    def for_script(self) -> dict[str, Any]:
        """What the charts and the table of the first page need, in tables that name each string once."""
        names = [shown.name for shown in self.workloads]
        runs = self.runs
        tables = {
            "implementations": sorted({(r.record.backend, r.record.peer) for r in self.results}, key=lambda pair: (pair[1], pair[0])),
            "devices": self.devices,
            "runs": [(date, commit) for date, commit, _ in runs],
            "statuses": list(STATUSES),
        }
        place = {name: {value: i for i, value in enumerate(values)} for name, values in tables.items()}
        run_place = {run: i for i, (_, _, run) in enumerate(runs)}
        workload_place = {name: i for i, name in enumerate(names)}
        rows = []
        for result in self.results:
            r = result.record
            rows.append([
                workload_place[r.workload], place["implementations"][r.backend, r.peer], place["devices"][r.machine.device],
                run_place[r.run], place["statuses"][r.status], int(result.newest),
                _short(r.timing and r.timing.median_us), _short(r.timing and r.timing.p10_us), _short(r.timing and r.timing.p90_us),
                _short(r.floor and r.floor.ratio), _short(r.achieved_gb_s), _short(r.achieved_tflop_s or None), result.verdict,
                _short(result.change and result.change.ratio),
            ])  # fmt: skip
        return {
            **tables,
            "workloads": [_for_script(shown) for shown in self.workloads],
            "rows": rows,
            "ceilings": self._ceilings(),
            "kinds": {r.record.machine.device: r.record.machine.kind for r in self.results},
            "absent": self.absent,
            "ops": self.ops,
        }

    def _ceilings(self) -> dict[str, dict[str, Any]]:
        """The newest of each device."""
        found: dict[str, dict[str, Any]] = {}
        for result in sorted(self.results, key=lambda r: r.record.date):
            ceilings = result.record.ceilings
            if ceilings:
                found[result.record.machine.device] = {"copy": ceilings.copy_gb_s, "matmul": dict(ceilings.matmul_tflop_s)}
        return found


def collect(records: Iterable[Record]) -> Results:
    """Order records by date, and compare each with the one before it."""
    parsed: dict[str, Shown] = {}
    unknown: set[str] = set()
    absent: dict[tuple[str, str, str], str] = {}
    calibrations: list[Calibration] = []
    histories: dict[compare.Key, list[Benchmark]] = collections.defaultdict(list)
    for record in sorted(records, key=lambda each: each.date):
        if isinstance(record, Calibration):
            calibrations.append(record)
            continue
        if record.workload not in parsed:
            try:
                parsed[record.workload] = Shown(record.workload, workloads.parse(record.workload))
            except ValueError:
                unknown.add(record.workload)
                continue
        if record.status == "unavailable":
            absent[record.op, record.backend, record.machine.device] = record.reason
        histories[compare.key(record)].append(record)
    results = [result for history in histories.values() for result in _changes(history)]
    shown = sorted(parsed.values(), key=lambda each: _order(each.parsed))
    rows = [(*key, reason) for key, reason in sorted(absent.items())]
    return Results(shown, results, calibrations, rows, sorted(unknown))


def _changes(history: list[Benchmark]) -> Iterable[Result]:
    before = None
    for i, record in enumerate(history):
        yield Result(record, compare.compare_two(record, before) if before else None, i == len(history) - 1)
        before = record


def _order(w: Workload) -> tuple[Any, ...]:
    return OPS.index(w.op), w.model, w.dtype, w.tp, w.layer or "", w.batch, w.queries, w.context, w.tokens


def _for_script(shown: Shown) -> list[Any]:
    w, work = shown.parsed, workloads.work(shown.parsed)
    return [shown.name, w.op, w.model, w.dtype, w.tp, shown.series, shown.x, shown.href, work.total_flops / work.bytes]


def _commit(record: Benchmark) -> str:
    return record.machine.short_commit + ("+" if record.machine.dirty else "")


def _time(record: Benchmark) -> float:
    return record.timing.median_us if record.timing else 0.0


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
