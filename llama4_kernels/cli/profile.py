"""`llama4-kernels profile`: hardware counters against the floor where ncu runs, else the static figures of the same kernels."""

from __future__ import annotations

import os
import sys

from rich.console import Console

from llama4_kernels.bench import ceilings, measure, ncu, static, workloads
from llama4_kernels.bench.workloads import Workload
from llama4_kernels.ops.backend import BACKENDS, default_device
from llama4_kernels.tables import new_console, new_table


def run(op: str, name: str, backend: str | None = None) -> int:
    """The command: 0, 1 where there is nothing to say of these kernels, or 2 for a workload that there is not and where Triton interprets.

    name: a workload's name, with or without the op at its head.
    """
    console = new_console()
    try:
        workload = workloads.parse(name if name.startswith(f"{op}/") else f"{op}/{name}")
        if backend is not None and backend not in BACKENDS[:2]:
            raise ValueError(f"backend is {backend!r}, needs one of {', '.join(BACKENDS[:2])}")
        if os.environ.get("TRITON_INTERPRET"):
            raise ValueError("TRITON_INTERPRET is set, needs to be unset: interpreted kernels have no machine code")
    except ValueError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2
    reason = ncu.why_not()
    if not reason:
        chosen = backend or next(each for each in BACKENDS if not measure.missing(op, each, default_device()))
        try:
            return _counters(workload, chosen, console)
        except RuntimeError as error:
            reason = str(error)
    console.print(f"No hardware counters: {reason}. The kernels' static figures, for sm_90:", soft_wrap=True)
    return _static(workload, [backend] if backend else ["cuda", "triton"], console)


def _counters(workload: Workload, backend: str, console: Console) -> int:
    launches = ncu.collect(workload.name, backend)
    table = new_table("kernel", "µs", "MB", "memory %", "SM %", "occupancy %", "registers")
    for each in launches:
        figures = (each.us, each.bytes / 1e6, each.memory_percent, each.sm_percent, each.occupancy_percent, each.registers)
        table.add_row(each.kernel, *(f"{figure:.4g}" for figure in figures))
    console.print(table)
    total = sum(each.us for each in launches)
    work = workloads.work(workload)
    floor = ceilings.floor(work, ceilings.measure(default_device()), total)
    moved = sum(each.bytes for each in launches)
    console.print(
        f"{len(launches)} launches, {total:.4g} µs in kernels; floor {floor.us:.4g} µs ({floor.bound}), floor / time {floor.ratio:.3f}; "
        f"moved {moved / 1e6:.4g} MB, needs {work.bytes / 1e6:.4g} MB",
        soft_wrap=True,
    )
    return 0


def _static(workload: Workload, backends: list[str], console: Console) -> int:
    kernels = {"cuda": static.cuda_kernels, "triton": static.triton_kernels}
    figures = ("registers", "spilled B", "shared B", "occupancy", "instructions")
    table = new_table("by", "kernel", *figures, "of these", right=figures)
    found = 0
    for backend in backends:
        for kernel in kernels[backend](workload):
            kinds = ", ".join(f"{number} {kind}" for kind, number in kernel.instructions.items() if number and kind != "instructions")
            occupancy = "by launch" if kernel.occupancy is None else f"{kernel.occupancy:.0%}"
            numbers = (str(kernel.registers), str(kernel.spill_bytes), str(kernel.shared_bytes), occupancy)
            table.add_row(backend, _short(kernel.name), *numbers, str(kernel.instructions["instructions"]), kinds)
            found += 1
    console.print(table)
    work = workloads.work(workload)
    console.print(f"Needs {work.bytes:,} bytes and {work.total_flops:,} flops at least.")
    if not found:
        print(f"profile: no kernel of {', '.join(backends)} for {workload.op} can be looked at here", file=sys.stderr)
    return 0 if found else 1


def _short(name: str) -> str:
    """A Triton kernel's name with the last two of its many constants: warps and stages."""
    head, _, constants = name.partition("[")
    return f"{head}[{constants.rpartition('|')[2]}" if constants else name
