"""Random inputs for a workload, and how far a result is from what the reference makes of the same inputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama4_kernels import ops, use_backend
from llama4_kernels.bench import layers
from llama4_kernels.bench.workloads import Workload
from llama4_kernels.ops import Linear, MoEWeights, Quantized
from llama4_kernels.reference.quantization import dequantize, full_range

FP8 = torch.float8_e4m3fn
QK_NORM_EPS = 1e-5
TEMPERATURE = (0.1, 8192)
ROPE_THETA = 500000.0
CHECKED_QUERIES = 256
LOGIT_SCALE, LEAD = 0.5, 0.25  # of router logits: their spread, and by how much a token's largest is ahead of the next, at least
# ‖out − reference‖ / ‖reference‖: one rounding to bf16 costs 2e-3; a whole layer rounds several times. So does fused_moe in fp8: tensor
# cores keep 13 bits of sums of e4m3 products (bench/calibration, fp8/bits), by which some hidden values quantise to the next code, 1/16 to
# 1/8 of the value away: 4e-3 of the result where sums are off by 1.3e-4, as in fp8/accumulation (tests/bench/test_bench_inputs.py).
BOUND, LAYER_BOUND = 4e-3, 1e-2


@dataclass(frozen=True)
class Problem:
    """A workload with its inputs on one device.

    arguments: the op's, by name; `call(**arguments)` computes it on the backend that is in force. distinct_experts: how many experts
    the tokens reach, None where there are none.
    """

    workload: Workload
    arguments: Mapping[str, Any]
    distinct_experts: int | None = None

    @property
    def call(self) -> Callable[..., Any]:
        op = self.workload.op
        return getattr(layers, op) if op in ("attention_part", "decoder_layer") else getattr(ops, op)

    @property
    def bound(self) -> float:
        w = self.workload
        return LAYER_BOUND if w.op == "decoder_layer" or (w.op, w.dtype) == ("fused_moe", "fp8") else BOUND

    def copy(self) -> Problem:
        """The same values in other memory."""
        return dataclasses.replace(self, arguments=_cloned(self.arguments))

    def canonical(self, result: Any) -> Any:
        """What `error` compares of a result of `call`: tensors, or for route_top1 the whole result."""
        if self.workload.op == "rope_qk_norm":
            slots = self.arguments["slots"]
            return [result, *(self.arguments[name].flatten(0, 1)[slots] for name in ("k_cache", "v_cache"))]
        if self.workload.op in ("moe_gate_up", "route_top1"):
            return list(result)
        return [result]

    def error(self, canonical: Any) -> float:
        """The largest relative error of a canonical result's parts; infinite for a routing that is none of this input."""
        if self.workload.op == "route_top1":
            return self._routing_error(*canonical)
        sampled = self._sampled_queries()
        if sampled is not None:
            canonical = [part[sampled[0]] for part in canonical]
        pairs = zip(canonical, self._expected, strict=True)
        return max(relative_error(got, expected) for got, expected in pairs)

    @functools.cached_property
    def _expected(self) -> list[Any]:
        sampled = self._sampled_queries()
        arguments = sampled[1] if sampled else _cloned(self.arguments)
        problem = dataclasses.replace(self, arguments=arguments)
        with use_backend("reference"):
            return problem.canonical(problem.call(**arguments))

    def _sampled_queries(self) -> tuple[Tensor, dict[str, Any]] | None:
        """Of a long prefill, rows of q and the same op on them alone: a query is the decode step of a request that ends with it."""
        w = self.workload
        if w.op != "chunked_attention" or w.tokens <= 8 * CHECKED_QUERIES:
            return None
        q = self.arguments["q"]
        rows = torch.linspace(0, w.tokens - 1, CHECKED_QUERIES, device=q.device).long()
        request = rows // w.queries
        positions = w.context - w.queries + rows % w.queries
        one_each = torch.arange(len(rows) + 1, dtype=torch.int32, device=q.device)
        changed = {"q": q[rows], "seq_lens": (positions + 1).int(), "query_start_loc": one_each, "page_table_rows": request}
        return rows, {**self.arguments, **changed}

    def _routing_error(self, routing: ops.Routing, quantized: Quantized | None) -> float:
        """Of the scores. Logits may differ in their last bits, so that any expert within 1e-3 of the largest logit is right."""
        x, router = self.arguments["x"], self.arguments["router"]
        logits = x.double() @ router.double().t()
        ids = routing.expert_ids.long()
        behind = logits.amax(1) - logits.gather(1, ids[:, None]).flatten()
        order = ids.argsort(stable=True)
        sizes = torch.bincount(ids, minlength=len(router))
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        if (behind > 1e-3).any() or not torch.equal(routing.order.long(), order) or not torch.equal(routing.offsets.long(), offsets):
            return math.inf
        error = relative_error(routing.scores, logits.amax(1).sigmoid())
        return error if quantized is None else max(error, relative_error(quantized, ops_quantised(x)))


def ops_quantised(x: Tensor) -> Quantized:
    with use_backend("reference"):
        return ops.quantize_per_token(x)


def relative_error(got: Tensor | Quantized, expected: Tensor | Quantized) -> float:
    """‖got − expected‖ / ‖expected‖ in float64; NaN where `got` holds one, infinite where the shapes differ, 0 for no elements."""
    got, expected = dequantize(got).double(), dequantize(expected).double()
    if got.shape != expected.shape:
        return math.inf
    return float((got.to(expected.device) - expected).norm() / expected.norm()) if expected.numel() else 0.0


class Random:
    """Random tensors on one device, the same for the same seed; on the meta device tensors without values."""

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        self._where: dict[str, Any] = {"generator": generator, "device": device}

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, **self._where).to(dtype)

    def integers(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), **self._where)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, **self._where)


def make(workload: Workload, device: torch.device) -> Problem:
    """Random inputs of a workload; the same on the same device. On the meta device they have no values."""
    random = Random(device, seed=0)
    op = workload.op
    if op == "rope_qk_norm":
        return Problem(workload, _rope(workload, random))
    if op == "chunked_attention":
        return Problem(workload, _attention(workload, random))
    if op == "attention_part":
        return Problem(workload, _attention_part(workload, random))
    x = random.normal(workload.tokens, workload.hidden)
    if op == "quantize_per_token":
        return Problem(workload, {"x": x})
    if op == "route_top1":
        router = _router(workload.experts, workload.hidden, random)
        return Problem(workload, {"x": _decided(x, router), "router": router, "quantize": workload.dtype == "fp8"})
    weights = moe_weights(workload.experts, workload.hidden, workload.intermediate, workload.dtype == "fp8", device)
    if op == "decoder_layer":
        norms = tuple(1 + 0.1 * random.normal(workload.hidden) for _ in range(2))
        arguments = {"x": x, "norms": norms, "moe": weights, **_attention_part(workload, random, x)}
        distinct = None if device.type == "meta" else _distinct_experts(_moe_input(arguments), weights)
        return Problem(workload, arguments, distinct)
    return _moe(workload, _decided(x, weights.router), weights)


def _router(experts: int, hidden: int, random: Random) -> Tensor:
    return random.normal(experts, hidden) * LOGIT_SCALE * hidden**-0.5


def _decided(x: Tensor, router: Tensor) -> Tensor:
    """x with LEAD more of its expert's row in each token, so that peers whose logits or scores are rounded to bf16 choose the same expert."""
    if x.is_meta:
        return x
    best = router[(x.float() @ router.float().t()).argmax(1)].float()
    return (x.float() + LEAD / LOGIT_SCALE**2 * best).to(x.dtype)


def _moe(workload: Workload, x: Tensor, weights: MoEWeights) -> Problem:
    distinct = None if x.is_meta else _distinct_experts(x, weights)
    if workload.op == "fused_moe":
        return Problem(workload, {"x": x, "weights": weights}, distinct)
    with use_backend("reference"):
        routing, quantized = ops.route_top1(x, weights.router, quantize=workload.dtype == "fp8")
        values = quantized or x
        if workload.op == "grouped_gemm":
            arguments = {"a": values, "b": weights.w13, "offsets": routing.offsets, "rows": routing.order}
        elif workload.op == "moe_gate_up":
            arguments = {"x": values, "routing": routing, "weights": weights}
        else:
            shared, routed = ops.moe_gate_up(values, routing, weights)
            arguments = {"shared": shared, "routed": routed, "routing": routing, "weights": weights}
    return Problem(workload, arguments, distinct)


def _moe_input(arguments: dict[str, Any]) -> Tensor:
    """What the MoE of a decoder layer is given."""
    attention = {name: value for name, value in _cloned(arguments).items() if name not in ("x", "norms", "moe")}
    x, norms = arguments["x"], arguments["norms"]
    normed = [functools.partial(torch.nn.functional.rms_norm, normalized_shape=x.shape[-1:], weight=w, eps=layers.EPS) for w in norms]
    with use_backend("reference"):
        return normed[1](x + layers.attention_part(normed[0](x), **attention))


def _distinct_experts(x: Tensor, weights: MoEWeights) -> int:
    with use_backend("reference"):
        routing, _ = ops.route_top1(x, weights.router)
    return int((routing.offsets.diff() > 0).sum())


@functools.lru_cache(maxsize=1)
def moe_weights(experts: int, hidden: int, intermediate: int, fp8: bool, device: torch.device) -> MoEWeights:
    """One rank's random weights of a MoE layer, of about unit variance over K; fp8 with a scale per output channel. The last are kept."""
    random = Random(device, seed=1)

    def linear(*shape: int) -> Linear:
        *stack, n, k = shape
        weight = torch.empty(shape, dtype=FP8 if fp8 else torch.bfloat16, device=device)
        scale = torch.empty(*stack, n, device=device)
        for part, channel in zip(weight.view(-1, n, k), scale.view(-1, n), strict=True):
            values = random.normal(n, k, dtype=torch.float32).mul_(k**-0.5)
            if fp8:
                channel.copy_(full_range(values.abs().amax(1)))
                values /= channel[:, None]
            part.copy_(values)
        return Linear(weight, scale) if fp8 else Linear(weight)

    return MoEWeights(
        _router(experts, hidden, random),
        linear(experts, 2 * intermediate, hidden),
        linear(experts, hidden, intermediate),
        linear(2 * intermediate, hidden),
        linear(hidden, intermediate),
    )


def _rope(w: Workload, random: Random) -> dict[str, Any]:
    """Tokens of as many requests, at random positions and slots of a cache of pages."""
    device = random.device
    pages = -(-w.tokens // 64) + 1
    caches = {name: torch.zeros(pages, 64, w.kv_heads, w.head_dim, dtype=_kv_dtype(w), device=device) for name in ("k_cache", "v_cache")}
    positions = random.integers(w.shapes.chunk, w.tokens)
    slots = random.permutation(pages * 64)[: w.tokens]
    return {"qkv": random.normal(w.tokens, w.qkv_width), "positions": positions, "slots": slots, **caches, **_rope_steps(w, device)}


def _rope_steps(w: Workload, device: torch.device, positions: int | None = None) -> dict[str, Any]:
    sizes = {"num_heads": w.heads, "num_kv_heads": w.kv_heads, "head_dim": w.head_dim}
    if w.layer == "full":
        return {**sizes, "temperature": TEMPERATURE}
    half = torch.arange(0, w.head_dim, 2, device=device) / w.head_dim
    angles = torch.arange(positions or w.shapes.chunk, device=device)[:, None] * ROPE_THETA**-half
    return {**sizes, "cos_sin": torch.cat([angles.cos(), angles.sin()], 1), "qk_norm_eps": QK_NORM_EPS if w.shapes.qk_norm else None}


def _kv_dtype(w: Workload) -> torch.dtype:
    return FP8 if w.dtype == "fp8" and w.op != "decoder_layer" else torch.bfloat16


def _attention(w: Workload, random: Random) -> dict[str, Any]:
    """Requests of equal lengths, whose pages lie in random order."""
    device = random.device
    per_request = -(-w.context // w.page)
    pages = w.batch * per_request
    shape = (pages, w.page, w.kv_heads, w.head_dim)
    caches = {name: random.normal(*shape).to(_kv_dtype(w)) for name in ("k_cache", "v_cache")}
    table = random.permutation(pages).int().view(w.batch, per_request)
    return {
        "q": random.normal(w.tokens, w.heads, w.head_dim),
        **caches,
        "page_table": table,
        "seq_lens": torch.full((w.batch,), w.context, dtype=torch.int32, device=device),
        "query_start_loc": torch.arange(w.batch + 1, dtype=torch.int32, device=device) * w.queries,
        "chunk_size": w.chunk_size,
    }


def _attention_part(w: Workload, random: Random, x: Tensor | None = None) -> dict[str, Any]:
    attention = _attention(w, random)
    del attention["q"]
    device = random.device
    positions = torch.arange(w.context - w.queries, w.context, device=device)
    pages = attention["page_table"].long()[:, positions // w.page]
    slots = (pages * w.page + positions % w.page).flatten()
    rope = {"positions": positions.repeat(w.batch), "slots": slots, **_rope_steps(w, device, w.context)}
    return {
        "x": random.normal(w.tokens, w.hidden) if x is None else x,
        "qkv_proj": random.normal(w.qkv_width, w.hidden) * w.hidden**-0.5,
        "o_proj": random.normal(w.hidden, w.heads * w.head_dim) * (w.heads * w.head_dim) ** -0.5,
        "rope": rope,
        "attention": attention,
    }


def _cloned(value: Any) -> Any:
    return mapped(torch.clone, value)


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value):
        return type(value)(*(mapped(function, getattr(value, field.name)) for field in dataclasses.fields(value)))
    if isinstance(value, Mapping):
        return {name: mapped(function, inner) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(function, inner) for inner in value)
    return value
