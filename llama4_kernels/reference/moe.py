"""The MoE layer: one routed and one shared expert per token."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops.types import Linear, MoEWeights, Quantized, Routing
from llama4_kernels.reference.grouped_gemm import multiply
from llama4_kernels.reference.quantization import dequantize, dequantize_weight, quantize_for, quantize_per_block, quantize_static
from llama4_kernels.reference.routing import route_top1


def moe_gate_up(
    x: Tensor | Quantized, routing: Routing, weights: MoEWeights
) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    dtype = x.dtype if isinstance(x, Tensor) else torch.bfloat16
    order = routing.order
    scores = routing.scores[order][:, None]

    shared = _input(x, weights.shared_w13)[order] @ dequantize_weight(weights.shared_w13).t()
    if weights.w13.input_scale is None:
        routed = scores * multiply(_input(x, weights.w13)[order], weights.w13, routing.offsets)
    else:
        scaled = quantize_static(scores * x[order].float(), weights.w13.input_scale)
        routed = multiply(dequantize(scaled), weights.w13, routing.offsets)
    return _hidden(shared, weights.shared_w2, dtype), _hidden(routed, weights.w2, dtype)


def moe_down(
    shared: Tensor | Quantized,
    routed: Tensor | Quantized,
    routing: Routing,
    weights: MoEWeights,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    out = dequantize(shared) @ dequantize_weight(weights.shared_w2).t()
    out += multiply(dequantize(routed), weights.w2, routing.offsets)
    return torch.empty_like(out, dtype=out_dtype).index_copy_(0, routing.order.long(), out.to(out_dtype))


def fused_moe(x: Tensor, weights: MoEWeights) -> Tensor:
    routing, _ = route_top1(x, weights.router)
    shared, routed = moe_gate_up(x, routing, weights)
    return moe_down(shared, routed, routing, weights, out_dtype=x.dtype)


def _input(x: Tensor | Quantized, linear: Linear) -> Tensor:
    """x in float32, as the weight `linear` is multiplied with it."""
    if isinstance(x, Tensor) and linear.scale is not None:
        x = quantize_for(x, linear)
    return dequantize(x)


def _hidden(gate_up: Tensor, down: Linear, dtype: torch.dtype) -> Tensor | Quantized:
    """silu(gate) * up, in the form that the weight `down` is multiplied with."""
    gate, up = gate_up.chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up
    if down.scale is None:
        return hidden.to(dtype)
    return quantize_per_block(hidden) if down.input_scale is None else quantize_static(hidden, down.input_scale)
