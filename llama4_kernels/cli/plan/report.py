"""A plan as a launch line, a table, JSON and a picture."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from llama4_kernels.cli.plan.errors import PlanError
from llama4_kernels.cli.plan.gpus import GIB
from llama4_kernels.cli.plan.memory import has_two_pools, local_tokens, request_table_bytes, rope_table_bytes, token_bytes
from llama4_kernels.cli.plan.planner import MARGIN, Case, Fit, Plan, why_not_served
from llama4_kernels.tables import new_table

KV_FLAG = {"fp8": "fp8_e4m3", "bf16": "bfloat16", None: "auto"}
POINTS = 120


def launch_line(case: Case, fit: Fit) -> list[str]:
    """The command that starts the server of a fit; PlanError where the plugin does not serve it."""
    q, flags = case.question, fit.flags
    if refused := why_not_served(case):
        raise PlanError(refused)
    pairs = [("--model-path", case.model.path), ("--model-impl", "llama4_kernels"), ("--tp-size", q.ranks)]
    pairs += [("--dp-size", q.gpus // q.ranks)] if q.gpus > q.ranks else []
    pairs += [("--quantization", "fp8")] if case.model.at_load else []
    pairs += [
        ("--context-length", flags.context_length),
        ("--mem-fraction-static", round(flags.mem_fraction_static, 4)),
        *([] if flags.swa_full_tokens_ratio is None else [("--swa-full-tokens-ratio", flags.swa_full_tokens_ratio)]),
        ("--chunked-prefill-size", flags.chunked_prefill_size),
        ("--page-size", flags.page_size),
        ("--kv-cache-dtype", KV_FLAG[q.kv_dtype]),
        *([("--max-running-requests", flags.max_running_requests)] if flags.max_running_requests else []),
        *([("--cuda-graph-max-bs-decode", flags.cuda_graph_max_bs)] if flags.cuda_graph_max_bs else []),
        ("--chat-template", "llama-4"),
    ]
    line = ["python3", "-m", "sglang.launch_server", *(str(word) for pair in pairs for word in pair)]
    line += ["--disable-hybrid-swa-memory"] if flags.swa_full_tokens_ratio is None else []
    return line + (["--enable-multimodal"] if flags.vision else [])


def notes(plan: Plan) -> list[str]:
    """What a reader should know beside the numbers."""
    case, fit = plan.case, plan.fit
    found = []
    if fit.problem is None and plan.default_problem:
        found.append(f"with --context-length {plan.context} alone SGLang would not get there: {plan.default_problem}")
    elif fit.problem is None and plan.context == case.model.max_context:
        found.append("that is every position of the model: --context-length sets no limit and may be left out")
    try:
        launch_line(case, fit)
    except PlanError as error:
        found.append(f"{error}: no launch line")
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything of a plan; sizes in bytes of one rank, `launch` a list of words or None."""
    fit, memory = plan.fit, plan.fit.memory
    try:
        launch = launch_line(plan.case, fit) if fit.problem is None else None
    except PlanError:
        launch = None
    return {
        "model": plan.case.model.path,
        "weights": plan.case.model.form,
        "gpu": plan.case.gpu.name,
        "gpus": plan.case.question.gpus,
        "fits": fit.problem is None,
        "problem": fit.problem,
        "context": plan.context,
        "concurrency": plan.requests,
        "largest_context": plan.largest_context,
        "largest_concurrency": plan.largest_requests,
        "flags": dataclasses.asdict(fit.flags),
        "bytes": {
            "free_before_loading": memory.free,
            "static_budget": memory.budget,
            "static": memory.static,
            "dynamic": memory.dynamic,
            "spare": memory.spare,
        },
        "kv_tokens": None if memory.pools is None else {"global": memory.pools.tokens, "local": memory.pools.swa_tokens},
        "max_running_requests": memory.requests,
        "launch": launch,
        "notes": notes(plan),
        "nearest": {change: {"context": near.context, "concurrency": near.requests} for change, near in plan.nearest.items()},
    }


def show(plan: Plan, console: Console) -> None:
    case, fit, memory = plan.case, plan.fit, plan.fit.memory
    q = case.question
    console.print(f"{_title(plan)}: memory of one rank", soft_wrap=True)
    table = new_table("", "GiB", "", right=["GiB"])
    for part, size in memory.static.items():
        table.add_row(part, _gib(size), _pool_tokens(plan) if part == "KV cache" else "")
    table.add_row(
        "static part", _gib(memory.budget), f"{fit.flags.mem_fraction_static:.3f} of {_gib(memory.free)} free before loading", style="bold"
    )
    for part, size in memory.dynamic.items():
        table.add_row(part, _gib(size), f"{memory.requests} rows" if part == "request table" else "")
    table.add_row("left", _gib(memory.spare), f"of which {_gib(MARGIN)} are kept for what these estimates miss", style="bold")
    console.print(table)
    console.print()
    if fit.problem is None:
        console.print(f"fits: {plan.requests} x {plan.context:,} tokens at once", style="green")
    else:
        console.print(f"does not fit: {plan.requests} x {plan.context:,} tokens: {fit.problem}", style="red", soft_wrap=True)
    if plan.largest_context:
        most = f"{plan.largest_requests}{' or more' if plan.largest_requests == plan.most_requests else ''}"
        console.print(f"largest context for {q.requests or 1} at once: {plan.largest_context:,}; most at once of {plan.context:,}: {most}")
    for note in notes(plan):
        console.print(f"note: {note}", soft_wrap=True)
    for change, near in plan.nearest.items():
        console.print(f"nearest that fits: {change}  ({near.requests} x {near.context:,} tokens)", soft_wrap=True)
    launch = as_json(plan)["launch"]
    if launch:
        console.print()
        console.print(shlex.join(launch), soft_wrap=True)


def plot(plan: Plan, file: Path) -> None:
    """Memory of one rank against the context length, for as many requests as the plan's, as an image of the kind that `file` ends in."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlanError('--plot needs matplotlib: pip install "llama4_kernels[plot]"') from None
    case, most = plan.case, plan.case.model.max_context
    contexts = sorted({max(1, round(most ** (0.4 + 0.6 * i / (POINTS - 1)))) for i in range(POINTS)} | {plan.context})
    needs = [_needs(plan, context) for context in contexts]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(contexts, *zip(*(need.values() for need in needs)), labels=list(needs[0]))
    axes.axhline(case.gpu.free / GIB, color="black", linewidth=1, label="free before loading")
    axes.axvline(plan.context, color="gray", linewidth=1, linestyle=":", label=f"planned context, {plan.context:,}")
    axes.set(xscale="log", xlim=(contexts[0], contexts[-1]), ylim=(0, case.gpu.free / GIB * 1.25), xlabel="context length, tokens")
    axes.set(ylabel="memory of one rank, GiB", title=_title(plan) + f", {plan.requests} at once")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise PlanError(f"--plot {file}: {error}") from None


def _needs(plan: Plan, context: int) -> dict[str, float]:
    """GiB that the plan's number of requests needs with `context` tokens each, under the plan's other flags, whether they fit or not."""
    model, made = plan.case.model, plan.fit.memory
    flags = dataclasses.replace(plan.fit.flags, context_length=context)
    cells = token_bytes(model, flags)
    local = local_tokens(model, flags, plan.requests) * cells[1] if has_two_pools(model, flags) else 0
    rest = sum(size for part, size in made.dynamic.items() if part != "request table")
    sizes = {
        "weights": sum(model.weight_bytes(flags.tp, flags.ep, flags.vision).values()),
        "KV cache, local layers": local,
        "KV cache, global layers": plan.requests * context * cells[0],
        "RoPE table": rope_table_bytes(model, context),
        "request table": request_table_bytes(made.requests, context),
        "activations, logits, graphs": rest,
    }
    return {part: size / GIB for part, size in sizes.items()}


def _title(plan: Plan) -> str:
    q = plan.case.question
    return f"{plan.case.model.path} ({plan.case.model.form}) on {q.gpus} x {plan.case.gpu.name}, --tp {q.ranks}"


def _pool_tokens(plan: Plan) -> str:
    pools = plan.fit.memory.pools
    assert pools is not None
    if pools.swa_tokens is None:
        return f"{pools.tokens:,} tokens in every layer"
    return f"{pools.tokens:,} tokens in {plan.case.model.global_layers} global layers, {pools.swa_tokens:,} in {plan.case.model.local_layers} local ones"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
