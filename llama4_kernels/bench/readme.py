"""The README's performance table: from committed results, between two markers, and nothing in it that no result backs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama4_kernels.bench import compare, workloads
from llama4_kernels.bench.record import Benchmark, Record

COMMAND = "llama4-kernels report --readme README.md"
START = f"<!-- performance: written by `{COMMAND}` from bench/results, not by hand -->"
END = "<!-- end of performance -->"
NOTHING = (
    "**No figure from a GPU exists yet**: no kernel of this project has been timed on hardware, so there is no number to show. "
    "`llama4-kernels bench` measures; a result committed under `bench/results/<gpu>/` appears here."
)


def table(records: Iterable[Record]) -> str:
    """Markdown: for each GPU the newest result of the short list of workloads, the ones that lose among them."""
    records = list(records)
    on_gpu = [each for each in compare.latest(records).values() if each.machine.kind == "gpu"]
    if not on_gpu:
        return NOTHING
    listed = {workload.name: place for place, workload in enumerate(workloads.default("cuda"))}
    parts = []
    for device in sorted({each.machine.device for each in on_gpu}):
        mine = [each for each in on_gpu if each.machine.device == device and each.workload in listed and not _is_bf16_moe(each)]
        parts.append(_device_table(device, sorted(mine, key=lambda each: listed[each.workload]), records))
    return "\n\n".join(parts)


def _is_bf16_moe(record: Benchmark) -> bool:
    """Left to the report, so that the table stays short."""
    workload = workloads.parse(record.workload)
    return workload.dtype == "bf16" and workload.op in (*workloads.TOKEN_OPS, "decoder_layer")


def _device_table(device: str, records: list[Benchmark], everything: Iterable[Record]) -> str:
    """everything: what the newest `records` were picked from, where a run's own peers are."""
    commits = sorted({each.machine.short_commit for each in records})
    lines = [
        f"{device}, commit {', '.join(commits)}; median of CUDA-graph replays with a cold L2 cache and random data, ratios within one run.",
        "",
        "| workload | backend | µs | GB/s | TFLOP/s | floor / time | fastest peer | its time / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(each.workload for each in records):
        right = [each for each in records if each.workload == name and each.status == "ok"]
        ours = min((each for each in right if not each.peer), key=_time, default=None)
        peer = min(_peers(ours, everything), key=_time, default=None) if ours else None
        lines.append(_row(name, ours, peer))
    return "\n".join(lines)


def _peers(ours: Benchmark, records: Iterable[Record]) -> list[Benchmark]:
    """The right results of peers in the run of ours: another run's clocks are not the same."""
    run = compare.latest(each for each in records if each.run == ours.run)
    mine = (ours.workload, ours.machine.device)
    return [each for each in run.values() if each.peer and each.status == "ok" and (each.workload, each.machine.device) == mine]


def _row(name: str, ours: Benchmark | None, peer: Benchmark | None) -> str:
    if ours is None:
        return f"| `{name}` | none gives a right result | – | – | – | – | – | – |"
    speed = f"{ours.achieved_tflop_s:.4g}" if ours.achieved_tflop_s else "–"
    ratio = f"{ours.floor.ratio:.2f}" if ours.floor else "–"
    against = "– | –" if peer is None else f"{peer.backend} | {_time(peer) / _time(ours):.2f}"
    return f"| `{name}` | {ours.backend} | {_time(ours):.4g} | {ours.achieved_gb_s:.4g} | {speed} | {ratio} | {against} |"


def _time(record: Benchmark) -> float:
    return record.timing.median_us


def replaced(text: str, records: Iterable[Record]) -> str:
    """A README's text with the table between its markers written anew; ValueError where it does not hold both, in order."""
    start, end = text.find(START), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"needs the lines {START!r} and {END!r}, in this order")
    return f"{text[:start]}{START}\n{table(records)}\n{text[end:]}"


def update(path: Path, records: Iterable[Record]) -> bool:
    """Rewrite the table in a README; whether that changed it."""
    before = path.read_text(encoding="utf-8")
    after = replaced(before, records)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before
