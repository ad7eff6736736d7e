"""quantize_per_token in CUDA on a Hopper GPU, against the reference."""

from __future__ import annotations

import pytest
import torch

from llama4_kernels import ops, use_backend
from llama4_kernels.reference import quantization as reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda_backend():
    with use_backend(quantize_per_token="cuda"):
        yield


def random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rows * 100_003 + columns)
    magnitude = torch.logspace(-6, 6, max(rows, 1), dtype=torch.float32, device="cuda")[:rows, None]
    return (torch.randn(rows, columns, generator=generator, device="cuda") * magnitude).to(dtype)


def assert_like_reference(x: torch.Tensor) -> None:
    got, want = ops.quantize_per_token(x), reference.quantize_per_token(x.cpu())
    torch.testing.assert_close(got.scale.cpu(), want.scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.codes.float().cpu(), want.codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.small
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(0, 128), (1, 1), (3, 17), (64, 5120), (2, 8208), (2, 16384), (1, 32769)])
def test_equals_the_reference_bit_for_bit(rows, columns, dtype):
    assert_like_reference(random(rows, columns, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_reference_on_a_prefill(dtype):
    assert_like_reference(random(8192, 5120, dtype))


@pytest.mark.small
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_misaligned_input(dtype):
    storage = random(1, 3 * 256 + 1, dtype).flatten()
    assert_like_reference(storage[1:].view(3, 256))


@pytest.mark.small
def test_rows_of_special_values_do_not_touch_others():
    x = random(5, 160, torch.float32)
    x[1] = 0
    x[2, 100] = float("nan")
    x[3, 0], x[3, 1] = float("inf"), float("-inf")
    assert_like_reference(x)


def test_replays_bit_for_bit_in_a_cuda_graph():
    x = random(64, 5120, torch.bfloat16)
    ops.quantize_per_token(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_per_token(x)
    for seed in range(2):
        x.copy_(random(64, 5120 + seed, torch.bfloat16)[:, :5120])
        graph.replay()
        want = reference.quantize_per_token(x.cpu())
        assert torch.equal(captured.codes.cpu().view(torch.uint8), want.codes.view(torch.uint8))
        assert torch.equal(captured.scale.cpu(), want.scale)


def test_runs_on_the_current_stream():
    x = torch.zeros(4096, 16384, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        quantized = ops.quantize_per_token(x)
    stream.synchronize()
    assert (quantized.codes.float() == 448).all()


def test_a_refused_launch_is_an_error_that_names_the_op():
    from llama4_kernels.cuda import _C

    with pytest.raises(ValueError, match="blocks exceed CUDA's grid"):
        _C.quantize_per_token(x=0, dtype=_C.Dtype.float32, rows=2**31, columns=1, codes=0, scale=0, stream=0)
