"""FP8 quantisation against the table of all e4m3 numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from backends import assert_replays, assert_same_bits, compute, to
from llama4_kernels import ops
from llama4_kernels.reference import quantization as reference
from weights import activation_value, e4m3, linear, quantized_value, value

DTYPES = [torch.bfloat16, torch.float32]


@given(
    rows=st.sampled_from([0, 1, 3, 70]),
    columns=st.sampled_from([1, 17, 128, 300]),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_codes_are_the_nearest_e4m3_numbers(backend, rows, columns, dtype, magnitude):
    x = (torch.randn(rows, columns) * magnitude).to(dtype)
    quantized = compute(backend, "quantize_per_token", x)
    scale = x.float().abs().amax(1) / 448
    torch.testing.assert_close(quantized.scale, scale, rtol=0, atol=0)
    torch.testing.assert_close(quantized.codes.double(), e4m3(x.float() / scale[:, None]), rtol=0, atol=0)


def test_every_e4m3_number_is_kept_and_halves_go_to_even(backend):
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, -numbers, halves, -halves])[None]
    assert x.max() == 448  # the scale is 1
    codes = compute(backend, "quantize_per_token", x).codes.float()[0]
    assert codes[:254].tolist() == x[0, :254].tolist()
    even = torch.where(torch.arange(126) % 2 == 0, numbers[:-1], numbers[1:])
    assert codes[254:].tolist() == [*even.tolist(), *(-even).tolist()]


def test_rows_of_zeros_and_nan_touch_no_other_row(backend):
    x = torch.randn(4, 40)
    x[1], x[2, 3] = 0, float("nan")
    quantized = compute(backend, "quantize_per_token", x)
    assert quantized.scale[1] == 0 and (quantized.codes[1].float() == 0).all()
    assert not quantized.scale[2].isfinite()
    clean = compute(backend, "quantize_per_token", x[[0, 3]])
    assert_same_bits([quantized.codes[[0, 3]], quantized.scale[[0, 3]]], [clean.codes, clean.scale])


def test_rows_without_columns(backend):
    quantized = compute(backend, "quantize_per_token", torch.ones(3, 0))
    assert quantized.codes.shape == (3, 0) and quantized.scale.tolist() == [0, 0, 0]


@pytest.mark.gpu
def test_replays_in_a_cuda_graph(gpu_backend):
    assert_replays(gpu_backend, "quantize_per_token", torch.randn(65, 300).bfloat16())


def test_opcheck():
    opcheck(torch.ops.llama4_kernels.quantize_per_token.default, (torch.randn(7, 48),))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 8).half(), TypeError, "x has dtype float16, needs bfloat16 or float32"),
        (torch.ones(2, 8, 1), ValueError, r"x has shape \[2, 8, 1\], needs \[T, K\]"),
        (torch.ones(8, 2).t(), ValueError, r"x has strides \[1, 2\] for shape \[2, 8\], needs to be contiguous"),
        (None, TypeError, r"x is NoneType, needs a Tensor \[T, K\]"),
    ],
)
def test_bad_input_is_named(x, error, message):
    with pytest.raises(error, match=f"^quantize_per_token: {message}"):
        ops.quantize_per_token(x)


@pytest.mark.parametrize("form", ["tensor", "tensor static", "channel", "block"])
@pytest.mark.parametrize("columns", [1, 128, 200])
def test_the_reference_quantises_activations_as_the_weight_asks(form, columns):
    weight = linear(form, 3, columns)
    x = torch.randn(5, columns) * 4
    want = quantized_value(x, form, weight.input_scale)
    torch.testing.assert_close(activation_value(reference.quantize_for(x, weight)), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(reference.dequantize(reference.quantize_for(x, weight)).double(), want, rtol=1e-6, atol=0)


class DividesByNumbers(TorchDispatchMode):
    """Whether anything was divided by a number, or by a tensor on the CPU that counts as one."""

    seen = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.seen |= not isinstance(args[1], torch.Tensor) or args[1].dim() == 0
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantize", [reference.quantize_per_token, reference.quantize_per_block])
def test_scales_of_the_reference_are_quotients_on_every_device(quantize):
    """On a GPU torch multiplies by the reciprocal of a number: the last bit of a scale differs, and codes at the middle of two move."""
    x = torch.randn(5, 200)
    with DividesByNumbers() as plain:
        x / 448
    with DividesByNumbers() as mode:
        quantize(x)
    assert plain.seen and not mode.seen


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [reference.quantize_per_token, reference.quantize_per_block])
def test_the_reference_gives_the_same_bits_on_a_gpu(quantize):
    x = torch.randn(300, 5120).bfloat16()
    assert_same_bits(to(quantize(x.cuda()), torch.device("cpu")), quantize(x))


def test_a_static_scale_saturates():
    quantized = reference.quantize_static(torch.tensor([[1000.0, -1000.0, 2.0]]), torch.tensor(1.0))
    assert quantized.codes.float().tolist() == [[448.0, -448.0, 2.0]]


@pytest.mark.parametrize("form", ["bf16", "fp32", "tensor", "channel", "block"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 256), (130, 200)])
def test_the_reference_dequantises_weights(form, n, k):
    stacked = linear(form, 2, n, k)
    torch.testing.assert_close(reference.dequantize_weight(stacked, 1).double(), value(stacked)[1], rtol=1e-6, atol=0)
    single = linear(form, n, k)
    torch.testing.assert_close(reference.dequantize_weight(single).double(), value(single), rtol=1e-6, atol=0)
