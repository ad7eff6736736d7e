"""Top-1 routing."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops.types import Quantized, Routing
from llama4_kernels.reference.quantization import quantize_per_token


def route_top1(x: Tensor, router: Tensor, *, quantize: bool = False) -> tuple[Routing, Quantized | None]:
    logits = x.float() @ router.float().t()
    expert_ids = logits.argmax(-1)  # the first of equal maxima
    scores = logits.gather(1, expert_ids[:, None])[:, 0].sigmoid()
    order = expert_ids.argsort(stable=True)
    sizes = torch.bincount(expert_ids, minlength=len(router))
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    routing = Routing(expert_ids.int(), scores, order.int(), offsets.int())
    return routing, quantize_per_token(x) if quantize else None
