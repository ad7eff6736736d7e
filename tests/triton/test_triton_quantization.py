"""Quantisation kernels: bit for bit the reference."""

import pytest
import torch
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


def test_no_tokens_and_no_columns(device):
    assert kernels.quantize_per_token(torch.empty(0, 8, device=device)).codes.shape == (0, 8)
    assert kernels.quantize_per_token(torch.empty(2, 0, device=device)).scale.tolist() == [0, 0]
