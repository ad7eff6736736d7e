"""Quantisation kernels: bit for bit the reference."""

import math

import pytest
import torch
import triton
import triton.language as tl
from cases import few_examples, generator, same_bits
from guards import Guarded
from hypothesis import given
from hypothesis import strategies as st

import llama4_kernels.reference.quantization as reference
import llama4_kernels.triton.quantization as kernels

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("function", ["quantize_per_token", "quantize_per_block"])
@given(
    st.integers(0, 5),
    st.integers(1, 300),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([0.0, torch.nan, torch.inf, 1e-30]),
)
@few_examples
def test_dynamic(function, device, tokens, columns, dtype, special):
    x = (torch.randn(tokens, columns, generator=generator(columns)) * 10).to(dtype)
    x[1:2] = 0
    x[2:3, -1] = special
    with Guarded() as guarded:
        got = getattr(kernels, function)(guarded(x.to(device)))
    expected = getattr(reference, function)(x)
    assert same_bits(got.scale, expected.scale)
    assert same_bits(got.codes, expected.codes)


@pytest.mark.parametrize("factors", [False, True])
def test_static(device, factors):
    x = torch.randn(3, 1500, generator=generator(0)) * 5
    by = torch.rand(3) if factors else None
    with Guarded() as guarded:
        scale = guarded(torch.tensor(0.02, device=device))
        got = kernels.quantize_static(guarded(x.to(device)), scale, None if by is None else guarded(by.to(device)))
    expected = reference.quantize_static(x if by is None else by[:, None] * x, torch.tensor(0.02))
    assert expected.codes.float().abs().max() == 448, "nothing saturates here"
    assert same_bits(got.codes, expected.codes)


@triton.jit
def _in_float16_bits(x, out, COUNT: tl.constexpr):
    tl.store(out + tl.arange(0, COUNT), kernels.in_float16_bits(tl.load(x + tl.arange(0, COUNT))))


def test_codes_by_way_of_float16_are_those_of_float32(device):
    """About the middles between two codes, where one of two roundings would go wrong."""
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([middles * (1 + k * 2.0**-23) for k in (-4097, -1, 0, 1, 4097)] + [torch.tensor([0.0, math.nan, math.inf, 448.0])])
    x = torch.nn.functional.pad(torch.cat([near, -near]), (0, 2048 - 2 * len(near)))
    got = torch.empty_like(x, device=device)
    _in_float16_bits[(1,)](x.to(device), got, COUNT=len(x))
    by_float16 = got.cpu().half()
    assert torch.equal(by_float16.float().nan_to_num(), got.cpu().nan_to_num())
    finite = x.isfinite()
    assert torch.equal(by_float16[finite].float().to(torch.float8_e4m3fn).float(), x[finite].to(torch.float8_e4m3fn).float())
    assert by_float16.isnan().equal(x.isnan()) and by_float16.isinf().equal(x.isinf())


def test_rows_longer_than_a_block_are_refused():
    short, long = (torch.empty(2, columns, device="meta") for columns in (1 << 20, (1 << 20) + 1))
    assert kernels.why_not_quantize_per_token(short) == ""
    assert kernels.why_not_quantize_per_token(long) == "rows have 1048577 columns to quantise, above 1048576"


def test_no_tokens_and_no_columns(device):
    assert kernels.quantize_per_token(torch.empty(0, 8, device=device)).codes.shape == (0, 8)
    assert kernels.quantize_per_token(torch.empty(2, 0, device=device)).scale.tolist() == [0, 0]
