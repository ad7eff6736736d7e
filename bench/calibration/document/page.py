"""Writes docs/hardware.md from the records in bench/results: python -m bench.calibration.document"""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
from tabulate import tabulate

from bench.calibration.document import findings, plots, results
from bench.calibration.document.results import DATASHEETS, Gpu
from bench.calibration.native import ROOT
from bench.calibration.measurement import in_line
from llama4_kernels.bench import ceilings as floors
from llama4_kernels.bench import workloads
from llama4_kernels.bench.record import Benchmark, Ceilings, Record
from llama4_kernels.bench.workloads import TOKENS, Workload

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "hardware.md"
PLOTS = "hardware"  # folder beside the page
WIDTH = 140
COMMAND = "python -m bench.calibration.document"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
MODELS = tuple(itertools.product(("scout", "maverick"), (8, 1)))  # model, ranks
TOKEN_OPS = ("fused_moe", "moe_gate_up", "moe_down", "grouped_gemm", "route_top1")
DECODES = ((1, 1024), (1, 8192), (1, 131072), (64, 8192), (64, 131072), (256, 8192))  # batch, context
PREFILLS = (8192, 32768, 131072)

INTRODUCTION = (
    f"Written by `{COMMAND}` from the records in `bench/results`: do not edit it. `python -m bench.calibration --list` names the "
    "questions, `--dry-run` prints every case with its bytes and flops, and `--out DIR` measures on a Hopper GPU. Each question runs in "
    "its own process with a time limit; all questions about the chip take less than 8 minutes. `--peers DIR`, a folder of other projects' "
    "packages, also measures those, in less than 10 minutes more."
)
NOTHING_MEASURED = (
    "**No record of a GPU is committed: nothing on this page was measured.** The floors below rest on the datasheet of an H200, which no "
    "kernel reaches. There is no table of peers and no advice. On an H200 host, `python -m bench.calibration --peers DIR --out "
    f"bench/results` measures both; `{COMMAND}` then rewrites this page."
)
# What is known of failed cases, by question and run.
EXPLAINED = {
    ("layouts", "20261126T124622Z-da5f2dd"): (
        "This record is from before a fix: a probe of TMA stored at a negative coordinate, which is an illegal instruction on the GPU. The "
        "probe has been fixed, but no later run has repeated this question. `tests/hopper/test_layouts.py` asks the same of the GPU, and "
        "passed on an H200 on 2026-11-26: see [testing](testing.md#what-was-seen-on-a-gpu)."
    ),
}


def page(records: Iterable[Record], folder: Path) -> str:
    """The document's text. Plots are written into folder/hardware."""
    known = results.gpus(records)
    parts = ["# What the hardware gives, and what other projects' kernels reach", INTRODUCTION]
    if not known:
        datasheet = DATASHEETS["H200"]
        parts += ["## Without a record", NOTHING_MEASURED, *_ceilings(datasheet, "an H200's datasheet"), *_floors(datasheet)]
    for gpu in known:
        parts += _gpu(gpu, folder)
    return "\n\n".join(map(_wrapped, parts)) + "\n"


def _wrapped(part: str) -> str:
    """A paragraph or a list in lines of at most WIDTH characters; tables and headings as they are."""
    if part.startswith(("|", "#", "!")):
        return part
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  " if line.startswith("- ") else "") for line in part.splitlines())


def _gpu(gpu: Gpu, folder: Path) -> list[str]:
    machine, measured = gpu.machine, gpu.ceilings
    runs = ", ".join(sorted({each.run for each in (*gpu.latest, *gpu.peers)}))
    parts = [f"## {machine.device}"]
    parts += [f"Driver {machine.driver}, torch {machine.torch}, power limit {machine.power_limit_w} W; runs {runs}."]
    if measured is None:
        parts += [
            f"The records of this page lack a copy or a matrix product, so its floors rest on the datasheet of an {gpu.model}. Benchmarks "
            "measure their own ceilings, which are lower than the datasheet's, so floor / time is higher elsewhere than here."
        ]
    used = measured or DATASHEETS[gpu.model]
    parts += _ceilings(used, "this GPU" if measured else f"an {gpu.model}'s datasheet")
    if said := findings.of(gpu):
        parts += ["### What follows for a kernel", "\n".join(f"- {sentence}" for sentence in said)]
    parts += [f"![{title}]({path.relative_to(folder)})" for title, path in plots.write(gpu, folder / PLOTS)]
    return [*parts, *_floors(used), *_peers(gpu.peers, used), *_spread(gpu), *_cases(gpu)]


def _ceilings(used: Ceilings, source: str) -> list[str]:
    rows = [("memory, bytes read plus bytes written", f"{used.copy_gb_s:.0f} GB/s", source)]
    rows += [(f"{dtype} products", f"{rate:.0f} TFLOP/s", source) for dtype, rate in sorted(used.matmul_tflop_s.items())]
    return ["### Ceilings in use", _table(("of", "ceiling", "from"), rows)]


def _floors(used: Ceilings) -> list[str]:
    parts = [
        "### Floors",
        "The least time at these ceilings, in µs: bytes / memory bandwidth (marked m) or flops / rate of products (marked c), whichever is "
        "longer. Weights are in fp8, and each token chooses every expert with the same probability.",
    ]
    for op in TOKEN_OPS:
        columns = [[_floor(Workload(op, "fp8", model, ranks, tokens), used) for tokens in TOKENS] for model, ranks in MODELS]
        header = ("tokens", *(f"{model} tp{ranks}" for model, ranks in MODELS))
        parts += [f"`{op}`", _table(header, zip(TOKENS, *columns, strict=True))]
    header = ("batch", "queries", "context", *(f"{layer} tp{ranks}" for layer in workloads.LAYERS for ranks in (8, 1)))
    requests = [*((batch, 1, context) for batch, context in DECODES), *((1, length, length) for length in PREFILLS)]
    rows = []
    for batch, queries, context in requests:
        sizes = (batch * queries, batch, queries, context)
        attention = [
            Workload("chunked_attention", "bf16", "scout", ranks, sizes[0], layer, *sizes[1:], page=workloads.PAGE)
            for layer in workloads.LAYERS
            for ranks in (8, 1)
        ]
        rows.append((batch, queries, context, *(_floor(each, used) for each in attention)))
    return [*parts, "`chunked_attention`, bf16, the same for both models", _table(header, rows)]


def _floor(workload: Workload, used: Ceilings) -> str:
    floor = floors.floor(workloads.work(workload), used, median_us=1.0)
    return f"{_us(floor.us)} {floor.bound[0]}"


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _peers(peers: Sequence[Benchmark], used: Ceilings) -> list[str]:
    """A table per op: of each workload the floor, and each peer's time and floor / time. Below, why others have none."""
    if not peers:
        return ["### Peers", "No peer was measured on this GPU."]
    parts = [
        "### Peers",
        "Time in µs and, in parentheses, floor / time, by CUDA-graph replay with a cold L2, of results that passed the check. **What a "
        "peer needs prepared is not in its time**: the notes below each table name it.",
    ]
    for op in sorted({each.op for each in peers}):
        of_op = [each for each in peers if each.op == op]
        names = sorted({each.backend for each in of_op if each.status == "ok"})
        times = {(each.workload, each.backend): each for each in of_op if each.status == "ok"}
        parts.append(f"`{op}`")
        if names:
            rows = []
            for workload in sorted({each.workload for each in of_op}, key=_natural):
                floor = floors.floor(workloads.work(workloads.parse(workload)), used, median_us=1.0).us
                cells = [_time(times.get((workload, name)), floor) for name in names]
                rows.append((workload, _us(floor), *cells))
            parts.append(_table(("workload", "floor", *names), rows))
        parts += _failures([each for each in of_op if each.status != "ok"])
        notes = {(each.backend, note) for each in of_op if each.status == "ok" for note in each.notes}
        parts += ["\n".join(f"- {name}: {note}" for name, note in sorted(notes))] if notes else []
    return parts


def _time(each: Benchmark | None, floor: float) -> str:
    return "" if each is None or each.timing is None else f"{_us(each.timing.median_us)} ({floor / each.timing.median_us:.2f})"


def _failures(failed: Sequence[Benchmark]) -> list[str]:
    """A line for each peer and reason, with the number of workloads."""
    counts: dict[tuple[str, str, str], int] = {}
    for each in failed:
        key = each.backend, each.status, each.reason
        counts[key] = counts.get(key, 0) + 1
    lines = [
        f"- {name}: {status} for {count} workload{'s' if count > 1 else ''}: {reason}"
        for (name, status, reason), count in sorted(counts.items())
    ]
    return ["\n".join(lines)] if lines else []


def _natural(workload: str) -> list[tuple[int, str]]:
    """Orders t8 before t64."""
    parts = itertools.groupby(workload, str.isdigit)
    return [(int(text), "") if digits else (0, text) for digits, text in ((digits, "".join(group)) for digits, group in parts)]


def _spread(gpu: Gpu) -> list[str]:
    if not gpu.spread:
        return ["### Spread between two runs", "No measurement has a second run to compare with."]
    rows = []
    for question, spreads in gpu.spread.items():
        parameters, worst = max(spreads, key=lambda each: each[1])
        median = statistics.median(value for _, value in spreads)
        rows.append((question, len(spreads), f"{median:.1%}", f"{worst:.1%}", in_line(parameters)))
    return [
        "### Spread between two runs",
        "The difference between the figures of the latest two runs, as a share of their mean. A smaller difference between kernels is "
        "noise.",
        _table(("question", "cases", "median", "largest", "at"), rows),
    ]


def _cases(gpu: Gpu) -> list[str]:
    parts = ["### All measurements"]
    for question in dict.fromkeys(each.question for each in gpu.latest):
        of_question = [each for each in gpu.latest if each.question == question]
        good = [each for each in of_question if each.status == "ok"]
        parts.append(f"**{of_question[0].title}** (`{question}`)")
        if good:
            parameters = list(dict.fromkeys(name for each in good for name in each.parameters))
            units = {name: figure.unit for each in good for name, figure in each.figures.items()}
            header = (*parameters, *(f"{name}, {unit}" if unit != "1" else name for name, unit in units.items()))
            rows = [
                (*(each.parameters.get(name, "") for name in parameters), *(_value(each.figures.get(name)) for name in units))
                for each in good
            ]
            parts.append(_table(header, rows))
        bad = [f"- {in_line(each.parameters) or 'all'}: {each.status}: {each.reason}" for each in of_question if each.status != "ok"]
        parts += ["\n".join(bad)] if bad else []
        parts += dict.fromkeys(
            EXPLAINED[question, each.run] for each in of_question if each.status != "ok" and (question, each.run) in EXPLAINED
        )
    return parts


def _value(figure: Any) -> str:
    return "" if figure is None else f"{figure.value:.4g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return tabulate([[str(cell) for cell in row] for row in rows], headers=header, tablefmt="github", disable_numparse=True)


@app.command()
def main() -> None:
    """Write docs/hardware.md and its plots from the records in bench/results."""
    PAGE.write_text(page(results.read(RESULTS), PAGE.parent))
    print(f"wrote {PAGE.relative_to(ROOT)}")
