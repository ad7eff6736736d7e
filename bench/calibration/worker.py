"""One step, in a process of its own: python -m bench.calibration.worker QUESTION FILE RUN

Appends the record of each case to FILE as it comes, and prints a line for it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.calibration.measurement import in_line
from bench.calibration.plan import find
from llama4_kernels.bench import record
from llama4_kernels.bench.record import Benchmark, Record


def in_words(result: Record) -> str:
    """A record's line of progress."""
    if isinstance(result, Benchmark):
        what, figures = result.workload, ""
        if result.timing and result.floor:
            figures = f"{result.timing.median_us:.4g} us, floor / time {result.floor.ratio:.2f}"
    else:
        what = in_line(result.parameters)
        figures = ", ".join(f"{name} {figure.value:.4g} {figure.unit}" for name, figure in result.figures.items())
    return f"{what}: {figures if result.status == 'ok' else f'{result.status}: {result.reason}'}"


def main(question: str, file: Path, run: str) -> None:
    for result in find(question).records(run):
        record.append(file, [result])
        print(in_words(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
