"""Top-1 routing in CUDA: csrc/routing.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.counters import tickets
from llama4_kernels.cuda import _C, launch
from llama4_kernels.ops.types import Quantized, Routing


def route_top1(x: Tensor, router: Tensor, *, quantize: bool = False, dependent: bool = False) -> tuple[Routing, Quantized | None]:
    """dependent: programmatic dependent launch, for a caller who launches what follows in the same way."""
    (tokens, hidden), experts, device = x.shape, len(router), x.device
    expert_ids, order = (torch.empty(tokens, dtype=torch.int32, device=device) for _ in range(2))
    scores = torch.empty(tokens, dtype=torch.float32, device=device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    codes = scale = best = None
    if quantize:
        codes = torch.empty(tokens, hidden, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty(tokens, dtype=torch.float32, device=device)
    if tokens <= _C.ROUTE_FEW_TOKENS:
        best = torch.empty(tokens, _C.route_slices(experts), dtype=torch.int64, device=device)
    _C.route_top1(
        x=x.data_ptr(),
        x_dtype=launch.DTYPES[x.dtype],
        router=router.data_ptr(),
        router_dtype=launch.DTYPES[router.dtype],
        tokens=tokens,
        hidden=hidden,
        experts=experts,
        expert_ids=expert_ids.data_ptr(),
        scores=scores.data_ptr(),
        order=order.data_ptr(),
        offsets=offsets.data_ptr(),
        codes=launch.address(codes),
        scale=launch.address(scale),
        best=launch.address(best),
        tickets=tickets(device, 1).data_ptr(),
        dependent=dependent,
        stream=launch.stream(),
    )
    return Routing(expert_ids, scores, order, offsets), Quantized(codes, scale) if quantize else None


def why_not_route_top1(x: Tensor, router: Tensor, **_kwargs) -> str:
    if len(router) > _C.ROUTE_MAX_EXPERTS:
        return f"router has {len(router)} experts, more than {_C.ROUTE_MAX_EXPERTS}"
    if x.shape[1] == 0 or x.shape[1] > _C.ROUTE_MAX_HIDDEN:
        return f"x has {x.shape[1]} columns, not 1 to {_C.ROUTE_MAX_HIDDEN}"
    return ""
