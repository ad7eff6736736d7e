"""What is measured, by names that stay the same for ever, and the least bytes and flops that each needs.

    <op>/<dtype>/<model>/tp<ranks>/t<tokens>                                       fused_moe/fp8/scout/tp8/t64
    rope_qk_norm/<dtype>/<model>/tp<ranks>/<layer>/t<tokens>                       rope_qk_norm/bf16/scout/tp8/local/t64
    <op>/<dtype>/<model>/tp<ranks>/<layer>/b<batch>/q<queries>/c<context>/p<page>  chunked_attention/bf16/scout/tp8/local/b64/q1/c8192/p64

A workload is one rank's share at tensor parallelism tp. dtype is that of the weights, or of the KV cache for rope_qk_norm,
chunked_attention and attention_part; everything else is bf16. layer is local (RoPE, attention within chunks) or full (NoPE). Each of
`batch` requests has `context` keys in all, the last `queries` of which are its new tokens: 1 is decode, `context` is a whole prefill.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

MOE_OPS = ("grouped_gemm", "moe_gate_up", "moe_down", "fused_moe")
TOKEN_OPS = ("quantize_per_token", "route_top1", *MOE_OPS)
ATTENTION_OPS = ("chunked_attention", "attention_part", "decoder_layer")
OPS = (*TOKEN_OPS, "rope_qk_norm", *ATTENTION_OPS)
LAYERS = ("local", "full")
BYTES = {"fp8": 1, "bf16": 2}


@dataclass(frozen=True)
class Model:
    """A model's shapes, of which every rank holds 1 / tp. experts: the routed ones. chunk: of local attention, in tokens."""

    experts: int
    qk_norm: bool
    hidden: int = 5120
    intermediate: int = 8192
    heads: int = 40
    kv_heads: int = 8
    head_dim: int = 128
    chunk: int = 8192


MODELS = {
    "scout": Model(experts=16, qk_norm=True),
    "maverick": Model(experts=128, qk_norm=False),
    # For tests and for trying a command: runs anywhere in no time, and says nothing about speed
    "tiny": Model(experts=4, qk_norm=True, hidden=256, intermediate=256, heads=8, kv_heads=2, head_dim=64, chunk=64),
}
PUBLISHED = ("scout", "maverick")
RANKS = (1, 2, 4, 8)
TOKENS = tuple(2**i for i in range(14))
CONTEXTS = tuple(1024 * 4**i for i in range(6))  # 1k to 1M
BATCHES = (1, 8, 64, 256)
PAGE = 64


@dataclass(frozen=True)
class Workload:
    """One rank's share of one op. layer: of rope_qk_norm and the attention ops, else None. batch to page: of the attention ops, else 0."""

    op: str
    dtype: str
    model: str
    tp: int
    tokens: int
    layer: str | None = None
    batch: int = 0
    queries: int = 0
    context: int = 0
    page: int = 0

    @property
    def name(self) -> str:
        parts = [self.op, self.dtype, self.model, f"tp{self.tp}", *([self.layer] if self.layer else [])]
        if self.batch:
            parts += [f"b{self.batch}", f"q{self.queries}", f"c{self.context}", f"p{self.page}"]
        else:
            parts.append(f"t{self.tokens}")
        return "/".join(parts)

    @property
    def shapes(self) -> Model:
        return MODELS[self.model]

    @property
    def experts(self) -> int:
        return self.shapes.experts

    @property
    def hidden(self) -> int:
        return self.shapes.hidden

    @property
    def intermediate(self) -> int:
        """Of one expert on this rank."""
        return self.shapes.intermediate // self.tp

    @property
    def heads(self) -> int:
        return self.shapes.heads // self.tp

    @property
    def kv_heads(self) -> int:
        return max(self.shapes.kv_heads // self.tp, 1)

    @property
    def head_dim(self) -> int:
        return self.shapes.head_dim

    @property
    def chunk_size(self) -> int | None:
        return self.shapes.chunk if self.layer == "local" else None

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Work:
    """The least that a workload needs: bytes to and from memory, each counted once, and flops of matrix products by dtype."""

    bytes: int
    flops: dict[str, int]

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


_NAME = re.compile(
    rf"(?P<op>{'|'.join(OPS)})/(?P<dtype>{'|'.join(BYTES)})/(?P<model>{'|'.join(MODELS)})/tp(?P<tp>\d+)(?:/(?P<layer>{'|'.join(LAYERS)}))?"
    r"/(?:t(?P<tokens>[1-9]\d*)|b(?P<batch>[1-9]\d*)/q(?P<queries>[1-9]\d*)/c(?P<context>[1-9]\d*)/p(?P<page>[1-9]\d*))"
)


def parse(name: str) -> Workload:
    """The workload of a name; ValueError for any other."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"workload is {name!r}, needs a name such as fused_moe/fp8/scout/tp8/t64; one of these ops: {', '.join(OPS)}")
    parts = match.groupdict()
    numbers = {key: int(parts[key] or 0) for key in ("tp", "tokens", "batch", "queries", "context", "page")}
    workload = Workload(**{**parts, **numbers})
    if not numbers["tokens"]:
        workload = Workload(**{**parts, **numbers, "tokens": workload.batch * workload.queries})
    _check(workload)
    return workload


def _check(workload: Workload) -> None:
    op, shapes = workload.op, workload.shapes
    if (op in ATTENTION_OPS) != bool(workload.batch):
        raise ValueError(f"workload is {workload.name!r}, needs {'b, q, c and p' if op in ATTENTION_OPS else 't alone'} as sizes for {op}")
    if (op in TOKEN_OPS) == (workload.layer is not None):
        raise ValueError(f"workload is {workload.name!r}, needs {'no' if op in TOKEN_OPS else 'a'} layer (local or full) for {op}")
    if workload.tp not in RANKS or shapes.kv_heads % workload.tp and op not in TOKEN_OPS:
        raise ValueError(f"workload is {workload.name!r}, needs tp of {', '.join(map(str, RANKS))} that divides {shapes.kv_heads} KV heads")
    if workload.queries > workload.context:
        raise ValueError(f"workload is {workload.name!r}, needs no more queries than the context has tokens")
    if op == "quantize_per_token" and workload.dtype != "fp8":
        raise ValueError(f"workload is {workload.name!r}, needs fp8 for {op}")


def named(models: Iterable[str] = PUBLISHED, ranks: Iterable[int] = RANKS) -> list[Workload]:
    """Every workload of the published grid, op by op; names outside of it are workloads too."""
    grid: list[Workload] = []
    models, ranks = tuple(models), tuple(ranks)
    for op in OPS:
        dtypes = ("fp8",) if op == "quantize_per_token" else ("fp8", "bf16")
        for dtype, model, tp in itertools.product(dtypes, models, ranks):
            if op in TOKEN_OPS:
                grid += [Workload(op, dtype, model, tp, tokens) for tokens in TOKENS]
            elif op == "rope_qk_norm":
                grid += [Workload(op, dtype, model, tp, tokens, layer) for layer in LAYERS for tokens in TOKENS]
            else:
                grid += [
                    Workload(op, dtype, model, tp, batch * queries, layer, batch, queries, context, PAGE)
                    for layer, (batch, queries, context) in itertools.product(LAYERS, _requests(op))
                ]
    return grid


def _requests(op: str) -> list[tuple[int, int, int]]:
    """Batch, queries, context: decode; a whole prefill; and 8192 new tokens after a long prefix, which SGLang prefills in such pieces."""
    contexts = CONTEXTS if op == "chunked_attention" else (1024, 16384)
    decode = [(batch, 1, context) for batch in BATCHES for context in contexts if batch * context <= 1 << 22]
    prefill = [(1, context, context) for context in contexts if context <= 1 << 17]
    extend = [(1, 8192, context) for context in contexts if context > 8192]
    return [*decode, *prefill, *extend]


# Short enough for a run in minutes: one rank of eight, few sizes. On a CPU the reference is timed, so only what ends in seconds.
_GPU_TOKENS = {("scout", "fp8"): (1, 8, 64, 256, 1024, 8192), ("scout", "bf16"): (64, 8192), ("maverick", "fp8"): (1, 64, 256, 8192)}
_GPU_REQUESTS = {
    "chunked_attention": ((1, 1, 8192), (64, 1, 8192), (64, 1, 65536), (1, 8192, 8192), (1, 8192, 131072)),
    "attention_part": ((1, 1, 8192), (64, 1, 8192), (1, 8192, 8192)),
    "decoder_layer": ((1, 1, 8192), (64, 1, 8192), (1, 8192, 8192)),
}
_CPU_TOKENS = {("scout", "fp8"): (1, 16)}
_CPU_REQUESTS = dict.fromkeys(ATTENTION_OPS, ((1, 1, 1024), (4, 1, 1024), (1, 16, 256)))


def default(device_type: str) -> list[Workload]:
    """The workloads that are run when none is asked for, on a "cuda" or "cpu" device.

    Where the two models have the same shapes, they are Scout's; what depends on a KV cache has one in bf16.
    """
    on_gpu = device_type == "cuda"
    tokens, requests = (_GPU_TOKENS, _GPU_REQUESTS) if on_gpu else (_CPU_TOKENS, _CPU_REQUESTS)
    chosen: list[Workload] = []
    for op in OPS:
        if op in ("rope_qk_norm", "quantize_per_token"):
            dtype, layers = ("bf16", LAYERS) if op == "rope_qk_norm" else ("fp8", (None,))
            chosen += [Workload(op, dtype, "scout", 8, count, layer) for layer in layers for count in tokens["scout", "fp8"]]
        elif op in TOKEN_OPS:
            chosen += [Workload(op, dtype, model, 8, count) for (model, dtype), counts in tokens.items() for count in counts]
        else:
            kinds = [("scout", "bf16")] if op != "decoder_layer" else [kind for kind in tokens if kind[1] == "fp8"]
            for (model, dtype), layer, (b, q, c) in itertools.product(kinds, LAYERS, requests[op]):
                chosen.append(Workload(op, dtype, model, 8, b * q, layer, b, q, c, PAGE))
    return chosen


def select(patterns: Iterable[str] | None, ops: Iterable[str] | None, device_type: str) -> list[Workload]:
    """The workloads of names or shell patterns ("fused_moe/*/tp8/*"), else the default ones; of these ops only, where some are given.

    ValueError for an op or a name that there is not, and for a pattern that no workload of the grid matches.
    """
    unknown = [op for op in ops or () if op not in OPS]
    if unknown:
        raise ValueError(f"op is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    if not patterns:
        chosen = default(device_type)
    else:
        chosen = []
        for pattern in patterns:
            if any(sign in pattern for sign in "*?["):
                matches = [workload for workload in named() if fnmatch.fnmatchcase(workload.name, pattern)]
                if not matches:
                    raise ValueError(f"workload is {pattern!r}, which no workload of the grid matches")
                chosen += matches
            else:
                chosen.append(parse(pattern))
    return [workload for workload in dict.fromkeys(chosen) if not ops or workload.op in set(ops)]


def expected_experts(experts: int, tokens: int) -> float:
    """How many of the experts at least one of the tokens goes to, on average, where each expert is as likely."""
    return experts * (1 - (1 - 1 / experts) ** tokens)


def work(workload: Workload, distinct_experts: float | None = None) -> Work:
    """The least bytes and flops of a workload, for inputs that reach `distinct_experts` experts (on average, if not given).

    Bytes are compulsory traffic: inputs and weights that are used, read once, and outputs written once; what one op hands to the next
    inside a fused op does not count. Flops are 2 · M · N · K of the matrix products.
    """
    if distinct_experts is None:
        distinct_experts = expected_experts(workload.experts, workload.tokens)
    if workload.op in TOKEN_OPS:
        return _token_work(workload, workload.op, distinct_experts)
    if workload.op == "rope_qk_norm":
        return Work(_rope_bytes(workload), {})
    if workload.op == "chunked_attention":
        return Work(_attention_bytes(workload), {"bf16": _attention_flops(workload)})
    part = _attention_part_work(workload)
    if workload.op == "attention_part":
        return part
    moe = _token_work(workload, "fused_moe", distinct_experts)
    residual = 2 * workload.tokens * workload.hidden * 2  # read and written once each; the MoE's x and y stay inside the layer
    flops = moe.flops | {"bf16": moe.flops["bf16"] + part.flops["bf16"]}
    activations = 4 * workload.tokens * workload.hidden * 2  # x and y of both parts
    return Work(part.bytes + moe.bytes - activations + residual, flops)


def _token_work(w: Workload, op: str, distinct: float) -> Work:
    tokens, hidden, inner, experts = w.tokens, w.hidden, w.intermediate, w.experts
    fp8 = w.dtype == "fp8"
    size = BYTES[w.dtype]
    x, codes = 2 * tokens * hidden, tokens * hidden + 4 * tokens
    quantised = codes if fp8 else x
    h = 2 * tokens * (inner + 4 * -(-inner // 128)) if fp8 else 2 * 2 * tokens * inner  # of both experts, with a scale per 128 columns

    def weights(n: int, k: int) -> int:
        return size * n * k + (4 * n if fp8 else 0)

    gate_up, down = weights(2 * inner, hidden), weights(hidden, inner)
    used = distinct + 1
    routing = 12 * tokens + 4 * (experts + 1)
    if op == "quantize_per_token":
        return Work(x + codes, {})
    router = Work(2 * experts * hidden + x, {"bf16": 2 * tokens * experts * hidden})
    if op == "route_top1":
        return Work(router.bytes + routing + (codes if fp8 else 0), router.flops)
    if op == "grouped_gemm":
        return Work(round(distinct * gate_up) + quantised + 2 * tokens * 2 * inner, {w.dtype: 2 * tokens * 2 * inner * hidden})
    if op == "moe_gate_up":
        return Work(round(used * gate_up) + quantised + routing + h, {w.dtype: 2 * 2 * tokens * 2 * inner * hidden})
    if op == "moe_down":
        return Work(round(used * down) + h + routing + x, {w.dtype: 2 * 2 * tokens * inner * hidden})
    flops = {w.dtype: 2 * 2 * tokens * 3 * inner * hidden}
    flops["bf16"] = flops.get("bf16", 0) + router.flops["bf16"]
    return Work(round(used * (gate_up + down)) + router.bytes + x, flops)


def _kv_bytes(w: Workload) -> int:
    """Of one token's keys and values, in the cache of chunked_attention; the decoder layer's dtype is that of its weights."""
    return 2 * w.kv_heads * w.head_dim * (2 if w.op == "decoder_layer" else BYTES[w.dtype])


def _rope_bytes(w: Workload) -> int:
    angles = 4 * w.head_dim if w.layer == "local" else 0
    return w.tokens * (2 * w.qkv_width + 2 * w.heads * w.head_dim + _kv_bytes(w) + angles + 8 + 8)


def _first_key(w: Workload, position: int) -> int:
    return 0 if w.chunk_size is None else position // w.chunk_size * w.chunk_size


def _attention_bytes(w: Workload) -> int:
    keys = w.context - _first_key(w, w.context - w.queries)
    return w.batch * keys * _kv_bytes(w) + 2 * 2 * w.tokens * w.heads * w.head_dim


def _attention_flops(w: Workload) -> int:
    return 4 * w.batch * w.heads * w.head_dim * visible_keys(w)


def visible_keys(w: Workload) -> int:
    """How many (query, key) pairs the mask of one request lets through."""

    def up_to(position: int) -> int:
        """The pairs of the queries at positions below `position`, from 0 on."""
        chunk = w.chunk_size or max(position, 1)
        whole, rest = divmod(position, chunk)
        return whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2

    return up_to(w.context) - up_to(w.context - w.queries)


def _attention_part_work(w: Workload) -> Work:
    """qkv projection, RoPE and cache write, attention, output projection."""
    projections = w.hidden * (w.qkv_width + w.heads * w.head_dim)
    keys = w.context - _first_key(w, w.context - w.queries)
    angles = 4 * w.head_dim * w.tokens if w.layer == "local" else 0
    moved = 2 * projections + 2 * 2 * w.tokens * w.hidden + w.batch * keys * _kv_bytes(w) + angles
    return Work(moved, {"bf16": 2 * w.tokens * projections + _attention_flops(w)})
