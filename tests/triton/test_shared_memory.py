"""No launch asks for more shared memory than the GPU has: the calls that come nearest to it, of any shape and dtype that the ops take."""

import functools

import pytest
import torch
from shipped_attention import attention
from shipped_moe import empty, linear

from llama4_kernels.ops.types import MoEWeights
from llama4_kernels.triton import offline
from llama4_kernels.triton.grouped_gemm import grouped_gemm
from llama4_kernels.triton.moe import fused_moe
from llama4_kernels.triton.routing import route_top1

pytestmark = pytest.mark.compile

BF16, FP32 = torch.bfloat16, torch.float32
DEVICES = {"sm_80": (80, 163), "sm_89": (89, 99), "sm_90": (90, 227)}


def routing(tokens: int, experts: int, dtype: torch.dtype, router_dtype: torch.dtype):
    return functools.partial(route_top1, empty(tokens, 5120, dtype=dtype), empty(experts, 5120, dtype=router_dtype))


def moe(tokens: int, experts: int, form: str, shared_form: str):
    """fp32 activations, with which a step along K has rows of two widths."""
    weights = [linear(experts, 256, 5120, form=form), linear(experts, 5120, 128, form=form)]
    shared = [linear(256, 5120, form=shared_form), linear(5120, 128, form=shared_form)]
    return functools.partial(fused_moe, empty(tokens, 5120), MoEWeights(empty(experts, 5120, dtype=BF16), *weights, *shared))


def product(tokens: int, form: str):
    return functools.partial(grouped_gemm, empty(tokens, 5120), linear(16, 1024, 5120, form=form), empty(17, dtype=torch.int32))


def calls(has_fp8: bool):
    yield from (routing(tokens, 512, FP32, FP32) for tokens in (64, 65))
    yield from (routing(65, 512, BF16, router_dtype) for router_dtype in (BF16, FP32))
    forms = ("bf16", "channel") if has_fp8 else ("bf16",)
    for form in forms:
        yield from (product(tokens, form) for tokens in (64, 8192))
        yield from (moe(tokens, 16, form, "bf16") for tokens in (64, 8192))
    yield from (functools.partial(attention, *batch, 1, BF16, "pages", 64, False, head_dim=512) for batch in ((1, 8192), (8, 64), (64, 64)))


@pytest.mark.parametrize("device", DEVICES)
def test_every_launch_fits(device, monkeypatch):
    architecture, kib = DEVICES[device]
    monkeypatch.setitem(offline.ARCHITECTURES, device, architecture)
    monkeypatch.setitem(offline.SHARED_KIB, device, kib)
    measured = offline.measure(offline.recorded(calls(architecture >= 89), device), device)
    assert measured and {name: kernel["shared_bytes"] for name, kernel in measured.items() if kernel["shared_bytes"] > kib * 1024} == {}
