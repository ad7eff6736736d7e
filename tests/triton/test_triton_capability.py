"""What Triton refuses: e4m3 before compute capability 8.9, which goes to another backend while all else stays, and heads too wide."""

import importlib

import pytest
import torch

from llama4_kernels import ops
from llama4_kernels.ops.backend import OPS
from llama4_kernels.triton import attention, config

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def linear(*shape: int, fp8: bool) -> ops.Linear:
    return ops.Linear(torch.zeros(shape).to(E4M3), torch.ones(shape[:-1])) if fp8 else ops.Linear(torch.zeros(shape, dtype=BF16))


def arguments(op: str, fp8: bool) -> tuple[tuple, dict]:
    """Of a call that needs e4m3, or of one that does not."""
    x, router = torch.zeros(3, 32, dtype=BF16), torch.zeros(2, 32, dtype=BF16)
    experts = linear(2, 64, 32, fp8=False), linear(2, 32, 32, fp8=fp8), linear(64, 32, fp8=False), linear(32, 32, fp8=False)
    weights, routing = ops.MoEWeights(router, *experts), ops.Routing(*(torch.zeros(3, dtype=torch.int32),) * 4)
    cache = torch.zeros(4, 1, 1, 64).to(E4M3 if fp8 else BF16)
    return {
        "quantize_per_token": ((x,), {}),
        "route_top1": ((x, router), {"quantize": fp8}),
        "grouped_gemm": ((x, linear(2, 64, 32, fp8=fp8), torch.zeros(3, dtype=torch.int32)), {"out_dtype": BF16}),
        "moe_gate_up": ((x, routing, weights), {}),
        "moe_down": ((x, x, routing, weights), {"out_dtype": BF16}),
        "fused_moe": ((x, weights), {}),
        "rope_qk_norm": ((x, torch.zeros(3)), {"k_cache": cache, "v_cache": cache}),
        "chunked_attention": ((torch.zeros(3, 1, 64, dtype=BF16), cache, cache), {"seq_lens": torch.zeros(3)}),
    }[op]


def refusal(op: str, fp8: bool) -> str:
    args, kwargs = arguments(op, fp8)
    module = importlib.import_module(f"llama4_kernels.triton.{OPS[op]}")
    return getattr(module, f"why_not_{op}")(*args, **kwargs)


@pytest.mark.parametrize("op", OPS)
def test_only_e4m3_is_refused_before_8_9(monkeypatch, op):
    assert refusal(op, fp8=True) == ""
    monkeypatch.setattr(config, "capability", lambda device: (8, 0))
    assert refusal(op, fp8=True) == "cpu has compute capability 8.0: Triton converts e4m3 from 8.9 on"
    assert op == "quantize_per_token" or refusal(op, fp8=False) == ""


@pytest.mark.parametrize("head_dim, refused", [(512, ""), (576, "heads have 576 dimensions, more than 512")])
def test_heads_whose_smallest_tiles_do_not_fit_are_refused(head_dim, refused):
    q, cache = torch.zeros(3, 1, head_dim, dtype=BF16), torch.zeros(4, 1, 1, head_dim, dtype=BF16)
    assert attention.why_not_chunked_attention(q, cache, cache) == refused
