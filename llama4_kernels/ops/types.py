"""The four records that the ops take and give. The tensors of one are contiguous and on one device. A record is equal to itself alone.

With them stands what follows from their form alone, for ops and backends alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E4M3_CAPABILITY = (8, 9)  # the first compute capability where e4m3 is computed with by another backend than the reference
SCALE_BLOCK = 128  # columns of a row, and rows and columns of a weight, that share a scale where there is one per block


@dataclass(frozen=True, eq=False)
class Quantized:
    """FP8 activations or weights: the rows of a matrix as codes with scales. Both tensors are contiguous.

    codes: float8_e4m3fn, the shape [T, K] of the source.
    scale: float32, at least 0; value = codes * scale. [] per tensor, [T] per token (row), or [T, ceil(K / 128)] per 128 columns
        of a row. NaN or infinite where the row is: it reaches no other.
    """

    codes: Tensor
    scale: Tensor

    @property
    def granularity(self) -> Literal["tensor", "row", "block"]:
        """What has one scale: the whole, a row, or a block of 128 columns of a row."""
        return ("tensor", "row", "block")[self.scale.dim()]


@dataclass(frozen=True, eq=False)
class Routing:
    """Top-1 expert of each of T tokens, and the tokens sorted by expert. All tensors are contiguous.

    expert_ids: [T] int32, argmax of the router logits, the lowest index on ties.
    scores: [T] float32, sigmoid of the winning logit.
    order: [T] int32, the token at each sorted position: by expert, then by token (stable).
    offsets: [E + 1] int32, expert e owns the sorted positions offsets[e] to offsets[e + 1].
    """

    expert_ids: Tensor
    scores: Tensor
    order: Tensor
    offsets: Tensor


@dataclass(frozen=True, eq=False)
class Linear:
    """A weight, or a stack of weights, K-major: y = x · weightᵀ. All tensors are contiguous; none gets a gradient.

    weight: [.., N, K] bfloat16, float32 or float8_e4m3fn.
    scale: float32, finite and at least 0, only with an fp8 weight: [..] per tensor, [.., N] per output channel, or
        [.., ceil(N / 128), ceil(K / 128)] per 128 × 128 block; value = weight * scale.
    input_scale: float32 [], finite and at least 0: static activation scale per tensor; 0 makes all codes 0. None where activations are
        quantised dynamically.
    """

    weight: Tensor
    scale: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def granularity(self) -> Literal["tensor", "channel", "block"] | None:
        """What has one scale: each whole weight, an output channel, or a block of 128 × 128; None where the weight is not fp8."""
        if self.scale is None:
            return None
        return ("tensor", "channel", "block")[self.scale.dim() + 2 - self.weight.dim()]

    @property
    def input_granularity(self) -> Literal["tensor", "row", "block"] | None:
        """The granularity with which activations are quantised for this weight: "tensor" with input_scale. None where they are not."""
        if self.scale is None:
            return None
        if self.input_scale is not None:
            return "tensor"
        return "block" if self.granularity == "block" else "row"


@dataclass(frozen=True, eq=False)
class MoEWeights:
    """One MoE layer's weights on this rank, contiguous. H hidden size, E experts, I expert intermediate size on this rank.

    router: [E, H] bfloat16 or float32.
    w13: routed experts, weight [E, 2I, H], gate rows first, then up rows.
    w2: routed experts, weight [E, H, I].
    shared_w13, shared_w2: the shared expert, weights [2I, H] and [H, I]; their dtype and I may differ from the routed ones'.
    """

    router: Tensor
    w13: Linear
    w2: Linear
    shared_w13: Linear
    shared_w2: Linear


def values_of(x: Tensor | Quantized) -> Tensor:
    """x, or its codes."""
    return x.codes if isinstance(x, Quantized) else x


def scale_of(x: Tensor | Quantized) -> Tensor | None:
    return x.scale if isinstance(x, Quantized) else None


def new_hidden(tokens: int, down: Linear, dtype: torch.dtype) -> Tensor | Quantized:
    """Room for the hidden activations between moe_gate_up and moe_down as the second weight `down` takes them; of `dtype` where it is not fp8."""
    width, device = down.weight.shape[-1], down.weight.device
    if down.scale is None:
        return torch.empty(tokens, width, dtype=dtype, device=device)
    codes = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=device)
    if down.input_scale is not None:
        return Quantized(codes, down.input_scale)
    return Quantized(codes, torch.empty(tokens, -(-width // SCALE_BLOCK), dtype=torch.float32, device=device))


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
