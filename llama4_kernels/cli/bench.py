"""`llama4-kernels bench`: measure workloads beside peers, keep the records, and compare them with earlier ones."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama4_kernels.bench import compare, measure, record
from llama4_kernels.bench.compare import Comparison
from llama4_kernels.bench.measure import Job, Options
from llama4_kernels.bench.plan import plan
from llama4_kernels.bench.record import Benchmark, Record
from llama4_kernels.bench.runner import JOB_SECONDS, Runner
from llama4_kernels.tables import new_console, new_table


def run(
    ops: Sequence[str] | None,
    patterns: Sequence[str] | None,
    backends: Sequence[str] | None,
    peer_names: Sequence[str] | None,
    *,
    peer_modules: Sequence[str] = (),
    out: Path | None = None,
    base: Path | None = None,
    measured: Path | None = None,
    options: Options | None = None,
    job_seconds: float = JOB_SECONDS,
) -> int:
    """The command: 0, or 1 where one of our backends failed, is wrong, cannot run though it was asked for, or is slower than in `base`;
    2 for arguments that say nothing.

    measured: results to compare with `base` instead of measuring.
    """
    console = new_console()
    try:
        before = None if base is None else _read(base)  # first: new records may go to the same file
        if measured is not None:
            records: Sequence[Record] = list(compare.latest(_read(measured)).values())
        else:
            for module in peer_modules:
                _import(module)
            jobs = plan(ops, patterns, backends, peer_names)
            with Runner(options, peer_modules, job_seconds) as runner:
                path = out or record.results_path(record.RESULTS, runner.session.machine, record.now())
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()  # now rather than when all is measured
                records = _measure(jobs, runner, path, console)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    benchmarks = [each for each in records if isinstance(each, Benchmark)]
    of_ours = [each for each in benchmarks if not each.peer]
    bad = [
        each
        for each in of_ours
        if each.status in ("failed", "wrong") or (each.status == "unavailable" and each.backend in (backends or ()))
    ]
    for each in bad:
        print(f"bench: {each.workload} on {each.backend} {each.status}: {each.reason}", file=sys.stderr)
    regressions = [] if before is None else _compare(records, before, console)
    return 1 if bad or regressions else 0


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--peer-module {module} cannot be imported: {error}") from error


def _read(path: Path) -> Sequence[Record]:
    contents = record.read(path)
    for problem in contents.problems:
        print(f"bench: {problem}", file=sys.stderr)
    if not contents.records:
        raise ValueError(f"{path} holds no result that can be read")
    return contents.records


def _measure(jobs: Sequence[Job], runner: Runner, path: Path, console: Console) -> list[Record]:
    session = runner.session
    ceilings = ", ".join(f"{dtype} {rate:.4g} TFLOP/s" for dtype, rate in session.ceilings.matmul_tflop_s.items())
    console.print(f"{session.machine.device}: copy {session.ceilings.copy_gb_s:.4g} GB/s, matmul {ceilings}")
    if session.machine.kind == "cpu":
        console.print(f"No GPU: what is timed is {measure.ON_CPU}.", soft_wrap=True)
    records: list[Record] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("bench", total=len(jobs))
        for job, done in _numbered(jobs, runner, progress, task):
            progress.update(task, description=job.workload)
            record.append(path, [done])
            records.append(done)
    _print(records, console)
    console.print(f"bench: {len(records)} record{'' if len(records) == 1 else 's'} added to {path}", soft_wrap=True)
    return records


def _numbered(jobs: Sequence[Job], runner: Runner, progress: Progress, task: object) -> Iterable[tuple[Job, Benchmark]]:
    """Each job with its record, as it comes; jobs of peers that are not installed pass without one."""
    for job in jobs:
        for done in runner.run([job]):
            yield job, done
        progress.advance(task)


def _print(records: Sequence[Record], console: Console) -> None:
    figures = ("µs", "p10", "p90", "GB/s", "TFLOP/s", "floor/time", "error", "launches")
    table = new_table("workload", "by", *figures, "", right=figures)
    benchmarks = [each for each in records if isinstance(each, Benchmark)]
    shown = [each for each in benchmarks if each.status != "unavailable"]
    for each in shown:
        verdict = "" if each.status == "ok" else f"{each.status}: {each.reason}"
        table.add_row(each.workload, f"peer {each.backend}" if each.peer else each.backend, *_figures(each), verdict)
    if shown:
        console.print(table)
    absent = {(each.op, each.backend): each.reason for each in benchmarks if each.status == "unavailable"}
    for (op, name), reason in absent.items():
        console.print(f"Not measured: {op} on {name}: {reason}", soft_wrap=True)
    if shown:
        console.print("Each row again:")
    for each in shown:
        console.print(f"  {each.repro}", soft_wrap=True)


def _figures(each: Benchmark) -> list[str]:
    error = "" if each.check is None else "not finite" if each.check.error is None else f"{each.check.error:.1e}"
    launches = "" if each.launches is None else str(each.launches)
    if each.timing is None:
        return [*[""] * 6, error, launches]
    numbers = (each.timing.median_us, each.timing.p10_us, each.timing.p90_us, each.achieved_gb_s, each.achieved_tflop_s)
    return [*(f"{number:.4g}" for number in numbers), f"{each.floor.ratio:.3f}" if each.floor else "", error, launches]


def _compare(records: Sequence[Record], before: Sequence[Record], console: Console) -> list[Comparison]:
    """Print what changed; the regressions."""
    found = compare.compare(records, before)
    if not any(each.now and each.before for each in found):
        print("bench: nothing of the base was measured again on the same device and backend", file=sys.stderr)
    titles = ("workload", "by", "before µs", "now µs", "ratio", "interval", "")
    table = new_table(*titles, title=f"now / before, {compare.CONFIDENCE:.0%} interval")
    for each in found:
        if each.verdict == "gone":  # counted below: a run of few workloads leaves most of its base alone
            continue
        times = [f"{side.timing.median_us:.4g}" if side and side.timing else "" for side in (each.before, each.now)]
        ratio = "" if each.ratio is None else f"{each.ratio:.3f}"
        interval = " to ".join(f"{end:.3f}" for end in each.interval or ())
        table.add_row(each.record.workload, each.record.backend, *times, ratio, interval, each.verdict)
    console.print(table)
    regressions = [each for each in found if each.is_regression]
    for each in regressions:
        print(f"bench: {each.record.workload} on {each.record.backend} is {each.verdict}: {each.record.repro}", file=sys.stderr)
    counts = {verdict: sum(each.verdict == verdict for each in found) for verdict in dict.fromkeys(each.verdict for each in found)}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return regressions
