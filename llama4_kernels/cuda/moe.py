"""The MoE layer in CUDA, three launches: csrc/routing.cu, csrc/moe_gate_up.cu, csrc/moe_down.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels import switches
from llama4_kernels.counters import tickets
from llama4_kernels.cuda import _C, launch
from llama4_kernels.cuda.quantization import quantize_per_token
from llama4_kernels.cuda.routing import route_top1, why_not_route_top1
from llama4_kernels.ops.types import Linear, MoEWeights, Quantized, Routing, dtype_name, new_hidden, scale_of, values_of

ROW_ALIGNMENT = 16


def moe_gate_up(x: Tensor | Quantized, routing: Routing, weights: MoEWeights) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    quantized = x if isinstance(x, Quantized) else quantize_per_token(x) if _wants_codes(weights) else None
    return _gate_up(x, quantized, routing, weights)


def moe_down(
    shared: Tensor | Quantized,
    routed: Tensor | Quantized,
    routing: Routing,
    weights: MoEWeights,
    *,
    out_dtype: torch.dtype,
    dependent: bool = False,
) -> Tensor:
    tokens, k_shared = values_of(shared).shape
    experts, hidden, k_routed = weights.w2.weight.shape
    device = routing.order.device
    out = torch.empty(tokens, hidden, dtype=out_dtype, device=device)
    if tokens == 0:
        return out
    row_tiles, column_tiles = _ceil_div(tokens, _C.moe_tile_tokens(tokens)), _ceil_div(hidden, _C.moe_down_columns(tokens))
    tiles, segments = row_tiles * column_tiles, min(tokens, row_tiles + experts)
    stages = column_tiles * (row_tiles * _steps(weights.shared_w2) + segments * _steps(weights.w2))
    sharing, _parts = _sharing(device, tiles, tiles, stages, _C.moe_down_part(tokens))  # C++ has only the address of parts
    _C.moe_down(
        h_shared=_operand(shared),
        h_routed=_operand(routed),
        w_shared=_weight(weights.shared_w2, stack=0),
        w_routed=_weight(weights.w2, stack=1),
        k_shared=k_shared,
        k_routed=k_routed,
        routing=_C.MoeRouting(order=routing.order.data_ptr(), offsets=routing.offsets.data_ptr()),
        tokens=tokens,
        hidden=hidden,
        experts=experts,
        out=out.data_ptr(),
        sharing=sharing,
        dependent=dependent,
        stream=launch.stream(),
    )
    return out


def fused_moe(x: Tensor, weights: MoEWeights) -> Tensor:
    dependent, prefetch = switches.is_on(switches.DEPENDENT_LAUNCH), switches.is_on(switches.PREFETCH)
    routing, codes = route_top1(x, weights.router, quantize=_wants_codes(weights), dependent=dependent)
    shared, routed = _gate_up(x, codes, routing, weights, dependent=dependent, prefetch=prefetch)
    return moe_down(shared, routed, routing, weights, out_dtype=x.dtype, dependent=dependent)


def why_not_dtype(dtype: torch.dtype, name: str) -> str:
    return "" if dtype == torch.bfloat16 else f"{name} is {dtype_name(dtype)}: the tensor cores take bfloat16"


def why_not_moe_gate_up(x: Tensor | Quantized, routing: Routing, weights: MoEWeights) -> str:
    if isinstance(x, Tensor) and (reason := why_not_dtype(x.dtype, "x")):
        return reason
    return _why_not_weights(weights) or _why_not_aligned({"x": values_of(x)})


def why_not_moe_down(
    shared: Tensor | Quantized, routed: Tensor | Quantized, routing: Routing, weights: MoEWeights, *, out_dtype: torch.dtype
) -> str:
    if out_dtype != torch.bfloat16:
        return f"out_dtype is {dtype_name(out_dtype)}, not bfloat16"
    for name, hidden in (("shared", shared), ("routed", routed)):
        if isinstance(hidden, Tensor) and (reason := why_not_dtype(hidden.dtype, name)):
            return reason
    return _why_not_weights(weights) or _why_not_aligned({"shared": values_of(shared), "routed": values_of(routed)})


def why_not_fused_moe(x: Tensor, weights: MoEWeights) -> str:
    return why_not_route_top1(x, weights.router) or why_not_moe_gate_up(x, None, weights)


def _gate_up(
    x: Tensor | Quantized,
    quantized: Quantized | None,
    routing: Routing,
    weights: MoEWeights,
    *,
    dependent: bool = False,
    prefetch: bool = False,
) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    """quantized: x with one scale per token, where a weight wants that; x itself where it is Quantized, per token or per 128 columns."""
    tokens, hidden = values_of(x).shape
    experts, device = len(weights.router), routing.order.device
    shared, routed = (new_hidden(tokens, down, torch.bfloat16) for down in (weights.shared_w2, weights.w2))
    if tokens == 0:
        return shared, routed
    rows = _C.moe_tile_tokens(tokens)
    shared_columns, routed_columns = (_ceil_div(values_of(h).shape[1], _C.MOE_GATE_UP_COLUMNS) for h in (shared, routed))
    row_tiles = _ceil_div(tokens, rows)
    shared_tiles = row_tiles * shared_columns
    routed_tiles = min(tokens, tokens // rows + experts) * routed_columns
    stages = shared_tiles * _steps(weights.shared_w13) + routed_tiles * _steps(weights.w13)
    least_tiles, most_tiles = shared_tiles + row_tiles * routed_columns, shared_tiles + routed_tiles
    part = _C.moe_gate_up_part(tokens)
    sharing, _parts = _sharing(device, least_tiles, most_tiles, stages, part)  # C++ has only the address of parts
    _C.moe_gate_up(
        x_shared=_input(x, quantized, weights.shared_w13, None),
        x_routed=_input(x, quantized, weights.w13, routing.scores),
        w_shared=_weight(weights.shared_w13, stack=0),
        w_routed=_weight(weights.w13, stack=1),
        h_shared=_hidden(shared, weights.shared_w2),
        h_routed=_hidden(routed, weights.w2),
        routing=_C.MoeRouting(order=routing.order.data_ptr(), offsets=routing.offsets.data_ptr()),
        tokens=tokens,
        hidden=hidden,
        experts=experts,
        sharing=sharing,
        prefetch_w_shared=prefetch,
        prefetch_address=weights.shared_w2.weight.data_ptr() if prefetch else 0,
        prefetch_bytes=weights.shared_w2.weight.nbytes,
        dependent=dependent,
        stream=launch.stream(),
    )
    return shared, routed


def _wants_codes(weights: MoEWeights) -> bool:
    """Whether a first weight is multiplied with codes that have one scale per token, which the kernel does not make itself."""
    return any(linear.input_granularity == "row" for linear in (weights.w13, weights.shared_w13))


def _input(x: Tensor | Quantized, quantized: Quantized | None, linear: Linear, scores: Tensor | None) -> _C.MoeOperand:
    """x in the form that the first weight `linear` is multiplied with, times the scores."""
    if isinstance(x, Quantized) or linear.input_granularity == "row":
        return _operand(quantized, scores)
    if linear.input_granularity == "tensor":
        return _operand(Quantized(x, linear.input_scale), scores, _C.MoeConversion.fixed)
    return _operand(x, scores, _C.MoeConversion.none if linear.scale is None else _C.MoeConversion.per_block)


def _operand(x: Tensor | Quantized, factors: Tensor | None = None, conversion: _C.MoeConversion = _C.MoeConversion.none) -> _C.MoeOperand:
    scale = scale_of(x)
    row_stride, step_stride = (0, 0) if scale is None or scale.dim() == 0 else (scale.stride(0), scale.stride(1) if scale.dim() == 2 else 0)
    return _C.MoeOperand(
        values=values_of(x).data_ptr(),
        scale=launch.address(scale),
        scale_row_stride=row_stride,
        scale_step_stride=step_stride,
        factors=launch.address(factors),
        conversion=conversion,
    )


def _weight(linear: Linear, *, stack: int) -> _C.MoeWeight:
    return _C.MoeWeight(
        values=linear.weight.data_ptr(),
        dtype=launch.DTYPES[linear.weight.dtype],
        scale=launch.address(linear.scale),
        scale_dimensions=0 if linear.scale is None else linear.scale.dim() - stack,
    )


def _hidden(hidden: Tensor | Quantized, down: Linear) -> _C.MoeHidden:
    values = values_of(hidden)
    return _C.MoeHidden(
        values=values.data_ptr(),
        dtype=launch.DTYPES[values.dtype],
        scale=hidden.scale.data_ptr() if isinstance(hidden, Quantized) else 0,
        is_static=down.input_scale is not None,
        width=values.shape[1],
    )


def _sharing(device: torch.device, least_tiles: int, most_tiles: int, stages: int, part: int) -> tuple[_C.MoeSharing, Tensor | None]:
    """The grid and the memory where blocks that share a tile meet, with the tensor that holds it. least_tiles, most_tiles: how many there
    may be; stages: the most of all tiles; part: floats that a block leaves of one tile. See csrc/moe_runs.cuh."""
    blocks = min(_C.moe_multiprocessors(), _ceil_div(stages, _C.MOE_MIN_RUN))
    unshared = _C.MOE_MANY_ROUNDS * blocks
    if least_tiles >= unshared:
        return _C.MoeSharing(blocks=blocks, parts=0, tickets=0), None
    parts = torch.empty(2 * blocks, part, dtype=torch.float32, device=device)
    counters = tickets(device, min(most_tiles, unshared))
    return _C.MoeSharing(blocks=blocks, parts=parts.data_ptr(), tickets=counters.data_ptr()), parts


def _steps(linear: Linear) -> int:
    """128-byte stages along K."""
    return _ceil_div(linear.weight.shape[-1] * linear.weight.element_size(), 128)


def _why_not_weights(weights: MoEWeights) -> str:
    if len(weights.router) > _C.MAX_MOE_EXPERTS:
        return f"there are {len(weights.router)} experts, more than {_C.MAX_MOE_EXPERTS}"
    for name in ("w13", "w2", "shared_w13", "shared_w2"):
        weight = getattr(weights, name).weight
        if weight.dtype == torch.float32:
            return f"weights.{name} is float32: the tensor cores take bfloat16 or fp8"
        row_bytes = weight.shape[-1] * weight.element_size()
        if row_bytes == 0 or row_bytes % ROW_ALIGNMENT:
            return f"a row of weights.{name} has {row_bytes} bytes, not a multiple of {ROW_ALIGNMENT}"
        if reason := _why_not_aligned({f"weights.{name}": weight}):
            return reason
    return ""


def _why_not_aligned(tensors: dict[str, Tensor]) -> str:
    for name, tensor in tensors.items():
        if tensor.data_ptr() % ROW_ALIGNMENT:
            return f"{name} does not begin at a multiple of {ROW_ALIGNMENT} bytes"
    return ""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
