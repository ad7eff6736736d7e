"""The grouped GEMM kernel: any groups, every form of scales, gathered rows, and nothing beyond its own rows."""

import pytest
import torch
from cases import few_examples, generator, same_bits
from guards import Guarded
from hypothesis import given
from hypothesis import strategies as st

from llama4_kernels.bench.inputs import mapped, relative_error
from llama4_kernels.ops.types import Quantized
from llama4_kernels.reference import quantization
from llama4_kernels.reference.grouped_gemm import grouped_gemm as reference
from llama4_kernels.triton.grouped_gemm import grouped_gemm
from weights import FORMS, linear

pytestmark = pytest.mark.triton

sizes = st.lists(st.sampled_from([0, 0, 1, 3, 16, 17, 40]), min_size=1, max_size=5)


def check(device, a, b, group_sizes, rows=None, out_dtype=torch.bfloat16):
    offsets = torch.tensor([0, *group_sizes]).cumsum(0).int()
    written = int(offsets[-1])
    with Guarded() as guarded:
        arguments = [mapped(lambda tensor: guarded(tensor.to(device)), argument) for argument in (a, b, offsets, rows)]
        got = grouped_gemm(*arguments[:3], rows=arguments[3], out_dtype=out_dtype)
        again = grouped_gemm(*arguments[:3], rows=arguments[3], out_dtype=out_dtype)
    assert got.dtype == out_dtype
    expected = reference(a, b, offsets, rows=rows, out_dtype=torch.float32)
    assert relative_error(got[:written], expected[:written]) <= 4e-3
    assert got[written:].isnan().all(), "rows that belong to no group were written"
    assert same_bits(got, again)


@pytest.mark.parametrize("form", FORMS)
@given(sizes, st.sampled_from([1, 64, 70, 130]), st.sampled_from([1, 64, 100, 128, 260]), st.booleans(), st.sampled_from([0, 5]))
@few_examples
def test_every_form(form, device, group_sizes, n, k, gathered, unused):
    rows_in_all = sum(group_sizes) + unused
    b = linear(form, len(group_sizes), n, k)
    if gathered:
        a = torch.randn(9, k, generator=generator(k)).bfloat16()
        rows = torch.randint(0, 9, (rows_in_all,), generator=generator(n)).int()
        rows[sum(group_sizes) :] = 2**30
    else:
        a, rows = torch.randn(rows_in_all, k, generator=generator(k)), None
    check(device, a, b, group_sizes, rows, torch.float32 if gathered else torch.bfloat16)


@pytest.mark.parametrize("quantize", ["quantize_per_token", "quantize_per_block", "static"])
@pytest.mark.parametrize("form", ["tensor", "channel", "block"])
def test_quantised_activations(device, quantize, form):
    x = torch.randn(21, 200, generator=generator(0))
    a = quantization.quantize_static(x, torch.tensor(0.02)) if quantize == "static" else getattr(quantization, quantize)(x)
    check(device, a, linear(form, 3, 70, 200), [4, 0, 17])


@pytest.mark.parametrize("group_sizes", [[1] * 7 + [0] * 121, [0] * 77 + [40] + [0] * 50, [0] * 128])
def test_128_groups(device, group_sizes):
    check(device, torch.randn(sum(group_sizes) + 2, 64, generator=generator(1)), linear("channel", 128, 64, 64), group_sizes)


def test_nan_in_rows_of_no_group_goes_nowhere(device):
    codes = quantization.quantize_per_token(torch.randn(12, 64, generator=generator(2)))
    codes.codes[9:] = torch.nan
    codes.scale[9:] = torch.nan
    check(device, Quantized(codes.codes, codes.scale), linear("channel", 2, 64, 64), [4, 5])
