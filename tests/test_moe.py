"""The MoE ops against float64 formulas on dequantised numbers, and against transformers' Llama4TextMoe."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from backends import assert_passes_opcheck, assert_replays, assert_same_bits, assert_within, compute, device_of, sum_error, sums_in_short
from llama4_kernels import ops
from llama4_kernels.ops import Linear, MoEWeights, Quantized, Routing
from weights import FP8, PAIRS, activation_value, linear, moe_weights, quantized_value, random_routing, value

DTYPES = [torch.bfloat16, torch.float32]


def gate_up_oracle(
    x: Tensor | Quantized, routing: Routing, weights: MoEWeights, routed_form: str, shared_form: str
) -> tuple[Tensor, Tensor]:
    """(shared, routed) in float64, token by token."""
    order = routing.order.long()
    scores = routing.scores[:, None].double()
    static = weights.w13.input_scale
    if isinstance(x, Quantized):
        x_shared = x_routed = activation_value(x)
    else:
        x_shared = quantized_value(x, shared_form, weights.shared_w13.input_scale)
        x_routed = quantized_value(x if static is None else routing.scores[:, None] * x.float(), routed_form, static)
    x_routed = x_routed if static is not None else scores * x_routed
    shared = swiglu(x_shared @ value(weights.shared_w13).T)
    w13 = value(weights.w13)
    routed = [swiglu(x_routed[t] @ w13[e].T) for t, e in enumerate(routing.expert_ids.tolist())]
    return shared[order], torch.stack([routed[t] for t in order]) if routed else shared.new_zeros(0, weights.w2.weight.shape[2])


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def assert_hidden(got: Tensor | Quantized, want: Tensor, down: Linear, dtype: torch.dtype, in_short: bool = False) -> None:
    """got stands for `want` in the form that the weight `down` is multiplied with. in_short: see backends.sums_in_short."""
    accumulated = (2.0**-7 if in_short else 2.0**-15) * (want.abs() + want.square().mean().sqrt() if want.numel() else want)
    if down.scale is None:
        assert got.dtype == dtype
        assert_within(got, want, accumulated)
        return
    if down.input_scale is not None:
        assert torch.equal(got.scale, down.input_scale)
        want = want.clamp(-448 * down.input_scale.double(), 448 * down.input_scale.double())
        scale = down.input_scale.double()
    else:
        blocks = [block.abs().amax(1) / 448 for block in want.split(128, 1)]
        torch.testing.assert_close(got.scale.double(), torch.stack(blocks, 1), rtol=2.0**-9 if in_short else 1e-3, atol=1e-9)
        scale = torch.stack(blocks, 1)[:, torch.arange(want.shape[1]) // 128]
    half_step = torch.maximum(want.abs() / 16, scale / 1024)  # e4m3 has 3 bits of mantissa, and steps of 1/512 about 0
    assert got.codes.dtype == FP8 and got.codes.shape == want.shape
    assert ((activation_value(got) - want).abs() <= 1.01 * half_step + accumulated).all()  # which no NaN is


def down_oracle(shared: Tensor, routed: Tensor, routing: Routing, weights: MoEWeights) -> tuple[Tensor, Tensor]:
    """y in float64 in token order, and the same with absolute values."""
    results = []
    for absolute in (lambda x: x, torch.abs):
        sorted_ids = routing.expert_ids[routing.order.long()].long()
        y = absolute(shared) @ absolute(value(weights.shared_w2)).T
        y = y + (absolute(value(weights.w2))[sorted_ids] @ absolute(routed)[:, :, None])[..., 0]
        results.append(torch.empty_like(y).index_copy_(0, routing.order.long(), y))
    return results[0], results[1]


@given(
    tokens=st.sampled_from([0, 1, 7, 40]),
    experts=st.sampled_from([1, 4, 128]),
    shape=st.sampled_from([(16, 8, 24), (136, 130, 130), (40, 136, 8)]),
    forms=st.sampled_from(PAIRS),
    dtype=st.sampled_from(DTYPES),
    on_one=st.booleans(),
)
def test_halves(backend, tokens, experts, shape, forms, dtype, on_one):
    hidden, inner, shared_inner = shape
    weights = moe_weights(*forms, experts=experts, hidden=hidden, inner=inner, shared_inner=shared_inner)
    x, routing = torch.randn(tokens, hidden).to(dtype), random_routing(tokens, experts, on_one)
    shared, routed = compute(backend, "moe_gate_up", x, routing, weights)
    want_shared, want_routed = gate_up_oracle(x, routing, weights, *forms)
    assert_hidden(shared, want_shared, weights.shared_w2, dtype, sums_in_short(backend, weights.shared_w13))
    assert_hidden(routed, want_routed, weights.w2, dtype, sums_in_short(backend, weights.w13))

    y = compute(backend, "moe_down", shared, routed, routing, weights, out_dtype=dtype)
    want, magnitude = down_oracle(activation_value(shared), activation_value(routed), routing, weights)
    assert y.dtype == dtype
    assert_within(y, want, sum_error(any(sums_in_short(backend, down) for down in (weights.shared_w2, weights.w2))) * magnitude)


@pytest.mark.parametrize("per", ["row", "block"])
@pytest.mark.parametrize("form", ["tensor", "channel", "block"])
def test_gate_up_of_quantized_x(backend, form, per):
    weights = moe_weights(form, form, experts=4, hidden=200, inner=24)
    weights = dataclasses.replace(weights, shared_w2=linear("bf16", 200, 24))
    x = Quantized((100 * torch.randn(7, 200)).clamp(-448, 448).to(FP8), 0.01 * (1 + torch.rand((7,) if per == "row" else (7, 2))))
    routing = random_routing(7, 4)
    shared, routed = compute(backend, "moe_gate_up", x, routing, weights)
    want_shared, want_routed = gate_up_oracle(x, routing, weights, form, form)
    assert_hidden(shared, want_shared, weights.shared_w2, torch.bfloat16, sums_in_short(backend, weights.shared_w13))
    assert_hidden(routed, want_routed, weights.w2, torch.bfloat16, sums_in_short(backend, weights.w13))


def test_codes_of_route_top1_give_what_unquantised_x_gives(backend):
    weights = moe_weights("channel", "channel", experts=4, hidden=200, inner=24)
    x = torch.randn(9, 200)
    routing, quantized = compute(backend, "route_top1", x, weights.router, quantize=True)
    assert_same_bits(compute(backend, "moe_gate_up", quantized, routing, weights), compute(backend, "moe_gate_up", x, routing, weights))


@given(
    tokens=st.sampled_from([0, 1, 7, 70]),
    experts=st.sampled_from([1, 16, 128]),
    form=st.sampled_from(["bf16", "fp32"]),
    dtype=st.sampled_from(DTYPES),
)
def test_layer(backend, tokens, experts, form, dtype):
    weights = moe_weights(form, form, experts=experts, hidden=72, inner=40, shared_inner=24)
    x = torch.randn(tokens, 72).to(dtype)
    routing, _ = ops.route_top1(x, weights.router)
    h_shared, h_routed = gate_up_oracle(x, routing, weights, form, form)
    want, magnitude = down_oracle(h_shared, h_routed, routing, weights)
    y = compute(backend, "fused_moe", x, weights)
    assert y.dtype == dtype
    assert_within(y, want, (2.0**-14 if dtype == torch.float32 else 2.0**-7) * magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forms", [forms for forms in PAIRS if forms[0] not in ("bf16", "fp32")])
def test_layer_in_fp8_is_its_two_halves(backend, forms, dtype):
    weights = moe_weights(*forms, experts=4, hidden=200, inner=136)
    x = torch.randn(33, 200).to(dtype)
    routing, _ = compute(backend, "route_top1", x, weights.router)
    shared, routed = compute(backend, "moe_gate_up", x, routing, weights)
    want, magnitude = down_oracle(activation_value(shared), activation_value(routed), routing, weights)
    # A hidden value at the middle of two codes may go to either in the two runs: a step of 1/8 of it, at most.
    error = compute(backend, "fused_moe", x, weights).double() - want
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0
    assert error.norm() < (0.002 + rounding) * want.norm()
    assert not (error.abs() > (2.0**-7 + rounding) * magnitude).any()


@pytest.mark.parametrize("form", ["channel", "block"])
def test_layer_in_fp8_is_near_the_layer_without_quantised_activations(backend, form):
    """An element of x or h is off by at most 1/16 of itself once quantised, and x enters gate and up: far below these bounds on average,
    and a scale that is forgotten or taken from another row is far above."""
    weights = moe_weights(form, form, experts=4, hidden=256, inner=136)
    x = torch.randn(33, 256)
    routing, _ = ops.route_top1(x, weights.router)
    want, _ = down_oracle(*gate_up_oracle(x, routing, weights, "fp32", "fp32"), routing, weights)
    assert (compute(backend, "fused_moe", x, weights).double() - want).norm() < 0.1 * want.norm()


def test_seven_tokens_of_128_experts_follow_transformers(backend):
    config = Llama4TextConfig(hidden_size=64, intermediate_size=48, num_local_experts=128, num_experts_per_tok=1)
    layer = Llama4TextMoe(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.1)
        x = torch.randn(7, 64)
        want, _ = layer(x)
    experts, shared = layer.experts, layer.shared_expert
    weights = MoEWeights(
        layer.router.weight.detach(),
        Linear(experts.gate_up_proj.detach().mT.contiguous()),
        Linear(experts.down_proj.detach().mT.contiguous()),
        Linear(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]).detach()),
        Linear(shared.down_proj.weight.detach()),
    )
    torch.testing.assert_close(compute(backend, "fused_moe", x, weights), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("form", ["fp32", "channel", "tensor static"])
def test_a_token_of_nan_touches_no_other_token(backend, form):
    weights = moe_weights(form, form, experts=4, hidden=72, inner=40)
    x = torch.randn(9, 72)
    clean = compute(backend, "fused_moe", x, weights)
    x[[3, 8]] = float("nan")
    spoilt = compute(backend, "fused_moe", x, weights)
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(spoilt[others], clean[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forms", [("fp32", "fp32"), ("channel", "bf16")])
def test_gives_the_same_bits_twice(backend, forms):
    weights = moe_weights(*forms, experts=4, hidden=136, inner=136)
    x = torch.randn(70, 136)
    assert_same_bits(*(compute(backend, "fused_moe", x, weights) for _ in range(2)))


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("forms", [forms for forms in PAIRS if "fp32" not in forms])
@pytest.mark.parametrize("tokens", [3, 40, 130])
def test_gives_the_same_bits_twice_in_bfloat16(gpu_backend, tokens, forms):
    """In tiles of each size that CUDA has."""
    weights = moe_weights(*forms, experts=4, hidden=272, inner=144)
    x = torch.randn(tokens, 272).bfloat16()
    assert_same_bits(*(compute(gpu_backend, "fused_moe", x, weights) for _ in range(2)))


@pytest.mark.parametrize("forms", PAIRS)
@pytest.mark.parametrize("tokens", [1, 100])
def test_replays_in_a_cuda_graph(graph_backend, forms, tokens):
    dtype = torch.float32 if "fp32" in forms else torch.bfloat16
    experts, hidden, inner = (16, 256, 128) if device_of(graph_backend).type == "cuda" else (3, 32, 16)
    layers, gate_ups, downs = [], [], []
    for on_one in (False, True):
        x, routing = torch.randn(tokens, hidden).to(dtype), random_routing(tokens, experts, on_one)
        weights = moe_weights(*forms, experts=experts, hidden=hidden, inner=inner)
        layers.append(((x, weights), {}))
        gate_ups.append(((x, routing, weights), {}))
        downs.append(((*compute(graph_backend, "moe_gate_up", x, routing, weights), routing, weights), {}))
    assert_replays(graph_backend, "fused_moe", *layers)
    assert_replays(graph_backend, "moe_gate_up", *gate_ups)
    assert_replays(graph_backend, "moe_down", *downs)


@pytest.mark.parametrize("forms", [("fp32", "fp32"), ("channel", "bf16"), ("tensor static", "block")])
def test_opcheck(backend, forms):
    dtype = torch.float32 if forms == ("fp32", "fp32") else torch.bfloat16
    weights = moe_weights(*forms, experts=4, hidden=48, inner=32)
    x, routing = torch.randn(7, 48).to(dtype), random_routing(7, 4)
    hidden = compute(backend, "moe_gate_up", x, routing, weights)
    assert_passes_opcheck(backend, "moe_gate_up", x, routing, weights)
    assert_passes_opcheck(backend, "moe_down", *hidden, routing, weights, out_dtype=dtype)
    assert_passes_opcheck(backend, "fused_moe", x, weights)


def test_opcheck_of_quantized_x(backend):
    x = Quantized(torch.randn(7, 48).to(FP8), torch.rand(7))
    weights = moe_weights("channel", "channel", experts=4, hidden=48, inner=32)
    assert_passes_opcheck(backend, "moe_gate_up", x, random_routing(7, 4), weights)


X = torch.ones(3, 8)
PLAIN = moe_weights("fp32", "fp32", experts=2, hidden=8, inner=4)
FP8_WEIGHTS = moe_weights("channel", "channel", experts=2, hidden=8, inner=4)
STATIC = moe_weights("tensor static", "tensor static", experts=2, hidden=8, inner=4)
MIXED = moe_weights("channel", "fp32", experts=2, hidden=8, inner=4)
ROUTING = Routing(torch.tensor([1, 0, 1]).int(), torch.ones(3), torch.tensor([1, 0, 2]).int(), torch.tensor([0, 1, 3]).int())
QUANTIZED = Quantized(X.to(FP8), torch.ones(3))


def replaced(record, **fields):
    return dataclasses.replace(record, **fields)


@pytest.mark.parametrize(
    ("x", "weights", "error", "message"),
    [
        (X.half(), PLAIN, TypeError, "x has dtype float16, needs bfloat16 or float32"),
        (torch.ones(8, 3).t(), PLAIN, ValueError, "x has strides"),
        (QUANTIZED, PLAIN, TypeError, "x is Quantized, needs a Tensor"),
        (X, "weights", TypeError, "weights is str, needs MoEWeights"),
        (X, replaced(PLAIN, router=torch.ones(2, 9)), ValueError, r"weights.router has shape \[2, 9\], needs \[E, 8\]"),
        (X, replaced(PLAIN, router=torch.ones(0, 8)), ValueError, r"weights.router has shape \[0, 8\], needs at least one expert"),
        (X, replaced(PLAIN, router=PLAIN.router.to("meta")), ValueError, "weights.router is on meta, needs cpu"),
        (X, replaced(PLAIN, w13=torch.ones(2, 8, 8)), TypeError, "weights.w13 is Tensor, needs a Linear"),
        (X, replaced(PLAIN, w13=Linear(torch.ones(3, 8, 8))), ValueError, r"weights.w13.weight has shape \[3, 8, 8\], needs \[2, 8, 8\]"),
        (X, replaced(PLAIN, w2=Linear(torch.ones(2, 9, 4))), ValueError, r"weights.w2.weight has shape \[2, 9, 4\], needs \[2, 8, I\]"),
        (X, replaced(PLAIN, shared_w13=Linear(torch.ones(6, 8))), ValueError,
         r"weights.shared_w13.weight has shape \[6, 8\], needs \[8, 8\]"),
        (X, replaced(PLAIN, shared_w2=Linear(torch.ones(4, 8).t())), ValueError, "weights.shared_w2.weight has strides"),
        (X, replaced(FP8_WEIGHTS, w13=replaced(FP8_WEIGHTS.w13, scale=torch.ones(2, 4))), ValueError,
         r"weights.w13.scale has shape \[2, 4\], needs \[2\] per tensor or \[2, 8\] per channel or \[2, 1, 1\] per block"),
        (X, replaced(STATIC, shared_w2=replaced(STATIC.shared_w2, input_scale=torch.tensor(-1.0))), ValueError,
         "weights.shared_w2.input_scale holds values from -1 to -1, needs finite ones of at least 0"),
        (X, replaced(FP8_WEIGHTS, w2=replaced(FP8_WEIGHTS.w2, scale=None)), TypeError, "weights.w2.scale is NoneType"),
    ],
)  # fmt: skip
def test_bad_input_to_the_layer_is_named(x, weights, error, message):
    with pytest.raises(error, match=f"^fused_moe: {message}"):
        ops.fused_moe(x, weights)


@pytest.mark.parametrize(
    ("x", "routing", "weights", "error", "message"),
    [
        (X[0], ROUTING, PLAIN, ValueError, r"x has shape .*, needs \[T, H\]"),
        (X, None, PLAIN, TypeError, "routing is NoneType, needs a Routing"),
        (X, replaced(ROUTING, scores=torch.ones(4)), PLAIN, ValueError, r"routing.scores has shape \[4\], needs \[3\]"),
        (X, replaced(ROUTING, order=ROUTING.order.long()), PLAIN, TypeError, "routing.order has dtype int64, needs int32"),
        (X, replaced(ROUTING, offsets=ROUTING.offsets[:2]), PLAIN, ValueError, r"routing.offsets has shape \[2\], needs \[3\]"),
        (X, replaced(ROUTING, expert_ids=torch.tensor([1, 0, 2]).int()), PLAIN, ValueError,
         "routing.expert_ids holds values from 0 to 2, needs 0 to 1, the 2 experts"),
        (X, replaced(ROUTING, order=torch.tensor([1, 0, 3]).int()), PLAIN, ValueError,
         "routing.order holds values from 0 to 3, needs 0 to 2"),
        (X, replaced(ROUTING, order=torch.tensor([1, 0, 0]).int()), PLAIN, ValueError, "routing.order names a token twice"),
        (X, replaced(ROUTING, order=torch.tensor([0, 1, 2]).int()), PLAIN, ValueError, "routing.order does not sort routing.expert_ids"),
        (X, replaced(ROUTING, offsets=torch.tensor([0, 1, 2]).int()), PLAIN, ValueError, "routing.offsets ends at 2, needs 3"),
        (X, replaced(ROUTING, offsets=torch.tensor([0, 4, 3]).int()), PLAIN, ValueError,
         r"routing.offsets is \[0, 4, 3\], needs to start at 0"),
        (QUANTIZED, ROUTING, PLAIN, TypeError, "x is Quantized, needs the unquantised Tensor, because weights.w13 is not fp8"),
        (QUANTIZED, ROUTING, MIXED, TypeError, "x is Quantized, needs the unquantised Tensor, because weights.shared_w13 is not fp8"),
        (QUANTIZED, ROUTING, STATIC, ValueError, "x is Quantized, needs the unquantised Tensor, because weights.w13 has an input_scale"),
        (replaced(QUANTIZED, scale=-torch.ones(3)), ROUTING, FP8_WEIGHTS, ValueError, "x.scale holds values from -1 to -1, needs at least 0"),
        (replaced(QUANTIZED, scale=torch.ones(())), ROUTING, FP8_WEIGHTS, ValueError, r"x.scale has shape \[\], needs one scale per token"),
    ],
)  # fmt: skip
def test_bad_input_to_gate_up_is_named(x, routing, weights, error, message):
    with pytest.raises(error, match=f"^moe_gate_up: {message}"):
        ops.moe_gate_up(x, routing, weights)


H = torch.ones(3, 4)
H_QUANTIZED = Quantized(H.to(FP8), torch.ones(3, 1))


@pytest.mark.parametrize(
    ("shared", "routed", "weights", "more", "error", "message"),
    [
        (H, H, FP8_WEIGHTS, {}, TypeError,
         "shared is a Tensor, needs Quantized as moe_gate_up returns it, because weights.shared_w2 is fp8"),
        (H, H_QUANTIZED, PLAIN, {}, TypeError, "routed is Quantized, needs a Tensor, because weights.w2 is not fp8"),
        (H_QUANTIZED, replaced(H_QUANTIZED, scale=torch.ones(3)), FP8_WEIGHTS, {}, ValueError,
         r"routed.scale has shape \[3\], needs one scale per 128 columns"),
        (H_QUANTIZED, H_QUANTIZED, STATIC, {}, ValueError,
         r"shared.scale has shape \[3, 1\], needs \[\], that of weights.shared_w2.input_scale"),
        (H_QUANTIZED, replaced(H_QUANTIZED, scale=-torch.ones(3, 1)), FP8_WEIGHTS, {}, ValueError, "routed.scale holds values from -1 to -1"),
        (torch.ones(3, 5), H, PLAIN, {}, ValueError, r"shared has shape \[3, 5\], needs \[3, 4\]"),
        (H, torch.ones(2, 4), PLAIN, {}, ValueError, r"routed has shape \[2, 4\], needs \[3, 4\]"),
        (H, H.bfloat16(), PLAIN, {}, TypeError, "routed has dtype torch.bfloat16, needs that of shared, torch.float32, unless out_dtype"),
        (H, H, PLAIN, {"out_dtype": torch.float16}, TypeError, "out_dtype is torch.float16, needs"),
        (H, H, "weights", {}, TypeError, "weights is str, needs MoEWeights"),
    ],
)  # fmt: skip
def test_bad_input_to_down_is_named(shared, routed, weights, more, error, message):
    with pytest.raises(error, match=f"^moe_down: {message}"):
        ops.moe_down(shared, routed, ROUTING, weights, **more)


def test_down_checks_the_routing():
    with pytest.raises(ValueError, match="^moe_down: routing.order names a token twice, needs each of the 3 tokens once"):
        ops.moe_down(H, H, replaced(ROUTING, order=torch.tensor([1, 0, 0]).int()), PLAIN)


def test_down_takes_its_dtype_from_the_hidden_activations():
    assert ops.moe_down(H.bfloat16(), H.bfloat16(), ROUTING, PLAIN).dtype == torch.bfloat16
    assert ops.moe_down(H, H, ROUTING, PLAIN).dtype == torch.float32
    assert ops.moe_down(H, H_QUANTIZED, ROUTING, MIXED).dtype == torch.float32
    assert ops.moe_down(H_QUANTIZED, H_QUANTIZED, ROUTING, FP8_WEIGHTS).dtype == torch.bfloat16
