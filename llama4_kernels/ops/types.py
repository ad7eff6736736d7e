"""The four records that the ops take and give. The tensors of one are contiguous and on one device. A record is equal to itself alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Quantized:
    """FP8 activations or weights: the rows of a matrix as codes with scales. Both tensors are contiguous.

    codes: float8_e4m3fn, the shape [T, K] of the source.
    scale: float32, at least 0; value = codes * scale. [] per tensor, [T] per token (row), or [T, ceil(K / 128)] per 128 columns
        of a row. NaN or infinite where the row is: it reaches no other.
    """

    codes: Tensor
    scale: Tensor


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
