"""The performance tables of the README and of docs/performance.md: from committed results, and nothing in them that no result backs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama4_kernels.bench import compare, workloads
from llama4_kernels.bench.record import Benchmark, Record

COMMAND = "llama4-kernels report --readme README.md --readme docs/performance.md"
START = f"<!-- performance, headlines: written by `{COMMAND}` from bench/results, not by hand -->"
START_ALL = f"<!-- performance, every workload: written by `{COMMAND}` from bench/results, not by hand -->"
END = "<!-- end of performance -->"
NOTHING = (
    "**No figure from a GPU exists yet**: no kernel of this project has been timed on hardware, so there is no number to show. "
    "`llama4-kernels bench` measures; a result committed under `bench/results/<gpu>/` appears here."
)
STATUS = {"wrong": "wrong result", "failed": "failed", "unavailable": "cannot run"}

# A decode and a prefill of each op, chosen by what is served, not by how it fares
HEADLINES = (
    *(f"fused_moe/fp8/scout/tp8/t{tokens}" for tokens in (1, 16, 64, 256, 8192)),
    *(f"fused_moe/bf16/scout/tp8/t{tokens}" for tokens in (64, 8192)),
    *(f"fused_moe/fp8/maverick/tp8/t{tokens}" for tokens in (1, 64, 8192)),
    *(f"{op}/fp8/scout/tp8/t{tokens}" for op in ("moe_gate_up", "moe_down", "route_top1") for tokens in (64, 8192)),
    *(f"grouped_gemm/{dtype}/scout/tp2/t8192" for dtype in ("fp8", "bf16")),
    *(f"rope_qk_norm/bf16/scout/tp8/local/t{tokens}" for tokens in (64, 8192)),
    *(
        f"chunked_attention/bf16/scout/tp8/{case}/p64"
        for case in (
            "local/b64/q1/c8192",
            "full/b64/q1/c8192",
            "full/b64/q1/c65536",
            "full/b8/q1/c131072",
            "local/b1/q8192/c8192",
            "full/b1/q8192/c131072",
        )
    ),
)


def table(records: Iterable[Record], names: Iterable[str] | None = None) -> str:
    """Markdown: for each GPU the newest result of each of these workloads, or of all, the ones that lose among them."""
    records = list(records)
    on_gpu = [each for each in compare.latest(records).values() if each.machine.kind == "gpu"]
    if not on_gpu:
        return NOTHING
    listed = sorted({each.workload for each in on_gpu}, key=_order) if names is None else names
    parts = []
    for device in sorted({each.machine.device for each in on_gpu}):
        mine = [each for each in on_gpu if each.machine.device == device]
        parts.append(_device_table(device, [each for name in listed for each in mine if each.workload == name], records))
    return "\n\n".join(parts)


def _order(name: str) -> tuple:
    workload = workloads.parse(name)
    last = (workload.layer or "", workload.batch, workload.queries, workload.context, workload.page, workload.tokens)
    return workloads.OPS.index(workload.op), workload.model, workload.dtype, workload.tp, *last


def _device_table(device: str, records: list[Benchmark], everything: Iterable[Record]) -> str:
    """everything: what the newest `records` were picked from, where a run's own peers are."""
    lines = [
        f"{device}; median of CUDA-graph replays with a cold L2 cache and random data, ratios within one run.",
        "",
        "| workload | commit | backend | µs | GB/s | TFLOP/s | floor / time | fastest peer | its time / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(each.workload for each in records):
        mine = [each for each in records if each.workload == name]
        ours = min((each for each in mine if each.status == "ok" and not each.peer), key=_time, default=None)
        if ours is None:
            lines.append(_row_without_time(name, [each for each in mine if not each.peer]))
        else:
            lines.append(_row(ours, min(_peers(ours, everything), key=_time, default=None)))
    return "\n".join(lines)


def _peers(ours: Benchmark, records: Iterable[Record]) -> list[Benchmark]:
    """The right results of peers in the run of ours: another run's clocks are not the same."""
    run = compare.latest(each for each in records if each.run == ours.run)
    mine = (ours.workload, ours.machine.device)
    return [each for each in run.values() if each.peer and each.status == "ok" and (each.workload, each.machine.device) == mine]


def _row(ours: Benchmark, peer: Benchmark | None) -> str:
    speed = f"{ours.achieved_tflop_s:.4g}" if ours.achieved_tflop_s else "–"
    ratio = f"{ours.floor.ratio:.2f}" if ours.floor else "–"
    against = "– | –" if peer is None else f"{peer.backend} | {_time(peer) / _time(ours):.2f}"
    figures = f"{_time(ours):.4g} | {ours.achieved_gb_s:.4g} | {speed} | {ratio}"
    return f"| `{ours.workload}` | {ours.machine.short_commit} | {ours.backend} | {figures} | {against} |"


def _row_without_time(name: str, ours: list[Benchmark]) -> str:
    commits = ", ".join(sorted({each.machine.short_commit for each in ours})) or "–"
    found = ", ".join(f"{each.backend}: {STATUS[each.status]}" for each in ours) or "not measured"
    return f"| `{name}` | {commits} | {found} | – | – | – | – | – | – |"


def _time(record: Benchmark) -> float:
    return record.timing.median_us


def replaced(text: str, records: Iterable[Record]) -> str:
    """A page's text with the table between its markers written anew; ValueError unless it has one pair of markers, in order."""
    (place, marker), end = max((text.find(marker), marker) for marker in (START, START_ALL)), text.find(END)
    if place < 0 or end < place:
        raise ValueError(f"needs the lines {START!r} or {START_ALL!r}, and {END!r}, in this order")
    return f"{text[:place]}{marker}\n{table(records, HEADLINES if marker == START else None)}\n{text[end:]}"


def update(path: Path, records: Iterable[Record]) -> bool:
    """Rewrite the table in a page; whether that changed it."""
    before = path.read_text(encoding="utf-8")
    after = replaced(before, records)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before
