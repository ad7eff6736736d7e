"""The repairs of Triton's interpreter, against torch's own arithmetic on the same values."""

import operator

import pytest
import torch
import triton
import triton.language as tl
from guards import Guarded

pytestmark = pytest.mark.triton

ALL_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@triton.jit
def _convert(x, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, tl.load(x + index).to(out.dtype.element_ty))


@triton.jit
def _combine(x, y, sums, products, less, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    a, b = tl.load(x + index), tl.load(y + index)
    tl.store(sums + index, a + b * 0.5)
    tl.store(products + index, a * b)
    tl.store(less + index, (a < b).to(tl.int8))


@triton.jit
def _dot(x, y, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tile = index[:, None] * SIZE + index[None, :]
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.trans(tl.load(y + tile))))


@triton.jit
def _copy(x, out, size, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index), mask=index < size)


def same(a, b):
    return torch.equal(a.float().nan_to_num(nan=12345.0), b.float().nan_to_num(nan=12345.0))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float8_e4m3fn, torch.float16])
def test_conversion_rounds_to_nearest_even(target, device):
    generator = torch.Generator().manual_seed(0)
    halfway = ALL_BFLOAT16.float().view(torch.int32)[:, None] + torch.tensor([0x7FFF, 0x8000, 0x8001])
    random = torch.randn(2**14, generator=generator) * torch.logspace(-4, 2, 2**14)
    x = torch.cat([halfway.flatten()[: 2**14].view(torch.float32), random, torch.tensor([1.97, 465.0 / 1.04, -0.0]).repeat(2**12)])
    x = x[x.abs() < 448][: 2**14].to(device)
    out = torch.empty(2**14, dtype=target, device=device)
    _convert[(1,)](x, out, SIZE=2**14)
    assert same(out, x.to(target))


@pytest.mark.parametrize("source", [torch.float8_e4m3fn, torch.bfloat16])
def test_every_value_widens(source, device):
    x = (torch.arange(256).to(torch.uint8) if source == torch.float8_e4m3fn else ALL_BFLOAT16).view(source).to(device)
    out = torch.empty(x.shape, device=device)
    _convert[(1,)](x, out, SIZE=x.numel())
    assert same(out, x)


def test_bfloat16_arithmetic(device):
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    sums, products, less = torch.empty_like(x), torch.empty_like(x), torch.empty(4096, dtype=torch.int8, device=device)
    _combine[(1,)](x, y, sums, products, less, SIZE=4096)
    assert same(sums, x + y * 0.5)
    assert same(products, x * y)
    assert torch.equal(less.bool(), operator.lt(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_dot(dtype, device):
    x, y = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    out = torch.empty(32, 32, device=device)
    _dot[(1,)](x, y, out, SIZE=32)
    tf32 = dtype == torch.float32 and device.type == "cuda"
    torch.testing.assert_close(out, x.float() @ y.float().T, rtol=0, atol=0.02 if tf32 else 1e-5)


def test_overflow_to_e4m3_is_noticed(device):
    if device.type == "cuda":
        pytest.skip("GPUs saturate")
    x = torch.full((16,), 500.0)
    out = torch.empty(16, dtype=torch.float8_e4m3fn)
    _convert[(1,)](x, out, SIZE=16)
    assert out.float().isnan().all()


def test_guards_see_stray_writes_and_reads(device):
    x = torch.ones(10, device=device)
    with pytest.raises(AssertionError, match="guard after a tensor of 32 bytes"):
        with Guarded():
            _copy[(1,)](x, torch.empty(8, device=device), 10, BLOCK=16)
    with Guarded() as guarded:
        out = torch.empty(16, device=device)
        _copy[(1,)](guarded(x), out, 12, BLOCK=16)
    assert same(out[:10], x) and out[10:].isnan().all()
