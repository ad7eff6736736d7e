"""What the records say of each GPU: of every question the latest run and the one before, and the latest time of every peer."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_kernels.bench import record
from llama4_kernels.bench.machine import Machine
from llama4_kernels.bench.record import Benchmark, Calibration, Ceilings, Record

# By the datasheets, without sparsity: what floors rest on until ceilings were measured. https://www.nvidia.com/en-us/data-center/h200/ and
# .../h100/ (SXM)
DATASHEETS = {
    "H200": Ceilings(copy_gb_s=4800.0, matmul_tflop_s={"bf16": 989.5, "fp8": 1979.0}),
    "H100": Ceilings(copy_gb_s=3350.0, matmul_tflop_s={"bf16": 989.5, "fp8": 1979.0}),
}
LARGE_MIB = 1024  # a copy of this size is far from fitting L2
HEADLINES = ("bandwidth", "rate", "per_cycle", "time")  # figures by which runs are compared, the first that a record has


@dataclass(frozen=True)
class Gpu:
    """latest, before: the records of the last two runs of each question. peers, peers_before: the last two of each workload and peer."""

    machine: Machine
    latest: Sequence[Calibration]
    before: Sequence[Calibration]
    peers: Sequence[Benchmark]
    peers_before: Sequence[Benchmark]

    def points(self, question: str, figure: str, **where: Any) -> list[tuple[Mapping[str, Any], float]]:
        """Parameters and figure of each good case of a question whose parameters are as `where` says."""
        return [
            (each.parameters, each.figures[figure].value)
            for each in self.latest
            if each.question == question
            and each.status == "ok"
            and figure in each.figures
            and all(each.parameters.get(name) == value for name, value in where.items())
        ]

    def value(self, question: str, figure: str, **where: Any) -> float | None:
        """The figure of the one good case, or None."""
        found = self.points(question, figure, **where)
        return found[0][1] if len(found) == 1 else None

    @property
    def model(self) -> str:
        """The key of its datasheet: an H100's for other GPUs too, as the lower one."""
        return "H200" if "H200" in self.machine.device else "H100"

    @property
    def ceilings(self) -> Ceilings | None:
        """The fastest large copy, and the largest rate of a square product of each type; None unless all were measured."""
        copies = [
            value
            for question in ("bandwidth/copy", "bandwidth/torch_copy")
            for parameters, value in self.points(question, "bandwidth", l2="cold")
            if parameters["mib"] >= LARGE_MIB
        ]
        squares = {dtype: [value for _, value in self.points(f"matmul/{dtype}", "rate", layer="square")] for dtype in ("bf16", "fp8")}
        if not copies or not all(squares.values()):
            return None
        return Ceilings(max(copies), {dtype: max(values) for dtype, values in squares.items()})

    @property
    def spread(self) -> dict[str, list[tuple[Mapping[str, Any], float]]]:
        """question -> parameters and |a − b| / mean of the headline figure, for every case that both runs have; of peers, the time."""
        before = {_key(each): each for each in self.before if each.status == "ok"}
        found: dict[str, list[tuple[Mapping[str, Any], float]]] = {}
        for each in self.latest:
            name = next((name for name in HEADLINES if name in each.figures), None)
            other = before.get(_key(each))
            if each.status == "ok" and name and other and name in other.figures:
                a, b = each.figures[name].value, other.figures[name].value
                found.setdefault(each.question, []).append((each.parameters, _apart(a, b)))
        timed = {(each.workload, each.backend): each.timing for each in self.peers_before if each.status == "ok"}
        for each in self.peers:
            other = timed.get((each.workload, each.backend))
            if each.status == "ok" and each.timing and other:
                where = {"workload": each.workload, "peer": each.backend}
                found.setdefault(f"peers/{each.op}", []).append((where, _apart(each.timing.median_us, other.median_us)))
        return found


def read(folder: Path) -> list[Record]:
    """The records of folder/<gpu>/*.json. ValueError where one cannot be read."""
    files = sorted(folder.glob("*/*.json"))
    contents = record.read(*files)
    if contents.problems:
        raise ValueError("\n".join(contents.problems))
    return list(contents.records)


def gpus(records: Iterable[Record]) -> list[Gpu]:
    """Every GPU that the records say more of than our own kernels' times, by name."""
    by_slug: dict[str, list[Record]] = {}
    for each in records:
        if each.machine.kind == "gpu":
            by_slug.setdefault(each.machine.slug, []).append(each)
    known = [_gpu(sorted(found, key=lambda each: each.date)) for _, found in sorted(by_slug.items())]
    return [gpu for gpu in known if gpu.latest or gpu.peers]


def _gpu(records: Sequence[Record]) -> Gpu:
    runs: dict[str, list[str]] = {}  # of each question, oldest first
    for each in records:
        if isinstance(each, Calibration) and each.run not in runs.setdefault(each.question, []):
            runs[each.question].append(each.run)
    of_peers: dict[tuple[str, str], list[Benchmark]] = {}
    for each in records:
        if isinstance(each, Benchmark) and each.peer:
            of_peers.setdefault((each.workload, each.backend), []).append(each)

    def of_run(number: int) -> list[Calibration]:
        return [
            each
            for each in records
            if isinstance(each, Calibration) and len(runs[each.question]) >= -number and each.run == runs[each.question][number]
        ]

    peers, before = ([each[number] for each in of_peers.values() if len(each) >= -number] for number in (-1, -2))
    return Gpu(records[-1].machine, of_run(-1), of_run(-2), peers, before)


def _apart(a: float, b: float) -> float:
    return abs(a - b) / statistics.mean((a, b))


def _key(each: Calibration) -> tuple[str, str]:
    return each.question, json.dumps(each.parameters, sort_keys=True)
