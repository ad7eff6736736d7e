"""Random weights in every form that checkpoints have, and their values in float64, by formulas of their own; and routings."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops import Linear, MoEWeights, Quantized, Routing

FP8 = torch.float8_e4m3fn
FORMS = ("bf16", "fp32", "tensor", "tensor static", "channel", "block")
# Of routed and shared weights, which a checkpoint may hold in different forms
PAIRS = [(form, form) for form in FORMS] + [("channel", "bf16"), ("tensor static", "bf16"), ("bf16", "channel"), ("block", "channel")]


def linear(form: str, *shape: int) -> Linear:
    """A random weight [.., N, K] of about unit variance over sqrt(K)."""
    *stack, n, k = shape
    weight = torch.randn(shape) / k**0.5
    if form in ("bf16", "fp32"):
        return Linear(weight.to(torch.bfloat16 if form == "bf16" else torch.float32))
    scale_shape = {"channel": (*stack, n), "block": (*stack, -(-n // 128), -(-k // 128))}.get(form, stack)
    scale = 0.005 * (0.5 + torch.rand(scale_shape))
    codes = (weight / spread(scale, *shape)).clamp(-448, 448).to(FP8)
    return Linear(codes, scale, torch.tensor(0.02) if form == "tensor static" else None)


def moe_weights(routed: str, shared: str, *, experts: int, hidden: int, inner: int, shared_inner: int | None = None) -> MoEWeights:
    other = inner if shared_inner is None else shared_inner
    return MoEWeights(
        torch.randn(experts, hidden).to(torch.float32 if routed == "fp32" else torch.bfloat16),
        linear(routed, experts, 2 * inner, hidden),
        linear(routed, experts, hidden, inner),
        linear(shared, 2 * other, hidden),
        linear(shared, hidden, other),
    )


def routing_of(expert_ids: list[int] | Tensor, experts: int) -> Routing:
    """The routing of tokens to these experts, with random scores."""
    ids = torch.as_tensor(expert_ids, dtype=torch.int32)
    offsets = torch.nn.functional.pad(torch.bincount(ids, minlength=experts).cumsum(0), (1, 0))
    return Routing(ids, 0.1 + 0.9 * torch.rand(len(ids)), ids.argsort(stable=True).int(), offsets.int())


def random_routing(tokens: int, experts: int, on_one: bool = False) -> Routing:
    """Experts drawn at random, or all tokens on the last expert but one."""
    return routing_of(torch.full((tokens,), max(experts - 2, 0)) if on_one else torch.randint(0, experts, (tokens,)), experts)


def spread(scale: Tensor, *shape: int) -> Tensor:
    """A weight's scale, one for every element."""
    *stack, n, k = shape
    if scale.dim() == len(shape):
        return scale[..., torch.arange(n)[:, None] // 128, torch.arange(k) // 128]
    return scale.reshape(*stack, -1, 1).expand(shape)


def value(weight: Linear) -> Tensor:
    if weight.scale is None:
        return weight.weight.double()
    return weight.weight.double() * spread(weight.scale, *weight.weight.shape).double()


def activation_value(x: Tensor | Quantized) -> Tensor:
    if isinstance(x, Tensor):
        return x.double()
    scale = x.scale
    if scale.dim() == 2:
        scale = scale[:, torch.arange(x.codes.shape[1]) // 128]
    elif scale.dim() == 1:
        scale = scale[:, None]
    return x.codes.double() * scale.double()


def e4m3(x: Tensor) -> Tensor:
    """float32 numbers rounded to the nearest e4m3 number, the even one of two, at most ±448; from the table of all of them."""
    table = torch.arange(127, dtype=torch.uint8).view(FP8).double()  # 0 to 448
    magnitude = x.double().abs().clamp(max=448)
    above = torch.searchsorted(table, magnitude.contiguous()).clamp(max=126)
    below = (above - 1).clamp(min=0)
    to_above, to_below = table[above] - magnitude, magnitude - table[below]
    index = torch.where(to_below < to_above, below, above)
    index = torch.where((to_below == to_above) & (above != below), below + below % 2, index)
    return table[index] * x.double().sign()


def quantized_value(x: Tensor, form: str, input_scale: Tensor | None = None) -> Tensor:
    """What x stands for once quantised for a weight of that form."""
    x = x.float()
    if input_scale is not None:
        scale = input_scale.expand(x.shape)
    elif form == "block":
        blocks = [block.abs().amax(1, keepdim=True).expand_as(block) / 448 for block in x.split(128, 1)]
        scale = torch.cat(blocks, 1)
    elif form in ("bf16", "fp32"):
        return x.double()
    else:
        scale = (x.abs().amax(1, keepdim=True) / 448).expand_as(x)
    return e4m3(torch.where(scale == 0, 0.0, x / scale)) * scale.double()
