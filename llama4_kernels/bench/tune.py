"""Times candidate launch configurations on the GPU at hand and writes the fastest ones to its table (llama4_kernels/triton/config.py)."""

from __future__ import annotations

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

from llama4_kernels.bench import timing
from llama4_kernels.bench.inputs import moe_weights
from llama4_kernels.bench.workloads import BYTES, MODELS, PUBLISHED, RANKS
from llama4_kernels.ops.types import MoEWeights
from llama4_kernels.triton import config
from llama4_kernels.triton.grouped_gemm import grouped_gemm
from llama4_kernels.triton.moe import moe_down, moe_gate_up
from llama4_kernels.triton.quantization import quantize_per_token
from llama4_kernels.triton.routing import route_top1

ROUNDS = 20
TOKENS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096, 8192)
_LANES = {4: (64, 128), 8: (128,)}  # weight rows of a tile, by warps


@dataclass(frozen=True)
class Workload:
    """One MoE layer on one tensor-parallel rank."""

    experts: int
    intermediate: int
    fp8: bool
    hidden: int = 5120

    @staticmethod
    def named(name: str) -> Workload:
        """The workload of a name such as "scout-tp8-fp8" or "maverick-tp4-bf16"; ValueError for any other."""
        names = {
            f"{model}-tp{ranks}-{form}": Workload(MODELS[model].experts, MODELS[model].intermediate // ranks, form == "fp8")
            for model, ranks, form in itertools.product(PUBLISHED, RANKS, BYTES)
        }
        if name not in names:
            raise ValueError(f"workload is {name!r}, needs one of {', '.join(names)}")
        return names[name]


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
    workloads: Iterable[Workload],
    out: Path,
    *,
    tokens: Sequence[int] = TOKENS,
    device: torch.device | None = None,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, dict[str, dict[str, config.Config]]]:
    """Time every candidate of `ops` at every workload and number of tokens, and merge the fastest into the table at `out`.

    timer: the time of one call, in any unit; by default the median of CUDA-graph replays with a cold L2 cache, as benchmarks time it.
    Candidates that need more shared memory or registers than the GPU has are passed over. Returns the whole table.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    timer = timer or (lambda call: timing.time_calls([call], device, ROUNDS)[0].median_us)
    table = _table(out)
    jobs = list(itertools.product(workloads, ops, tokens))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("tune", total=sum(len(CANDIDATES[op]) for _, op, _ in jobs))
        for workload, group in itertools.groupby(jobs, key=lambda job: job[0]):
            weights = _layer(workload, device)
            for _, op, count in group:
                progress.update(task, description=f"{op}, {workload.experts} experts, {count} tokens")
                call = _call(op, weights, torch.randn(count, workload.hidden, device=device).bfloat16())
                timed = []
                for candidate in CANDIDATES[op]:
                    with config.trial(op, candidate) as trial:
                        took = _time(call, timer)
                    if took is not None:
                        timed.append((took, candidate))
                    progress.advance(task)
                if timed:
                    fastest = min(timed, key=lambda pair: pair[0])[1]
                    table.setdefault(op, {}).setdefault(trial.shape, {})[str(trial.tokens)] = fastest
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    config.clear()
    return table


def _time(call: Callable[[], object], timer: Callable[[Callable[[], object]], float]) -> float | None:
    try:
        call()
        return statistics.median(timer(call) for _ in range(3))
    except triton.runtime.errors.OutOfResources:
        return None


def _layer(workload: Workload, device: torch.device) -> MoEWeights:
    return moe_weights(workload.experts, workload.hidden, workload.intermediate, workload.fp8, device)


def _call(op: str, weights: MoEWeights, x: torch.Tensor) -> Callable[[], object]:
    """One call of `op` on tokens that spread over the experts as random ones do."""
    fp8 = weights.w13.scale is not None
    routing, _ = route_top1(x, weights.router)
    if op == "route_top1":
        return lambda: route_top1(x, weights.router, quantize=fp8)
    values = quantize_per_token(x) if fp8 else x
    if op == "grouped_gemm":
        return lambda: grouped_gemm(values, weights.w13, routing.offsets, rows=routing.order)
    if op == "moe_gate_up":
        return lambda: moe_gate_up(values, routing, weights)
    shared, routed = moe_gate_up(values, routing, weights)
    return lambda: moe_down(shared, routed, routing, weights, out_dtype=x.dtype)


def _table(path: Path) -> dict[str, dict[str, dict[str, config.Config]]]:
    return json.loads(path.read_text()) if path.exists() else {}


def run(ops: list[str] | None, workloads: list[str], tokens: list[int] | None, out: Path | None) -> int:
    """The command `llama4-kernels tune`: exit code 0, or where it cannot run 2 for a name it does not know, else 1, saying why."""
    try:
        unknown = [op for op in ops or () if op not in CANDIDATES]
        if unknown:
            raise ValueError(f"op is {unknown[0]!r}, needs one of {', '.join(CANDIDATES)}")
        layers = [Workload.named(name) for name in workloads]
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
