"""What tests on a GPU allow for sums of e4m3 products, of which Hopper's tensor cores keep 13 bits below the leading one, within an
instruction and across instructions (bench/calibration, fp8/bits; about 14 in all by the report on DeepSeek-V3, arXiv 2412.19437, 3.3.2).
Kernels whose sums keep 13 stay within it, and not within what fp32's sums keep to."""

from __future__ import annotations

import emulation
import pytest
import torch
from test_grouped_gemm import assert_groups, offsets_of
from test_moe import assert_hidden, down_oracle, gate_up_oracle

from backends import assert_within, sum_error
from weights import activation_value, linear, moe_weights, quantized_value, random_routing

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

BITS = 13
FORMS = ("tensor", "tensor static", "channel", "block")


@pytest.fixture
def kernels():
    kernels = emulation.load(emulation.build())
    kernels.keep_e4m3_sum_bits(BITS)
    yield kernels
    kernels.keep_e4m3_sum_bits(0)


def assert_only_in_short(check) -> None:
    check(True)
    with pytest.raises(AssertionError):
        check(False)


@pytest.mark.parametrize("sizes", [[7, 33], [100, 200]], ids=str)  # tiles of 64 tokens, and of 128
@pytest.mark.parametrize("form", FORMS)
def test_grouped_gemm(kernels, form, sizes):
    torch.manual_seed(0)
    b, offsets, a = linear(form, 2, 130, 640), offsets_of(sizes), torch.randn(sum(sizes), 640).bfloat16()
    got = emulation.op_module("grouped_gemm", kernels).grouped_gemm(a, b, offsets, out_dtype=torch.float32)
    assert_only_in_short(lambda in_short: assert_groups(got, quantized_value(a, form, b.input_scale), b, offsets, in_short))


@pytest.mark.parametrize("form", FORMS)
def test_moe(kernels, form):
    torch.manual_seed(0)
    module = emulation.op_module("moe", kernels)
    weights = moe_weights(form, form, experts=4, hidden=208, inner=144)
    x, routing = torch.randn(40, 208).bfloat16(), random_routing(40, 4)
    shared, routed = module.moe_gate_up(x, routing, weights)
    want_shared, want_routed = gate_up_oracle(x, routing, weights, form, form)
    assert_only_in_short(lambda in_short: assert_hidden(shared, want_shared, weights.shared_w2, torch.bfloat16, in_short))
    assert_only_in_short(lambda in_short: assert_hidden(routed, want_routed, weights.w2, torch.bfloat16, in_short))
    y = module.moe_down(shared, routed, routing, weights, out_dtype=torch.bfloat16)
    want, magnitude = down_oracle(activation_value(shared), activation_value(routed), routing, weights)
    assert_only_in_short(lambda in_short: assert_within(y, want, sum_error(in_short) * magnitude))
