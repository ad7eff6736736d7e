"""The MoE ops at the shapes of Scout and Maverick, one rank of TP 1, 2, 4 and 8, in every weight form that a checkpoint has."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from llama4_kernels.ops.types import Linear, MoEWeights
from llama4_kernels.triton.grouped_gemm import grouped_gemm
from llama4_kernels.triton.moe import fused_moe

HIDDEN, INTERMEDIATE = 5120, 8192
EXPERTS = {"scout": 16, "maverick": 128}
TENSOR_PARALLEL = (1, 2, 4, 8)
TOKENS = (1, 16, 64, 256, 1024, 8192)
FORMS = ("bf16", "tensor static", "channel", "block")

WGMMA = {"_grouped_gemm", "_gate_up_kernel", "_down_kernel"}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(*shape: int, form: str) -> Linear:
    *stack, n, k = shape
    if form == "bf16":
        return Linear(empty(*shape, dtype=torch.bfloat16))
    scale = {"tensor static": stack, "channel": (*stack, n), "block": (*stack, -(-n // 128), -(-k // 128))}[form]
    static = empty() if form == "tensor static" else None
    return Linear(empty(*shape, dtype=torch.float8_e4m3fn), empty(*scale), static)


def layer(experts: int, intermediate: int, form: str, shared_form: str) -> MoEWeights:
    return MoEWeights(
        empty(experts, HIDDEN, dtype=torch.bfloat16),
        linear(experts, 2 * intermediate, HIDDEN, form=form),
        linear(experts, HIDDEN, intermediate, form=form),
        linear(2 * intermediate, HIDDEN, form=shared_form),
        linear(HIDDEN, intermediate, form=shared_form),
    )


def calls(architecture: str) -> Iterator[Callable[[], object]]:
    forms = FORMS if architecture == "sm_90" else FORMS[:1]
    for experts, ranks, tokens, form in itertools.product(EXPERTS.values(), TENSOR_PARALLEL, TOKENS, forms):
        x = empty(tokens, HIDDEN, dtype=torch.bfloat16)
        offsets, rows = empty(experts + 1, dtype=torch.int32), empty(tokens, dtype=torch.int32)
        for shared_form in {form, "bf16"}:
            weights = layer(experts, INTERMEDIATE // ranks, form, shared_form)
            yield functools.partial(fused_moe, x, weights)
        yield functools.partial(grouped_gemm, x, weights.w13, offsets, rows=rows)
