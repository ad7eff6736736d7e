"""A summary of a workload's kernels by Nsight Compute's hardware counters, where `ncu` runs."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch

from llama4_kernels import use_backend
from llama4_kernels.bench import inputs
from llama4_kernels.bench.workloads import parse
from llama4_kernels.ops.backend import default_device

METRICS = {
    "us": "gpu__time_duration.sum",
    "bytes": "dram__bytes.sum",
    "memory_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
SECONDS = 600


@dataclass(frozen=True)
class Counters:
    """One launch: its time in µs, bytes to and from device memory, and utilisation in percent of the peak."""

    kernel: str
    us: float
    bytes: float
    memory_percent: float
    sm_percent: float
    occupancy_percent: float
    registers: float


def why_not() -> str:
    """Why there are no counters here, or ""."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return "" if shutil.which("ncu") else "no ncu on PATH"


def collect(workload: str, backend: str) -> list[Counters]:
    """The launches of one warm call. RuntimeError with ncu's own words where it cannot count."""
    program = [sys.executable, "-m", "llama4_kernels.bench.ncu", workload, backend]
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", "--print-units", "base"]
    command = ["ncu", *options, "--metrics", ",".join(METRICS.values()), *program]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # the package of this process, whatever the current folder holds
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    found = parse_csv(done.stdout)
    if not found:
        said = next((line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line), f"exit code {done.returncode}")
        raise RuntimeError(f"ncu counted nothing: {said}")
    return found


def parse_csv(text: str) -> list[Counters]:
    """The rows of ncu's raw page, whose first line names the columns and whose second line their units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]
    scale = {"us": 1e-3}  # base units: nanoseconds
    return [
        Counters(row["Kernel Name"], *(float(row[metric].replace(",", "")) * scale.get(name, 1.0) for name, metric in METRICS.items()))
        for row in rows
    ]


def _run_once(workload: str, backend: str) -> None:
    """What ncu watches: one call after one that compiles."""
    problem = inputs.make(parse(workload), default_device())
    with use_backend(backend):
        problem.call(**problem.arguments)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        problem.call(**problem.arguments)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    _run_once(*sys.argv[1:])
