"""The MoE kernels against the reference: every pair of weight forms, any routing, odd sizes; launches counted."""

from unittest import mock

import pytest
import torch
from cases import few_examples, generator, same_bits
from guards import Guarded
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llama4_kernels.reference.moe as reference
from llama4_kernels.bench.inputs import mapped, relative_error
from llama4_kernels.bench.tune import CANDIDATES
from llama4_kernels.counters import tickets
from llama4_kernels.ops.types import MoEWeights, Quantized, Routing
from llama4_kernels.reference import quantization
from llama4_kernels.triton import config, moe
from weights import PAIRS, linear, moe_weights, routing_of

pytestmark = pytest.mark.triton

BOUND = 4e-3


def expert_lists(experts: int, most: int) -> st.SearchStrategy[list[int]]:
    """Experts of up to `most` tokens: any, or all the same."""
    expert = st.integers(0, experts - 1)
    return st.lists(expert, max_size=most) | st.tuples(expert, st.integers(1, most)).map(lambda pair: [pair[0]] * pair[1])


def hidden_error(got, expected):
    """Error of h beyond one e4m3 step: where fp32 sums round differently, single codes may differ by one."""
    if not isinstance(expected, Quantized):
        return relative_error(got, expected)
    differ = got.codes.cpu().float() != expected.codes.float()
    assert differ.float().mean() <= 0.01 if differ.numel() else True
    torch.testing.assert_close(got.scale.cpu(), expected.scale, rtol=1e-4, atol=0)
    return relative_error(Quantized(torch.where(differ, expected.codes.float(), got.codes.cpu().float()), expected.scale), expected)


def check_halves(device, x, routing, weights):
    """moe_gate_up, and moe_down on what the reference makes of x, with guard bytes around everything, each twice."""
    dtype = x.dtype if isinstance(x, torch.Tensor) else torch.bfloat16
    hidden = reference.moe_gate_up(x, routing, weights)
    out = reference.moe_down(*hidden, routing, weights, out_dtype=torch.float32)
    with Guarded() as guarded:
        inside = [mapped(lambda tensor: guarded(tensor.to(device)), argument) for argument in (x, routing, weights, *hidden)]
        got = moe.moe_gate_up(*inside[:3])
        again = moe.moe_gate_up(*inside[:3])
        got_out = moe.moe_down(*inside[3:], *inside[1:3], out_dtype=dtype)
        again_out = moe.moe_down(*inside[3:], *inside[1:3], out_dtype=dtype)
    for path, path_again, expected in zip(got, again, hidden):
        assert hidden_error(path, expected) <= BOUND
        assert same_bits(quantization.dequantize(path), quantization.dequantize(path_again))
    assert relative_error(got_out, out) <= BOUND
    assert same_bits(got_out, again_out)


@pytest.mark.parametrize("form, shared_form", PAIRS)
@given(expert_lists(experts=4, most=40), st.sampled_from([64, 136]), st.sampled_from([32, 130]))
@example(expert_ids=[], hidden=64, width=32)
@example(expert_ids=[2] * 37, hidden=136, width=130)
@settings(few_examples, max_examples=4)
def test_halves(form, shared_form, device, expert_ids, hidden, width):
    x = torch.randn(len(expert_ids), hidden, generator=generator(hidden)).bfloat16()
    check_halves(device, x, routing_of(expert_ids, 4), moe_weights(form, shared_form, experts=4, hidden=hidden, inner=width))


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits_of_k(device, splits):
    x = torch.randn(35, 200, generator=generator(1)).bfloat16()
    with config.trial("moe_gate_up", CANDIDATES["moe_gate_up"][0] | {"BLOCK_S": 16, "BLOCK_R": 32, "SPLITS": splits}) as trial:
        check_halves(device, x, routing_of([3, 0, 1, 1, 3] * 7, 4), moe_weights("bf16", "bf16", experts=4, hidden=200, inner=130))
    assert trial.tokens == 64 and not tickets(device, 1).any()


def test_128_experts_and_7_tokens(device):
    x = torch.randn(7, 64, generator=generator(2)).bfloat16()
    weights = moe_weights("channel", "channel", experts=128, hidden=64, inner=32)
    check_halves(device, x, routing_of([127, 0, 3, 64, 3, 126, 0], 128), weights)


@pytest.mark.parametrize("quantize", ["quantize_per_token", "quantize_per_block"])
def test_quantised_input(device, quantize):
    x = getattr(quantization, quantize)(torch.randn(5, 200, generator=generator(3)))
    check_halves(device, x, routing_of([1, 0, 1, 1, 0], 2), moe_weights("channel", "block", experts=2, hidden=200, inner=64))


def test_experts_of_different_width(device):
    """The shared expert may be narrower or wider than a routed one."""
    weights = moe_weights("bf16", "bf16", experts=2, hidden=64, inner=96)
    wide = MoEWeights(weights.router, weights.w13, weights.w2, linear("channel", 2 * 160, 64), linear("channel", 64, 160))
    check_halves(device, torch.randn(5, 64, generator=generator(4)), routing_of([1, 0, 1, 1, 0], 2), wide)


@pytest.mark.parametrize("form, shared_form", PAIRS)
def test_fused(form, shared_form, device):
    weights = moe_weights(form, shared_form, experts=4, hidden=136, inner=130)
    x = torch.randn(19, 136, generator=generator(5)).bfloat16()
    with Guarded() as guarded:
        inside = mapped(lambda tensor: guarded(tensor.to(device)), weights)
        got = moe.fused_moe(guarded(x.to(device)), inside)
    # single codes of h may differ by one e4m3 step, 1/16 of the value, from the reference's: each weighs 1/sqrt(130) of an output
    assert relative_error(got, reference.fused_moe(x, weights)) <= BOUND


def test_a_token_of_nan_stays_alone(device):
    weights = moe_weights("channel", "bf16", experts=3, hidden=64, inner=64)
    x = torch.randn(20, 64, generator=generator(6)).bfloat16()
    expected = reference.fused_moe(x, weights)
    x[4] = torch.nan
    got = moe.fused_moe(x.to(device), mapped(lambda tensor: tensor.to(device), weights)).cpu()
    others = torch.arange(20) != 4
    assert got[4].isnan().all()
    assert relative_error(got[others], expected[others]) <= BOUND


@pytest.mark.parametrize(
    "form, tokens, launches",
    [("bf16", 1, 3), ("channel", 64, 3), ("tensor", 64, 3), ("channel", 65, 4), ("block", 8, 4), ("tensor static", 8, 5)],
)
def test_launches(form, tokens, launches, device):
    weights = mapped(lambda tensor: tensor.to(device), moe_weights(form, form, experts=2, hidden=64, inner=32))
    kernel = type(moe._down_kernel)
    with mock.patch.object(kernel, "run", autospec=True, side_effect=kernel.run) as run:
        moe.fused_moe(torch.randn(tokens, 64, device=device).bfloat16(), weights)
    assert run.call_count == launches


def test_more_tokens_than_a_grid_has_tiles_are_refused():
    weights = moe_weights("bf16", "bf16", experts=2, hidden=64, inner=32)
    assert moe.MOST_TOKENS == min(candidate["BLOCK_T"] for candidate in CANDIDATES["moe_down"]) * 65_535
    for tokens, reason in ((1_048_560, ""), (1_048_561, "there are 1048561 tokens, above 1048560")):
        x, ids = torch.empty(tokens, 64, device="meta"), torch.empty(tokens, device="meta")
        assert moe.why_not_fused_moe(x, weights) == reason
        assert moe.why_not_moe_down(x, x, Routing(ids, ids, ids, ids), weights, out_dtype=torch.bfloat16) == reason
        assert moe.why_not_moe_gate_up(x, None, weights) == ""


@pytest.mark.parametrize(("form", "shared_form"), [("channel", "bf16"), ("bf16", "block"), ("bf16", "bf16")])
def test_rows_too_long_to_quantise_are_refused(form, shared_form):
    weights, x = moe_weights(form, shared_form, experts=2, hidden=64, inner=32), torch.empty(1, (1 << 20) + 1, device="meta")
    reason = "" if form == shared_form else "rows have 1048577 columns to quantise, above 1048576"
    assert moe.why_not_fused_moe(x, weights) == moe.why_not_moe_gate_up(x, None, weights) == reason
    assert moe.why_not_moe_gate_up(Quantized(x, None), None, weights) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_cuda_graph_replays_with_other_tokens(tokens):
    weights = mapped(lambda tensor: tensor.cuda(), moe_weights("channel", "channel", experts=16, hidden=256, inner=256))
    x = torch.randn(tokens, 256, device="cuda").bfloat16()
    moe.fused_moe(x, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe.fused_moe(x, weights)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, moe.fused_moe(x, weights))
