"""Weights, activations and routings for the MoE kernels' tests, small and random, in every form a checkpoint may have."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from llama4_kernels.ops.types import Linear, MoEWeights, Quantized, Routing
from llama4_kernels.reference.quantization import dequantize

FORMS = ("bfloat16", "float32", "per tensor", "static", "per channel", "per block")
# Routed and shared weights, which a checkpoint may hold in different forms
PAIRS = [(form, form) for form in FORMS] + [("per channel", "bfloat16"), ("static", "bfloat16"), ("per block", "per channel")]
few_examples = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(*shape: int, form: str, seed: int = 0) -> Linear:
    """Random weights of about 1 / sqrt(K) each."""
    *stack, n, k = shape
    random = generator(seed)
    weight = torch.randn(shape, generator=random) * k**-0.5
    if form in ("bfloat16", "float32"):
        return Linear(weight.to(getattr(torch, form)))
    sizes = {"per channel": (*stack, n), "per block": (*stack, -(-n // 128), -(-k // 128))}.get(form, stack)
    scale = (0.5 + torch.rand(sizes, generator=random)) * 0.01 * k**-0.5
    codes = (weight * k**0.5 / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Linear(codes, scale, torch.tensor(0.02) if form == "static" else None)


def layer(experts: int, hidden: int, width: int, form: str, shared_form: str) -> MoEWeights:
    return MoEWeights(
        torch.randn(experts, hidden, generator=generator(9)).bfloat16(),
        linear(experts, 2 * width, hidden, form=form, seed=1),
        linear(experts, hidden, width, form=form, seed=2),
        linear(2 * width, hidden, form=shared_form, seed=3),
        linear(hidden, width, form=shared_form, seed=4),
    )


def expert_lists(experts: int, most: int) -> st.SearchStrategy[list[int]]:
    """Experts of up to `most` tokens: any, or all the same."""
    expert = st.integers(0, experts - 1)
    return st.lists(expert, max_size=most) | st.tuples(expert, st.integers(1, most)).map(lambda pair: [pair[0]] * pair[1])


def routing_of(expert_ids: list[int], experts: int) -> Routing:
    ids = torch.tensor(expert_ids, dtype=torch.int32)
    sizes = torch.bincount(ids.long(), minlength=experts)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    return Routing(ids, torch.rand(len(ids), generator=generator(5)), ids.argsort(stable=True).int(), offsets)


def mapped(function, record):
    """`record` with `function` applied to every tensor in it."""
    if isinstance(record, Tensor):
        return function(record)
    if dataclasses.is_dataclass(record):
        fields = {field.name: mapped(function, getattr(record, field.name)) for field in dataclasses.fields(record)}
        return dataclasses.replace(record, **fields)
    return record


def relative_error(got: Tensor | Quantized, expected: Tensor | Quantized) -> float:
    got, expected = dequantize(got).double().cpu(), dequantize(expected).double().cpu()
    return float((got - expected).norm() / expected.norm()) if expected.numel() else 0.0


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Equal elements, all NaNs being alike."""
    return torch.equal(got.cpu().float().nan_to_num(nan=1e30), expected.cpu().float().nan_to_num(nan=1e30))
