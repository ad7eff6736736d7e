"""python -m bench.calibration: measures this GPU, and with --peers those on it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.calibration import plan, runner
from bench.calibration.measurement import Measurement, Step, in_line
from bench.calibration.runner import Outcome
from llama4_kernels.bench import record
from llama4_kernels.bench.machine import this_machine
from llama4_kernels.tables import new_table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, markup=False, soft_wrap=True)


@app.command()
def main(
    only: Annotated[
        Optional[list[str]],
        typer.Option(help="Question, or first parts of one such as launch or peers/fused_moe; may be given several times."),
    ] = None,
    peers: Annotated[
        Optional[Path], typer.Option(exists=True, file_okay=False, help="Folder of the peers' packages; measures them too.")
    ] = None,
    out: Annotated[Optional[Path], typer.Option(file_okay=False, help="Folder for the records: OUT/<gpu>/<date>-<commit>.json.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every case with its bytes and flops, and measure nothing.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Print every question, and measure nothing.")] = False,
) -> None:
    """Measure what this GPU reaches, one question at a time, each in a process with a time box.

    Exits with 1 where a measurement of the chip failed, gave a wrong result or was not done; a peer's failure is a result.
    """
    try:
        steps = plan.select(only or [], peers=peers is not None or show)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    if show:
        for step in steps:
            console.print(f"{step.question:44}{step.title}")
    elif dry_run:
        print_plan(steps)
    elif out is None:
        raise typer.BadParameter("is needed to measure", param_hint="--out")
    elif not torch.cuda.is_available():
        console.print("torch sees no GPU, so nothing can be measured here; --dry-run prints the plan")
        raise typer.Exit(1)
    else:
        if peers is not None:
            os.environ["PYTHONPATH"] = os.pathsep.join([str(peers.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
        raise typer.Exit(measure(steps, out))


def print_plan(steps: Sequence[Step]) -> None:
    for step in steps:
        cases = step.cases()
        moved, computed = (
            in_units(sum(numbers), unit) for numbers, unit in (((c.bytes for c in cases), "B"), ((c.flops for c in cases), "flop"))
        )
        console.print(f"{step.question}: {step.title} {len(cases)} cases, {moved}, {computed}, {step.seconds} s at most")
        for case in cases:
            console.print(f"    {in_line(case.parameters)}: {in_units(case.bytes, 'B')}, {in_units(case.flops, 'flop')}")
    console.print(f"{len(steps)} steps, {sum(step.seconds for step in steps)} s at most, and {plan.BUILD_SECONDS} s to compile the kernels")


def in_units(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:g} {unit}"


def measure(steps: Sequence[Step], out: Path) -> int:
    """Measure, print a table, and give the exit code."""
    machine, date = this_machine(), record.now()
    file, run = record.results_path(out.resolve(), machine, date), record.run_id(machine, date)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the process of a step ends with this one
    console.print(f"{machine.device}, driver {machine.driver}, torch {machine.torch}; run {run}, records in {file}")
    outcomes = list(runner.run(steps, file, machine, run, console.print))
    console.print(summary(outcomes))
    return int(any(isinstance(outcome.step, Measurement) and is_failure(outcome) for outcome in outcomes))


def is_failure(outcome: Outcome) -> bool:
    return bool(outcome.reason) or any(each["status"] in ("failed", "wrong") for each in outcome.records)


def summary(outcomes: Sequence[Outcome]) -> Table:
    """A row for each step: how many cases were measured, its best figure, and the first reason for what is missing."""
    table = new_table("question", "cases", "seconds", "best", "missing")
    for outcome in outcomes:
        good = [each for each in outcome.records if each["status"] == "ok"]
        bad = (f"{each['status']}: {each['reason']}" for each in outcome.records if each["status"] != "ok")
        missing = outcome.reason or next(bad, "")
        table.add_row(outcome.step.question, f"{len(good)}/{outcome.cases}", f"{outcome.seconds:.0f}", best(good), missing)
    return table


def best(records: Sequence[Mapping[str, Any]]) -> str:
    """The highest floor / time or rate, or else the shortest time of all records, and where it was reached."""
    found = [(each["floor"]["ratio"], "of the floor", each["workload"]) for each in records if each.get("floor")]
    for name, sign in (("rate", 1), ("bandwidth", 1), ("time", -1)):
        found = found or [
            (sign * each["figures"][name]["value"], each["figures"][name]["unit"], in_line(each["parameters"]))
            for each in records
            if name in each.get("figures", {})
        ]
    if not found:
        return ""
    value, unit, where = max(found)
    return f"{abs(value):.4g} {unit} ({where})"


if __name__ == "__main__":
    app(prog_name="python -m bench.calibration")
