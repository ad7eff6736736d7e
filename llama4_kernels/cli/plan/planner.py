"""What fits, under which flags, and what comes nearest where nothing does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llama4_kernels.cli.plan import gpus, model
from llama4_kernels.cli.plan.errors import PlanError
from llama4_kernels.cli.plan.gpus import GIB, TOTAL_MIB, Gpu
from llama4_kernels.cli.plan.memory import (
    SWA_RATIO,
    Flags,
    Memory,
    default_chunked_prefill,
    default_graph_batch,
    default_mem_fraction,
    has_two_pools,
    kv_room,
    local_tokens,
    memory,
    rope_table_bytes,
    token_bytes,
)
from llama4_kernels.cli.plan.model import Model, Weights

KV_BYTES = {"bf16": 2, "fp8": 1}
MOST_REQUESTS = 65536  # that are tried where no more were asked for
MARGIN = 2 * GIB  # that a plan leaves free for fragmentation and whatever the estimates of the dynamic part miss


@dataclass(frozen=True)
class Question:
    """What the command was asked; None leaves a choice to the planner.

    tp: all GPUs where it is None. requests: at once, each of the full context. one_pool: --disable-hybrid-swa-memory.
    """

    model: str
    gpu: str
    gpus: int
    tp: int | None = None
    ep: int = 1
    weights: Weights | None = None
    kv_dtype: str | None = None
    context: int | None = None
    requests: int | None = None
    mem_fraction_static: float | None = None
    swa_full_tokens_ratio: float | None = None
    one_pool: bool = False
    chunked_prefill_size: int | None = None
    page_size: int = 1
    max_running_requests: int | None = None
    cuda_graph_max_bs: int | None = None
    vision: bool = False

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return self.tp or self.gpus


@dataclass(frozen=True)
class Case:
    """A checked question: the model and the GPU that it means."""

    question: Question
    model: Model
    gpu: Gpu

    def base_flags(self, context: int, rows: int | None = None) -> Flags:
        """The flags that the question gives, and SGLang's defaults for the others; `rows`: of the request table, where it gives none."""
        q = self.question
        kv_bytes = KV_BYTES[q.kv_dtype] if q.kv_dtype else self.model.dtype_bytes
        chunked = q.chunked_prefill_size or default_chunked_prefill(self.gpu)
        flags = Flags(
            context_length=context,
            tp=q.ranks,
            mem_fraction_static=q.mem_fraction_static or 0.0,
            swa_full_tokens_ratio=None if q.one_pool else q.swa_full_tokens_ratio or SWA_RATIO,
            chunked_prefill_size=chunked,
            page_size=q.page_size,
            kv_bytes=kv_bytes,
            ep=q.ep,
            max_running_requests=q.max_running_requests or rows,
            cuda_graph_max_bs=q.cuda_graph_max_bs,
            vision=q.vision,
        )
        return flags if q.mem_fraction_static else self._with_default_fraction(flags)

    def _with_default_fraction(self, flags: Flags) -> Flags:
        batch = flags.cuda_graph_max_bs or default_graph_batch(self.gpu, flags.tp, flags.max_running_requests)
        return replace(flags, mem_fraction_static=default_mem_fraction(self.gpu, flags, batch, self.model.vision))


@dataclass(frozen=True)
class Fit:
    """Flags, the memory under them, and what stands in the way, if anything."""

    flags: Flags
    memory: Memory
    problem: str | None


@dataclass(frozen=True)
class Plan:
    """The answer: what the asked context and number of requests come to, and how far each could go with the other as it is.

    default_problem: what stands in the way of one such request where only the context length and the question's own flags are given, with
        no margin at all.
    largest_context: for as many requests as were asked for, or one; None where nothing fits. largest_requests: at `context`, of
        most_requests that were tried.
    nearest: where it does not fit, changes of the question under which it does, by description.
    """

    case: Case
    context: int
    requests: int
    fit: Fit
    default_problem: str | None
    largest_context: int | None
    largest_requests: int
    most_requests: int
    nearest: dict[str, Plan]


def check(question: Question) -> Case:
    """The case that a question means; PlanError says what to change in it."""
    q = question
    found = model.load(q.model, q.weights)
    gpu = gpus.load(q.gpu)
    if q.gpus % q.ranks:
        raise PlanError(f"--tp {q.tp} does not divide --gpus {q.gpus}: give a divisor, each group of {q.tp} is a replica")
    if q.tp:
        found.check_ranks(q.tp, q.ep, f"--tp {q.tp}", "give")
    else:
        found.check_ranks(q.gpus, q.ep, f"--gpus {q.gpus} as the number of ranks", "give --tp,")
    chunked = q.chunked_prefill_size or default_chunked_prefill(gpu)
    for name, size in (("the attention chunk", found.chunk), ("--chunked-prefill-size", chunked)):
        if size is not None and size % q.page_size:
            raise PlanError(
                f"--page-size {q.page_size} does not divide {name} of {size} tokens: give a divisor of it, such as {math.gcd(q.page_size, size)}"
            )
    if q.context is not None and q.context > found.max_context:
        raise PlanError(
            f"--context {q.context} is more than the {found.max_context} positions of the model's config.json: give at most those"
        )
    if q.one_pool and q.swa_full_tokens_ratio is not None:
        raise PlanError("--swa-full-tokens-ratio divides the memory of two pools: leave it or --one-pool out")
    if q.vision and found.vision is None:
        raise PlanError(f"--vision: {q.model} has no vision_config; leave it out")
    return Case(q, found, gpu)


def why_not_served(case: Case) -> str:
    """Why the plugin does not serve a case, whether it fits or not, or ""."""
    q = case.question
    if case.model.weights == "int4":
        return "llama4_kernels does not serve int4 weights"
    if q.ep > 1:
        return f"llama4_kernels does not serve --ep-size {q.ep}"
    if case.gpu.name == "a100" and (case.model.weights == "fp8" or q.kv_dtype == "fp8"):
        return "llama4_kernels serves FP8 from compute capability 8.9 on in CUDA graphs, which an a100 does not have"
    return ""


def plan(question: Question) -> Plan:
    """The plan for a question; PlanError where it is wrong in itself."""
    case = check(question)
    answer = _answer(case)
    if answer.fit.problem is None:
        return answer
    return replace(answer, nearest=dict(_nearest(case, answer)))


def _answer(case: Case) -> Plan:
    q = case.question
    most_context = case.model.max_context
    largest_context = _largest(lambda context: _fits(case, context, q.requests or 1), most_context)
    context = q.context or largest_context or min(case.model.chunk or most_context, most_context)
    most_requests = max(MOST_REQUESTS, q.requests or 0)
    largest_requests = _largest(lambda requests: _fits(case, context, requests), most_requests) or 0
    requests = q.requests or max(largest_requests, 1)
    default = case.base_flags(context)
    default_problem = _problem(case, default, memory(case.model, case.gpu, default), 1, margin=0)
    fit = arrange(case, context, requests)
    return Plan(case, context, requests, fit, default_problem, largest_context, largest_requests, most_requests, {})


def arrange(case: Case, context: int, requests: int) -> Fit:
    """The flags nearest to SGLang's defaults under which `requests` requests of `context` tokens fit.

    First its own defaults, with the pools divided so that the global layers hold everything; then fewer rows in the request table; then
    no more rows than requests, and a smaller static part. It is never larger than SGLang's own: how much activations and CUDA graphs
    really take has not been measured.
    """
    q = case.question
    flags = case.base_flags(context)
    first = fit = _divide(case, flags, requests)
    if fit.problem and q.max_running_requests is None:
        fit = _divide(case, _fewer_rows(first, requests), requests)
        if fit.problem:
            fit = _divide(case, case.base_flags(context, rows=requests), requests)
    if fit.problem and q.mem_fraction_static is None and fit.memory.spare < MARGIN:
        fit = _smaller_static(case, fit.flags, requests)
    return fit


def _fits(case: Case, context: int, requests: int) -> bool:
    return arrange(case, context, requests).problem is None


def _divide(case: Case, flags: Flags, requests: int) -> Fit:
    """With the pool of the local layers as large as the tokens that the global ones need allow, at most SGLang's own."""
    if case.question.swa_full_tokens_ratio is None and has_two_pools(case.model, flags):
        cells, tokens = token_bytes(case.model, flags), requests * flags.context_length + flags.page_size
        ratio = math.floor((kv_room(case.model, case.gpu, flags) / tokens - cells[0]) / cells[1] * 1e4) / 1e4
        flags = replace(flags, swa_full_tokens_ratio=min(max(ratio, 1e-4), SWA_RATIO))
    made = memory(case.model, case.gpu, flags)
    return Fit(flags, made, _problem(case, flags, made, requests))


def _fewer_rows(fit: Fit, requests: int) -> Flags:
    """As many rows of the request table as fit beside the static part, in steps of 16; at least `requests`, and no more than SGLang's."""
    room = fit.memory.spare - MARGIN + fit.memory.dynamic["request table"]
    rows = room // (fit.memory.dynamic["request table"] // (fit.memory.requests + 1)) - 1
    rows = min(int(rows) // 16 * 16, fit.memory.requests)
    return replace(fit.flags, max_running_requests=max(rows, requests))


def _smaller_static(case: Case, flags: Flags, requests: int) -> Fit:
    """With what the dynamic part needs taken from the static one."""
    made = memory(case.model, case.gpu, flags)
    fraction = math.floor((1 - (sum(made.dynamic.values()) + MARGIN) / case.gpu.free) * 1000) / 1000
    return _divide(case, replace(flags, mem_fraction_static=max(fraction, 0.001)), requests)


def _problem(case: Case, flags: Flags, made: Memory, requests: int, margin: int = MARGIN) -> str | None:
    """What does not fit first."""
    weights = sum(case.model.weight_bytes(flags.tp, flags.ep, flags.vision).values())
    if case.model.at_load:
        layers = tuple(replace(layer, quantised=frozenset()) for layer in case.model.layers)
        before = sum(replace(case.model, weights="bf16", layers=layers).weight_bytes(flags.tp, flags.ep, flags.vision).values())
        if before > made.free:
            return f"the weights are quantised after loading, and take {_gib(before)} before, of {_gib(made.free)} that are free"
    room = kv_room(case.model, case.gpu, flags)
    if room <= 0:
        table = _gib(rope_table_bytes(case.model, flags.context_length))
        return f"the weights ({_gib(weights)}) and the RoPE table ({table}) fill the static part of {_gib(made.budget)}: no room for a KV cache"
    needed, local = requests * flags.context_length, local_tokens(case.model, flags, requests) if has_two_pools(case.model, flags) else 0
    if made.pools is None or made.pools.tokens < needed or (made.pools.swa_tokens or 0) < local:
        cells = token_bytes(case.model, flags)
        have = (
            "too little for one chunk"
            if made.pools is None
            else " and ".join(f"{n:,}" for n in (made.pools.tokens, made.pools.swa_tokens) if n)
        )
        tokens = f"{needed:,} tokens" + (f" in global layers and {local:,} in local ones" if local else "")
        ratio = f" at --swa-full-tokens-ratio {flags.swa_full_tokens_ratio}" if local else ""
        return f"the KV cache must hold {tokens}, {_gib(needed * cells[0] + local * cells[1])}; its {_gib(room)} hold {have}{ratio}"
    if made.requests < requests:
        return f"--max-running-requests {made.requests} is less than {requests} requests"
    if made.spare < margin:
        largest = max(made.dynamic, key=made.dynamic.__getitem__)
        kept = f" and a margin of {_gib(margin)}" if margin else ""
        need = (
            f"{_gib(sum(made.dynamic.values()))}{kept} are needed beside the static part, {_gib(made.dynamic[largest])} for the {largest}"
        )
        return f"{need}, and {_gib(made.free - made.budget)} are left there"
    return None


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest n up to `most` that fits, None where 1 does not; what fits for n fits for less."""
    if not fits(1):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _nearest(case: Case, answer: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes of one option that make it fit; where none does, of two. None that make the plugin refuse it."""
    changes = list(_changes(case, answer))
    for count in (1, 2):
        found = False
        seen: set[tuple[str, ...]] = set()
        for chosen in itertools.combinations(changes, count):
            names = tuple(name for name, _, _ in chosen)
            if len(set(names)) < count or names in seen:
                continue
            question = replace(case.question, **{key: value for _, _, values in chosen for key, value in values.items()})
            try:
                changed_case = check(question)
            except PlanError:
                continue
            if why_not_served(changed_case) and not why_not_served(case):
                continue
            changed = _answer(changed_case)
            if changed.fit.problem is None:
                seen.add(names)  # the first that fits is the smallest change of its kind
                found = True
                yield " ".join(text for _, text, _ in chosen), changed
        if found:
            return


def _changes(case: Case, answer: Plan) -> Iterator[tuple[str, str, dict]]:
    """(kind, options to give, fields of the question), smaller changes of a kind first."""
    q = case.question
    if q.requests and answer.largest_requests and answer.largest_requests < q.requests:
        yield "requests", f"--concurrency {answer.largest_requests}", {"requests": answer.largest_requests}
    if q.context and answer.largest_context:
        yield "context", f"--context {answer.largest_context}", {"context": answer.largest_context}
    if case.model.weights == "bf16":
        yield "weights", "--weights fp8", {"weights": "fp8"}
    if q.kv_dtype != "fp8":
        yield "KV cache", "--kv-dtype fp8", {"kv_dtype": "fp8"}
    for tp in (2, 4, 8):
        if tp > q.ranks:
            yield "ranks", f"--gpus {max(q.gpus, tp)} --tp {tp}", {"gpus": max(q.gpus, tp), "tp": tp}
    for name, total in sorted(TOTAL_MIB.items(), key=lambda item: item[1]):
        if total > case.gpu.total_mib:
            yield "GPU", f"--gpu {name}", {"gpu": name}
