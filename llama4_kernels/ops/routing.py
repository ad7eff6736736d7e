"""Top-1 routing of tokens to experts."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops import backend, checks
from llama4_kernels.ops.types import Quantized, Routing


def route_top1(x: Tensor, router: Tensor, *, quantize: bool = False) -> tuple[Routing, Quantized | None]:
    """Route each token to one expert, and sort the tokens by expert.

    logits = x · routerᵀ in fp32 and not rounded, expert = argmax(logits), score = sigmoid(logits[expert]): `Llama4Router` of Hugging
    Face transformers (modeling_llama4.py) with top_k = 1. Ties go to the lowest index.

    x: [T, H] bfloat16 or float32. router: [E, H] bfloat16 or float32, E ≥ 1. Both contiguous.
    quantize: whether to return what quantize_per_token(x) returns as well, else None.
    Returns the Routing: every token has one place in `order`, and offsets[E] = T. A token whose row holds a NaN goes to some expert in
    range with a NaN score; other tokens are not touched by it.
    Raises TypeError or ValueError for a wrong dtype, shape, device or layout; BackendError where a backend is asked for that cannot compute
    it; RuntimeError in a backward pass.

    >>> import torch
    >>> from llama4_kernels import ops
    >>> routing, _ = ops.route_top1(torch.tensor([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0]]), torch.eye(2))
    >>> routing.expert_ids.tolist(), routing.order.tolist(), routing.offsets.tolist()
    ([1, 0, 0], [1, 2, 0], [0, 2, 3])
    >>> routing.scores
    tensor([0.8808, 0.8808, 0.7311])
    """
    checks.tensor("route_top1", "x", x, dtype=checks.FLOATS, shape=("T", "H"))
    checks.tensor("route_top1", "router", router, dtype=checks.FLOATS, shape=("E", x.shape[1]), device=x.device)
    checks.flag("route_top1", "quantize", quantize)
    if len(router) == 0:
        raise ValueError(f"route_top1: router has shape {list(router.shape)}, needs at least one expert")
    expert_ids, scores, order, offsets, *quantized = torch.ops.llama4_kernels.route_top1(x, router, quantize)
    return Routing(expert_ids, scores, order, offsets), Quantized(*quantized) if quantize else None


@torch.library.custom_op("llama4_kernels::route_top1", mutates_args=())
def _route_top1(x: Tensor, router: Tensor, quantize: bool) -> list[Tensor]:
    routing, quantized = backend.call("route_top1", x.device, x, router, quantize=quantize)
    outputs = [routing.expert_ids, routing.scores, routing.order, routing.offsets]
    return outputs if quantized is None else [*outputs, quantized.codes, quantized.scale]


@_route_top1.register_fake
def _(x: Tensor, router: Tensor, quantize: bool) -> list[Tensor]:
    tokens = x.shape[0]
    outputs = [
        x.new_empty(tokens, dtype=torch.int32),
        x.new_empty(tokens, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.int32),
        x.new_empty(router.shape[0] + 1, dtype=torch.int32),
    ]
    return [*outputs, x.new_empty(x.shape, dtype=checks.FP8), x.new_empty(tokens, dtype=torch.float32)] if quantize else outputs
