"""The MoE ops at the shapes of Scout and Maverick, one rank of TP 1, 2, 4 and 8, in every weight form that a checkpoint has."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from llama4_kernels.ops.types import Linear
from llama4_kernels.triton.grouped_gemm import grouped_gemm

HIDDEN, INTERMEDIATE = 5120, 8192
EXPERTS = {"scout": 16, "maverick": 128}
TENSOR_PARALLEL = (1, 2, 4, 8)
TOKENS = (1, 16, 64, 256, 1024, 8192)
FORMS = ("bfloat16", "per tensor", "per channel", "per block")

WGMMA = {"_grouped_gemm"}
TMA: set[str] = set()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(*shape: int, form: str) -> Linear:
    *stack, n, k = shape
    if form == "bfloat16":
        return Linear(empty(*shape, dtype=torch.bfloat16))
    scale = {"per tensor": stack, "per channel": (*stack, n), "per block": (*stack, -(-n // 128), -(-k // 128))}[form]
    static = empty() if form == "per tensor" else None
    return Linear(empty(*shape, dtype=torch.float8_e4m3fn), empty(*scale), static)


def calls(architecture: str) -> Iterator[Callable[[], object]]:
    forms = FORMS if architecture == "sm_90" else FORMS[:1]
    for experts, ranks, tokens, form in itertools.product(EXPERTS.values(), TENSOR_PARALLEL, TOKENS, forms):
        offsets = empty(experts + 1, dtype=torch.int32)
        x = empty(tokens, HIDDEN, dtype=torch.bfloat16)
        w13 = linear(experts, 2 * INTERMEDIATE // ranks, HIDDEN, form=form)
        yield functools.partial(grouped_gemm, x, w13, offsets, rows=empty(tokens, dtype=torch.int32))
