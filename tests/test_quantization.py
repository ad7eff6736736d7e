"""FP8 quantisation against the table of all e4m3 numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backends import assert_passes_opcheck, assert_replays, assert_same_bits, compute, to, where_it_computes
from llama4_kernels import cuda, ops
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


@pytest.mark.parametrize(("rows", "columns"), [(65, 300), (64, 5120)])
def test_replays_in_a_cuda_graph(graph_backend, rows, columns):
    given, others = (((torch.randn(rows, columns).bfloat16(),), {}) for _ in range(2))
    assert_replays(graph_backend, "quantize_per_token", given, others)


def of_every_magnitude(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns) * torch.logspace(-6, 6, max(rows, 1))[:rows, None]).to(dtype)


def assert_like_the_reference(backend: str, x: Tensor) -> None:
    """Bit for bit, NaN aside, of which there are many."""
    with where_it_computes(backend):
        got, want = ops.quantize_per_token(x), reference.quantize_per_token(x.cpu())
    torch.testing.assert_close(got.scale.cpu(), want.scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.codes.float().cpu(), want.codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 128), (1, 1), (3, 17), (64, 5120), (2, 8208), (2, 16384), (1, 32769)])
def test_equals_the_reference_bit_for_bit(gpu_backend, rows, columns, dtype):
    assert_like_the_reference(gpu_backend, of_every_magnitude(rows, columns, dtype).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_on_a_prefill(gpu_backend, dtype):
    assert_like_the_reference(gpu_backend, of_every_magnitude(8192, 5120, dtype).cuda())


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_may_begin_anywhere(gpu_backend, dtype):
    storage = torch.randn(3 * 256 + 1).to(dtype).cuda()
    assert_like_the_reference(gpu_backend, storage[1:].view(3, 256))


@pytest.mark.gpu
@pytest.mark.small
def test_rows_of_special_values_touch_no_other_row(gpu_backend):
    x = of_every_magnitude(5, 160, torch.float32)
    x[1] = 0
    x[2, 100] = float("nan")
    x[3, 0], x[3, 1] = float("inf"), float("-inf")
    assert_like_the_reference(gpu_backend, x.cuda())


@pytest.mark.gpu
def test_runs_on_the_current_stream(gpu_backend):
    x = torch.zeros(4096, 16384, device="cuda")
    stream = torch.cuda.Stream()
    with where_it_computes(gpu_backend):
        ops.quantize_per_token(x)  # compiling would take longer than the sleep
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            x.fill_(1.0)
            quantized = ops.quantize_per_token(x)
    stream.synchronize()
    assert (quantized.codes.float() == 448).all()


@pytest.mark.skipif(bool(cuda.why_not_built()), reason=cuda.why_not_built() or "-")
def test_a_launch_of_too_many_blocks_is_refused():
    from llama4_kernels.cuda import _C

    with pytest.raises(ValueError, match="blocks exceed CUDA's grid"):
        _C.quantize_per_token(x=0, dtype=_C.Dtype.float32, rows=2**31, columns=1, codes=0, scale=0, stream=0)


def test_opcheck(backend):
    assert_passes_opcheck(backend, "quantize_per_token", torch.randn(7, 48))


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
