"""Times candidate launch configurations on the GPU at hand and writes the fastest ones to its table (llama4_kernels/triton/config.py)."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama4_kernels import use_backend
from llama4_kernels.bench import inputs, timing
from llama4_kernels.bench.inputs import Problem
from llama4_kernels.bench.workloads import BYTES, PUBLISHED, RANKS, Workload
from llama4_kernels.tables import new_console, new_table
from llama4_kernels.triton import config

ROUNDS = 20
TOKENS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096, 8192)
_LANES = {4: (64, 128), 8: (128,)}  # weight rows of a tile, by warps


@dataclass(frozen=True)
class Layer:
    """A model's MoE layer on one tensor-parallel rank. form: of its weights, "fp8" or "bf16"."""

    model: str
    tp: int
    form: str

    @staticmethod
    def named(name: str) -> Layer:
        """The layer of a name such as "scout-tp8-fp8" or "maverick-tp4-bf16"; ValueError for any other."""
        names = {
            f"{model}-tp{ranks}-{form}": Layer(model, ranks, form) for model, ranks, form in itertools.product(PUBLISHED, RANKS, BYTES)
        }
        if name not in names:
            raise ValueError(f"workload is {name!r}, needs one of {', '.join(names)}")
        return names[name]

    def workload(self, op: str, tokens: int) -> Workload:
        return Workload(op, self.form, self.model, self.tp, tokens)


def _grid(**choices: Sequence[int]) -> list[config.Config]:
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


CANDIDATES: dict[str, list[config.Config]] = {
    "grouped_gemm": [
        candidate
        for warps, rows in _LANES.items()
        for candidate in _grid(
            BLOCK_T=(16, 32, 64, 128),
            BLOCK_N=rows,
            num_warps=(warps,),
            num_stages=(3, 4, 5),
            programs_per_sm=(1, 2) if warps == 8 else (2, 4),
        )
    ],
    "route_top1": _grid(BLOCK_T=(8, 16, 64), BLOCK_E=(16, 128), BLOCK_K=(64, 256), num_warps=(4, 8), num_stages=(3, 4)),
    "moe_gate_up": _grid(
        BLOCK_S=(16, 32, 64), BLOCK_R=(16, 32, 64), SPLITS=(1, 2, 4, 8), num_warps=(4, 8), num_stages=(3, 4), programs_per_sm=(1, 2)
    ),
    "moe_down": [
        candidate
        for warps, rows in _LANES.items()
        for candidate in _grid(BLOCK_T=(16, 32, 64, 128), BLOCK_N=rows, num_warps=(warps,), num_stages=(3, 4, 6))
    ],
}


def tune(
    ops: Iterable[str],
    layers: Iterable[Layer],
    out: Path,
    *,
    tokens: Sequence[int] = TOKENS,
    device: torch.device | None = None,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, dict[str, dict[str, config.Config]]]:
    """Time every candidate of `ops` at every layer and number of tokens, and merge the fastest into the table at `out`.

    timer: the microseconds of one call; by default the median of CUDA-graph replays with a cold L2 cache, as benchmarks time it.
    Candidates that need more shared memory or registers than the GPU has are passed over. So are those whose result is further from the
    reference's than a benchmark may be, which is said: a compiler may get one of many tiles wrong. Prints what was chosen, and returns the
    whole table.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    timer = timer or (lambda call: timing.time_calls([call], device, ROUNDS)[0].median_us)
    console = new_console()
    table = _table(out)
    chosen = new_table("workload", "µs", "configuration", right=["µs"])
    jobs = list(itertools.product(layers, ops, tokens))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress, use_backend("triton"):
        task = progress.add_task("tune", total=sum(len(CANDIDATES[op]) for _, op, _ in jobs))
        for layer, op, count in jobs:
            problem = inputs.make(layer.workload(op, count), device)
            name = problem.workload.name
            progress.update(task, description=name)
            timed = []
            for candidate in CANDIDATES[op]:
                with config.trial(op, candidate) as trial:
                    try:
                        timed.append((_time(problem, timer), candidate))
                    except _Wrong as wrong:
                        console.print(f"{name}: {_words(candidate)} is left out: {wrong}", soft_wrap=True)
                    except triton.runtime.errors.OutOfResources:
                        pass
                progress.advance(task)
            if not timed:
                console.print(f"{name}: no configuration is left, nothing is written", soft_wrap=True)
                continue
            took, fastest = min(timed, key=lambda pair: pair[0])
            chosen.add_row(name, f"{took:.4g}", _words(fastest))
            table.setdefault(op, {}).setdefault(trial.shape, {})[str(trial.tokens)] = fastest
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    if chosen.row_count:
        console.print(chosen)
    config.clear()
    return table


class _Wrong(Exception):
    """A result is not the reference's."""


def _time(problem: Problem, timer: Callable[[Callable[[], object]], float]) -> float:
    """Of the configuration on trial; _Wrong where it does not compute the problem."""
    call = functools.partial(problem.call, **problem.arguments)
    error = problem.error(problem.canonical(call()))
    if not error <= problem.bound:
        raise _Wrong(f"its error against the reference is {error:.1e}, needs at most {problem.bound:.0e}")
    return statistics.median(timer(call) for _ in range(3))


def _words(candidate: config.Config) -> str:
    return " ".join(f"{name}={value}" for name, value in candidate.items())


def _table(path: Path) -> dict[str, dict[str, dict[str, config.Config]]]:
    return json.loads(path.read_text()) if path.exists() else {}


def run(ops: list[str] | None, workloads: list[str], tokens: list[int] | None, out: Path | None) -> int:
    """The command `llama4-kernels tune`: exit code 0, or where it cannot run 2 for a name it does not know, else 1, saying why."""
    try:
        unknown = [op for op in ops or () if op not in CANDIDATES]
        if unknown:
            raise ValueError(f"op is {unknown[0]!r}, needs one of {', '.join(CANDIDATES)}")
        layers = [Layer.named(name) for name in workloads]
        if not torch.cuda.is_available():
            raise RuntimeError("needs an NVIDIA GPU, and torch finds none here")
    except (ValueError, RuntimeError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    path = out or config.table_path(torch.cuda.get_device_name())
    try:  # now rather than when the first shape is timed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_table(path), indent=1, sort_keys=True) + "\n")
    except (OSError, ValueError) as error:
        print(f"tune: {path}: {error}", file=sys.stderr)
        return 1
    tune(ops or CANDIDATES, layers, path, tokens=tokens or TOKENS)
    print(f"tune: wrote {path}")
    return 0
