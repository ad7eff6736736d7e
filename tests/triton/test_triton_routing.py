"""The routing kernels against the reference; logits are small integers, so that ties are exact."""

import pytest
import torch
from cases import few_examples, generator, same_bits
from guards import Guarded
from hypothesis import given
from hypothesis import strategies as st

from llama4_kernels.counters import tickets
from llama4_kernels.reference.routing import route_top1 as reference
from llama4_kernels.triton.routing import ONE_LAUNCH_TOKENS, route_top1

pytestmark = pytest.mark.triton


def check(x, router, device, quantize=True):
    with Guarded() as guarded:
        got, codes = route_top1(guarded(x.to(device)), guarded(router.to(device)), quantize=quantize)
    expected, expected_codes = reference(x, router, quantize=quantize)
    assert torch.equal(got.expert_ids.cpu(), expected.expert_ids)
    torch.testing.assert_close(got.scores.cpu(), expected.scores, rtol=1e-5, atol=0)
    assert torch.equal(got.order.cpu(), expected.order)
    assert torch.equal(got.offsets.cpu(), expected.offsets)
    if quantize:
        assert same_bits(codes.scale, expected_codes.scale) and same_bits(codes.codes, expected_codes.codes)
    else:
        assert codes is None


def integers(*shape, seed):
    return torch.randint(-2, 3, shape, generator=generator(seed))


@given(
    st.sampled_from([0, 1, 2, 7, 9, ONE_LAUNCH_TOKENS, ONE_LAUNCH_TOKENS + 1, 130]),
    st.sampled_from([1, 3, 16, 17, 128, 256, 300]),
    st.integers(1, 70) | st.integers(250, 300),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.booleans(),
)
@few_examples
def test_any_shape(device, tokens, experts, hidden, dtype, router_dtype, quantize):
    check(integers(tokens, hidden, seed=1).to(dtype), integers(experts, hidden, seed=2).to(router_dtype), device, quantize)


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("experts", [16, 128, 256])
def test_ties_go_to_the_lowest_expert(device, tokens, experts):
    x, router = integers(tokens, 32, seed=3).bfloat16(), integers(experts, 32, seed=4).bfloat16()
    router[experts // 2 :] = router[: experts // 2]
    x[0] = 0
    check(x, router, device)


@pytest.mark.parametrize("tokens", [20, 70])
def test_all_tokens_on_one_expert(device, tokens):
    router = torch.zeros(128, 16).bfloat16()
    router[77] = 1
    check(torch.ones(tokens, 16).bfloat16(), router, device)


@pytest.mark.parametrize("tokens", [9, 70])
@pytest.mark.parametrize("experts", [16, 256])
def test_a_row_of_nan_stays_alone(device, tokens, experts):
    x, router = integers(tokens, 40, seed=5).bfloat16(), integers(experts, 40, seed=6).bfloat16()
    clean, clean_codes = reference(x, router, quantize=True)
    x[3, 7] = torch.nan
    got, codes = route_top1(x.to(device), router.to(device), quantize=True)
    others = torch.arange(tokens) != 3
    assert 0 <= int(got.expert_ids[3]) < experts and got.scores[3].isnan() and codes.scale[3].isnan()
    assert torch.equal(got.expert_ids.cpu()[others], clean.expert_ids[others])
    assert same_bits(codes.codes.cpu()[others], clean_codes.codes[others])
    assert torch.equal(got.order.cpu(), got.expert_ids.cpu().argsort(stable=True).int())


@pytest.mark.parametrize("expert", [3, 130, 299])
def test_a_logit_of_nan_beats_those_of_other_slices(device, expert):
    """An infinity in the router is NaN for a token that has 0 there."""
    x, router = torch.zeros(70, 16).bfloat16(), torch.zeros(300, 16).bfloat16()
    router[expert] = torch.inf
    got, _ = route_top1(x.to(device), router.to(device))
    assert got.scores.isnan().all() and 0 <= int(got.expert_ids.min()) <= int(got.expert_ids.max()) < 300


def test_the_ticket_counter_is_left_at_zero(device):
    route_top1(torch.ones(33, 16, device=device), torch.eye(16, device=device))
    assert not tickets(device, 1).any()
