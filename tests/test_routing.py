"""route_top1 against exact integer logits, numpy's stable sort, and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router

from backends import assert_passes_opcheck, assert_replays, assert_same_bits, compute, device_of
from llama4_kernels import ops
from weights import activation_value, quantized_value

DTYPES = [torch.bfloat16, torch.float32]


def assert_routing(routing: ops.Routing, logits: np.ndarray) -> None:
    """`routing` is that of exact logits [T, E]."""
    tokens, experts = logits.shape
    ids = logits.argmax(1) if tokens else np.zeros(0, dtype=int)
    assert routing.expert_ids.tolist() == ids.tolist()
    assert routing.order.tolist() == np.argsort(ids, kind="stable").tolist()
    assert routing.offsets.tolist() == [0, *np.cumsum(np.bincount(ids, minlength=experts))]
    scores = 1 / (1 + np.exp(-logits[np.arange(tokens), ids]))
    torch.testing.assert_close(routing.scores, torch.tensor(scores, dtype=torch.float32), rtol=1e-6, atol=0)
    assert {routing.expert_ids.dtype, routing.order.dtype, routing.offsets.dtype} == {torch.int32}


@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33, 65, 130]),
    experts=st.sampled_from([1, 3, 16, 128]),
    hidden=st.sampled_from([1, 17, 128, 200]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_integer_logits_with_ties(backend, tokens, experts, hidden, dtype, seed):
    rng = np.random.default_rng(seed)
    x, router = rng.integers(-1, 2, (tokens, hidden)), rng.integers(-1, 2, (experts, hidden))
    routing, quantized = compute(backend, "route_top1", torch.tensor(x).to(dtype), torch.tensor(router).to(dtype))
    assert_routing(routing, (x @ router.T).astype(float))
    assert quantized is None


def test_equal_experts_go_to_the_lowest_index(backend):
    x = torch.randint(-3, 4, (40, 64)).float()
    x[:, 0] = 50  # the sum of these is what every expert but 0 and 3 gets
    router = torch.ones(16, 64)
    router[[0, 3]] = -1
    routing, _ = compute(backend, "route_top1", x, router)
    assert routing.expert_ids.tolist() == [1 if row.sum() > 0 else 0 for row in x]
    assert (x.sum(1) > 0).any()


def test_all_tokens_on_one_expert(backend):
    router = -torch.ones(128, 32)
    router[77] = 1
    routing, _ = compute(backend, "route_top1", torch.ones(70, 32), router)
    assert_routing(routing, np.where(np.arange(128) == 77, 32.0, -32.0)[None].repeat(70, 0))


def test_logits_are_not_rounded_to_bfloat16(backend):
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    router = torch.tensor([[1.0, 0.0], [1.0, 2**-12]], dtype=torch.bfloat16)
    routing, _ = compute(backend, "route_top1", x, router)
    assert routing.expert_ids.tolist() == [1]


def test_a_row_of_nan_touches_no_other_row(backend):
    x, router = torch.randn(9, 64), torch.randn(16, 64)
    spoilt = x.clone()
    spoilt[[2, 8]] = float("nan")
    clean, routing = compute(backend, "route_top1", x, router)[0], compute(backend, "route_top1", spoilt, router)[0]
    others = [0, 1, 3, 4, 5, 6, 7]
    assert_same_bits([routing.scores[others], routing.expert_ids[others]], [clean.scores[others], clean.expert_ids[others]])
    assert routing.scores[[2, 8]].isnan().all() and 0 <= routing.expert_ids.min() and routing.expert_ids.max() < 16
    assert sorted(routing.order.tolist()) == list(range(9)) and int(routing.offsets[-1]) == 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_gives_codes_per_token(backend, dtype):
    x = torch.randn(5, 96).to(dtype)
    _, quantized = compute(backend, "route_top1", x, torch.randn(16, 96), quantize=True)
    torch.testing.assert_close(activation_value(quantized), quantized_value(x, "channel"), rtol=1e-6, atol=0)


def test_follows_transformers(backend):
    config = Llama4TextConfig(hidden_size=64, num_local_experts=16, num_experts_per_tok=1)
    router = Llama4Router(config)
    x = torch.randn(50, 64)
    with torch.no_grad():
        scores, _ = router(x)
    routing, _ = compute(backend, "route_top1", x, router.weight.detach())
    best, ids = scores.max(1)
    assert routing.expert_ids.tolist() == ids.tolist()
    torch.testing.assert_close(routing.scores, best, rtol=1e-5, atol=0)


@pytest.mark.small
@pytest.mark.parametrize(("tokens", "experts", "dtype"), [(130, 128, torch.float32), (9, 16, torch.bfloat16), (70, 128, torch.bfloat16)])
def test_gives_the_same_bits_twice(backend, tokens, experts, dtype):
    x, router = torch.randn(tokens, 200).to(dtype), torch.randn(experts, 200).to(dtype)
    runs = [compute(backend, "route_top1", x, router, quantize=True) for _ in range(2)]
    assert_same_bits(*runs)


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_replays_in_a_cuda_graph(graph_backend, tokens):
    tokens, hidden = (tokens, 512) if device_of(graph_backend).type == "cuda" else (min(tokens, 130), 40)
    given, others = (((torch.randn(tokens, hidden).bfloat16(), torch.randn(128, hidden).bfloat16()), {"quantize": True}) for _ in range(2))
    assert_replays(graph_backend, "route_top1", given, others)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "experts"), [(1, 16), (9, 16), (64, 16), (1, 128), (9, 128), (64, 128), (65, 128)])
def test_gives_the_same_bits_many_times_at_llama4s_width(gpu_backend, tokens, experts):
    """What blocks send one another may come in any order."""
    rng = np.random.default_rng(tokens)
    x, router = rng.integers(-1, 2, (tokens, 5120)), rng.integers(-1, 2, (experts, 5120))
    arguments = [torch.tensor(each).bfloat16() for each in (x, router)]
    first = compute(gpu_backend, "route_top1", *arguments, quantize=True)
    assert_routing(first[0], (x @ router.T).astype(float))
    torch.testing.assert_close(activation_value(first[1]), quantized_value(arguments[0], "channel"), rtol=1e-6, atol=0)
    for _ in range(50):
        assert_same_bits(compute(gpu_backend, "route_top1", *arguments, quantize=True), first)


@pytest.mark.parametrize("quantize", [False, True])
def test_opcheck(backend, quantize):
    assert_passes_opcheck(backend, "route_top1", torch.randn(7, 48), torch.randn(4, 48), quantize=quantize)


@pytest.mark.parametrize(
    ("x", "router", "error", "message"),
    [
        (torch.ones(2, 8, dtype=torch.float16), torch.ones(4, 8), TypeError, "x has dtype float16, needs bfloat16 or float32"),
        (torch.ones(8), torch.ones(4, 8), ValueError, r"x has shape \[8\], needs \[T, H\]"),
        (torch.ones(8, 2).t(), torch.ones(4, 8), ValueError, r"x has strides \[1, 2\] for shape \[2, 8\], needs to be contiguous"),
        ("x", torch.ones(4, 8), TypeError, r"x is str, needs a Tensor \[T, H\]"),
        (torch.ones(2, 8), torch.ones(4, 9), ValueError, r"router has shape \[4, 9\], needs \[E, 8\]"),
        (torch.ones(2, 8), torch.ones(4, 8).int(), TypeError, "router has dtype int32, needs bfloat16 or float32"),
        (torch.ones(2, 8), torch.ones(4, 8, device="meta"), ValueError, "router is on meta, needs cpu"),
        (torch.ones(2, 8), torch.ones(0, 8), ValueError, r"router has shape \[0, 8\], needs at least one expert"),
    ],
)
def test_bad_input_is_named(x, router, error, message):
    with pytest.raises(error, match=f"^route_top1: {message}"):
        ops.route_top1(x, router)


def test_quantize_is_true_or_false():
    assert ops.route_top1(torch.ones(2, 8), torch.ones(4, 8))[1] is None
    with pytest.raises(TypeError, match="^route_top1: quantize is 'yes', needs True or False"):
        ops.route_top1(torch.ones(2, 8), torch.ones(4, 8), quantize="yes")
