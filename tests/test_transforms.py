"""What docs/ops.md promises of torch's transforms: torch.compile takes every op whole, with dynamic shapes too;
on meta tensors an op gives its result's shapes and dtypes; vmap calls some ops in a loop, and refuses the others; a backward pass through
one is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import backends
from backends import Call, assert_same_bits, call, device_of, tensors, to, where_it_computes
from llama4_kernels import ops
from llama4_kernels.bench.inputs import mapped
from llama4_kernels.ops.backend import OPS
from weights import linear, moe_weights, random_routing

BF16 = torch.bfloat16
ON_BACKENDS = [(op, backend) for op, stem in OPS.items() for backend in backends.available(stem)]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(op: str, tokens: int) -> Call:
    """For each op some that every backend takes; the same weights and caches for any number of tokens."""
    torch.manual_seed(0)
    weights = moe_weights("channel", "bf16", experts=4, hidden=64, inner=32)
    product = linear("channel", 4, 32, 64)
    caches = torch.randn(2, 8, 16, 1, 64).to(BF16)
    x, routing = torch.randn(tokens, 64).to(BF16), random_routing(tokens, 4)
    hidden = torch.randn(tokens, 32).to(BF16)
    rope = dict(num_heads=2, num_kv_heads=1, head_dim=64, qk_norm_eps=1e-5, k_cache=caches[0].clone(), v_cache=caches[1].clone())
    paged = dict(page_table=torch.arange(8).int()[None], seq_lens=int32(tokens + 3), query_start_loc=int32(0, tokens), chunk_size=8)
    return {
        "quantize_per_token": ((x,), {}),
        "route_top1": ((x, weights.router), {"quantize": True}),
        "grouped_gemm": ((x, product, routing.offsets), {"rows": routing.order}),
        "moe_gate_up": ((x, routing, weights), {}),
        "moe_down": ((hidden, ops.Quantized(hidden.to(torch.float8_e4m3fn), torch.rand(tokens, 1)), routing, weights), {}),
        "fused_moe": ((x, weights), {}),
        "rope_qk_norm": ((torch.randn(tokens, 256).to(BF16), torch.arange(tokens)), rope | dict(slots=torch.randperm(128)[:tokens])),
        "chunked_attention": ((torch.randn(tokens, 5, 64).to(BF16), *caches), paged),
    }[op]


@contextlib.contextmanager
def compiled(op: str, backend: str, compiler: str):
    """The op in a graph of its own that is compiled whole, on copies of its arguments; what it returns and leaves of them is compared with
    a plain call. Counts the graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    graph = torch.compile(lambda given: call(op, given), fullgraph=True, backend=counter)

    def check(given: Call, tokens: int | None = None) -> None:
        plain, ours = (to(given, device_of(backend), copy=True) for _ in range(2))
        want = call(op, plain)
        for tensor in tensors(ours):
            if tensor.dim() and len(tensor) == tokens:
                torch._dynamo.mark_dynamic(tensor, 0)
        assert_same_bits([graph(ours), ours], [want, plain])

    with where_it_computes(backend):
        yield check, counter
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(("op", "backend"), ON_BACKENDS)
def test_compile_takes_an_op_whole(op, backend, compiler):
    with compiled(op, backend, compiler) as (check, counter):
        check(arguments(op, 5))
        assert counter.frame_count == 1


@pytest.mark.parametrize("op", ["fused_moe", "rope_qk_norm"])
def test_inductor_takes_an_op_whole(op):
    """One with lists of tensors, and one that writes to caches."""
    with compiled(op, "reference", "inductor") as (check, counter):
        check(arguments(op, 5))
        assert counter.frame_count == 1


@pytest.mark.parametrize(("op", "backend"), ON_BACKENDS)
def test_one_graph_serves_any_number_of_tokens(op, backend):
    with compiled(op, backend, "aot_eager") as (check, counter):
        for tokens in (7, 9, 70):
            check(arguments(op, tokens), tokens)
        assert counter.frame_count == 1


def shapes(result) -> list[tuple]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors(result)]


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_the_shapes_and_dtypes_of_a_result(op, tokens):
    given = arguments(op, tokens)
    meta = call(op, mapped(lambda tensor: tensor.to("meta"), given))
    assert all(tensor.is_meta for tensor in tensors(meta))
    assert shapes(meta) == shapes(call(op, given))


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_give_the_shapes_and_dtypes_of_a_result(op):
    given = arguments(op, 5)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = call(op, mapped(mode.from_tensor, given))
    assert shapes(fake) == shapes(call(op, given))


@pytest.mark.parametrize("op", OPS)
def test_vmap_loops_or_is_refused(op):
    (first, *others), options = arguments(op, 5)
    stacked = torch.stack([first, first.flip(0)])

    def of_one(x: Tensor) -> list[Tensor]:
        return tensors(call(op, ((x, *others), options)))

    if op not in ("quantize_per_token", "grouped_gemm", "chunked_attention"):
        with pytest.raises(RuntimeError, match=f"^Batching rule not implemented for llama4_kernels::{op}"):
            torch.vmap(of_one)(stacked)
        return
    assert_same_bits(torch.vmap(of_one)(stacked), [torch.stack(each) for each in zip(*map(of_one, stacked))])


@pytest.mark.parametrize("op", OPS)
def test_a_backward_pass_is_refused(op):
    (first, *others), options = arguments(op, 5)
    result = call(op, ((first.requires_grad_(), *others), options))
    differentiable = [tensor for tensor in tensors(result) if tensor.requires_grad and tensor.is_floating_point()]
    assert differentiable
    with pytest.raises(RuntimeError, match=f"backward through llama4_kernels.{op}"):
        differentiable[0].float().sum().backward()
