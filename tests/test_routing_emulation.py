"""csrc/routing.cu itself, built for the host and called through llama4_kernels/cuda/routing.py, between guard bytes, against the reference."""

from __future__ import annotations

import emulation
import pytest
import torch
from guards import Guarded
from torch import Tensor

from backends import assert_same_bits
from llama4_kernels.reference import routing as reference

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

BF16, FP32 = torch.bfloat16, torch.float32
PLANTED = {  # the file, the text in it, the bug
    "ties to the highest index": ("routing_key.cuh", "(~0u - unsigned(expert))", "unsigned(expert)"),
    "a rank's sums left out": ("routing_fp32.cuh", "for (int from = 0; from < RANKS; ++from) logit +=", "for (int from = 1; from < RANKS; ++from) logit +="),
    "the cluster not waited for": ("routing_fp32.cuh", "            shared.largest[thread] = most;\n        }\n        hopper::cluster_sync();", "            shared.largest[thread] = most;\n        }"),
    "ticket not given back": ("routing_sort.cuh", "if (flag) *tickets = 0;", ""),
    "order not stable": ("routing_sort.cuh", "ids[token] == ids[thread] && token < thread", "ids[token] == ids[thread] && token > thread"),
    "many tokens' order not stable": ("routing_sort.cuh", "__popc(peers & ((1u << lane) - 1))", "__popc(peers >> lane >> 1)"),
    "all warps count in one place": ("routing_sort.cuh", "counts + warp * bins;", "counts;"),
    "equal experts of a warp counted once": ("routing_sort.cuh", "own[ids[i]] = place + __popc(peers);", "own[ids[i]] = place + 1;"),
    "the last expert left out": ("routing_fp32.cuh", "if (lane < EXPERTS && expert < a.experts)", "if (lane < EXPERTS && expert < a.experts - 1)"),
    "barrier left out": ("routing_fp32.cuh", "sum;\n        }\n#pragma unroll\n        for (int token = 0; token < TOKENS; ++token) {\n            const unsigned most", "sum;\n        }\n        if (lane) __syncthreads();\n#pragma unroll\n        for (int token = 0; token < TOKENS; ++token) {\n            const unsigned most"),
}  # fmt: skip


@pytest.fixture(scope="module")
def module():
    return emulation.op_module("routing", emulation.load(emulation.build()))


@pytest.fixture(scope="module")
def op(module):
    return module.route_top1


def run(op, x: Tensor, router: Tensor, **options):
    with Guarded() as guarded:
        return op(guarded(x), guarded(router), **options)


def integers(*shape: int, dtype=FP32) -> Tensor:
    """Numbers whose sums of products are exact, with many ties."""
    return torch.randint(-1, 2, shape).to(dtype)


def assert_like_reference(op, x: Tensor, router: Tensor) -> None:
    """For exact logits."""
    (got, codes), (want, want_codes) = run(op, x, router, quantize=True), reference.route_top1(x, router, quantize=True)
    assert_same_bits([got.expert_ids, got.order, got.offsets], [want.expert_ids, want.order, want.offsets])
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-6, atol=0)
    assert_same_bits([codes.codes, codes.scale], [want_codes.codes, want_codes.scale])
    alone, none = run(op, x, router)
    assert none is None
    assert_same_bits(alone, got)


@pytest.mark.parametrize("experts", [1, 16, 17, 128])
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 65])
def test_sizes(op, tokens, experts):
    assert_like_reference(op, integers(tokens, 160, dtype=BF16), integers(experts, 160, dtype=BF16))


def assert_sorted(op, x: Tensor, router: Tensor) -> None:
    (got, _), (want, _) = run(op, x, router), reference.route_top1(x, router)
    assert_same_bits([got.expert_ids, got.order, got.offsets], [want.expert_ids, want.order, want.offsets])


MANY = [(65, 16), (65, 200), (127, 1), (127, 128), (128, 16), (128, 200), (300, 1), (300, 16), (300, 128), (1000, 1), (1000, 16)]


@pytest.mark.parametrize(("tokens", "experts"), [*MANY, (1000, 200)])
def test_many_tokens_are_sorted(op, tokens, experts):
    assert_sorted(op, integers(tokens, 8), integers(experts, 8))


def test_counts_that_need_more_memory_than_the_rows(op):
    assert_sorted(op, integers(70, 1028), integers(256, 1028))


def test_many_tokens_are_sorted_alike_again(op):
    x, router = integers(300, 8), integers(16, 8)
    first, _ = run(op, x, router)
    for _ in range(3):
        assert_same_bits(run(op, x, router)[0], first)


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("hidden", [1, 17, 128, 1028, 5120])
def test_columns(op, hidden, dtypes):
    assert_like_reference(op, integers(3, hidden, dtype=dtypes[0]), integers(20, hidden, dtype=dtypes[1]))


def test_addresses_off_16_bytes(op):
    x, router = integers(2 * 64 + 1, dtype=BF16)[1:].view(2, 64), integers(16 * 64 + 1, dtype=BF16)[1:].view(16, 64)
    got, _ = op(x, router)
    assert_same_bits([got.expert_ids], [reference.route_top1(x, router)[0].expert_ids])


def test_all_experts_equal(op):
    x, router = torch.randn(9, 200), torch.randn(1, 200).expand(128, 200).contiguous()
    assert run(op, x, router)[0].expert_ids.tolist() == [0] * 9


def test_all_tokens_on_one_expert(op):
    router = -torch.ones(128, 32)
    router[77] = 1
    for tokens in (64, 65, 300):
        routing, _ = run(op, torch.ones(tokens, 32), router)
        assert routing.expert_ids.tolist() == [77] * tokens and routing.order.tolist() == list(range(tokens))


def test_random_logits(op):
    x, router = torch.randn(40, 320), torch.randn(48, 320)
    (got, codes), (want, want_codes) = run(op, x, router, quantize=True), reference.route_top1(x, router, quantize=True)
    assert_same_bits([got.expert_ids, got.order, got.offsets, codes.codes], [want.expert_ids, want.order, want.offsets, want_codes.codes])
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=0)
    assert_same_bits(run(op, x, router, quantize=True), (got, codes))


@pytest.mark.parametrize("tokens", [9, 70])
def test_a_row_of_nan_touches_no_other_row(op, tokens):
    x, router = torch.randn(tokens, 64), torch.randn(16, 64)
    spoilt = x.clone()
    spoilt[[2, 8], 5] = float("nan")
    (clean, clean_codes), (routing, codes) = run(op, x, router, quantize=True), run(op, spoilt, router, quantize=True)
    others = [row for row in range(tokens) if row not in (2, 8)]
    for got, want in ((routing.scores, clean.scores), (routing.expert_ids, clean.expert_ids), (codes.codes, clean_codes.codes)):
        assert_same_bits(got[others], want[others])
    assert routing.scores[[2, 8]].isnan().all() and codes.scale[[2, 8]].isnan().all()
    assert 0 <= routing.expert_ids.min() and routing.expert_ids.max() < 16
    assert sorted(routing.order.tolist()) == list(range(tokens)) and int(routing.offsets[-1]) == tokens


def op_with(path: str, text: str, bug: str):
    torch.manual_seed(0)
    return emulation.op_module("routing", emulation.load(emulation.build(planted={path: (text, bug)}))).route_top1


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_noticed(bug):
    op = op_with(*PLANTED[bug])
    with pytest.raises((AssertionError, RuntimeError)):
        for x in (torch.ones(7, 1100), integers(7, 1100), torch.zeros(7, 1100)):
            assert_like_reference(op, x, integers(20, 1100) / 16)
        assert_sorted(op, integers(300, 8), integers(16, 8))


@pytest.mark.parametrize(
    ("x", "router", "reason"),
    [
        (torch.ones(2, 8), torch.ones(257, 8), "router has 257 experts, more than 256"),
        (torch.ones(1, 49153), torch.ones(1, 49153), "x has 49153 columns, not 1 to 49152"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(module, x, router, reason):
    assert module.why_not_route_top1(x, router) == reason
