"""FP8 e4m3 quantisation, bit for bit as the reference does it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama4_kernels.ops.types import E4M3_CAPABILITY, SCALE_BLOCK, Linear, Quantized
from llama4_kernels.triton import config

E4M3_MAX = tl.constexpr(448.0)
MOST_COLUMNS = 1 << 20  # elements of Triton's largest block


def quantize_per_token(x: Tensor) -> Quantized:
    tokens, columns = x.shape
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if x.numel():
        width = triton.next_power_of_2(columns)
        _per_row[(tokens, 1)](x, codes, scale, columns, 1, WIDTH=width, num_warps=warps_for(width))
    else:
        scale.zero_()
    return Quantized(codes, scale)


def why_not_quantize_per_token(x: Tensor) -> str:
    return why_not_e4m3(x.device) or why_not_columns(x.shape[1])


def why_not_columns(columns: int) -> str:
    """Why rows of so many columns are not quantised here, or ""."""
    return f"rows have {columns} columns to quantise, above {MOST_COLUMNS}" if columns > MOST_COLUMNS else ""


def why_not_e4m3(device: torch.device) -> str:
    """Why Triton has no conversions of e4m3 on `device`, or ""."""
    major, minor = config.capability(device)
    if (major, minor) >= E4M3_CAPABILITY:
        return ""
    return f"{device} has compute capability {major}.{minor}: Triton converts e4m3 from 8.9 on"


def quantize_per_block(x: Tensor) -> Quantized:
    """One scale per row and 128 columns; the last block of a row may be shorter."""
    tokens, columns = x.shape
    blocks = triton.cdiv(columns, SCALE_BLOCK)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, blocks, dtype=torch.float32, device=x.device)
    if x.numel():
        _per_row[(tokens, blocks)](x, codes, scale, columns, blocks, WIDTH=SCALE_BLOCK, num_warps=1)
    return Quantized(codes, scale)


def quantize_static(x: Tensor, scale: Tensor, factors: Tensor | None = None) -> Quantized:
    """One given scale for the whole tensor; values beyond ±448 · scale saturate. Row t of x is multiplied by factors[t] first."""
    tokens, columns = x.shape
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    width = min(triton.next_power_of_2(max(columns, 1)), 1024)
    if x.numel():
        _static[(tokens, triton.cdiv(columns, width))](x, factors, scale, codes, columns, WIDTH=width)
    return Quantized(codes, scale)


def quantize_for(x: Tensor, linear: Linear) -> Quantized:
    """x in the form that the fp8 weight `linear` is multiplied with."""
    if linear.input_granularity == "tensor":
        return quantize_static(x, linear.input_scale)
    return quantize_per_block(x) if linear.input_granularity == "block" else quantize_per_token(x)


def warps_for(width: int) -> int:
    """Warps that hold `width` elements of a row with 16 to 32 in each thread."""
    return min(max(width // 1024, 1), 8)


@triton.jit
def e4m3(x, scale):
    """Codes of x / scale, rounded to nearest even and saturated; NaN stays NaN, a scale of 0 gives 0."""
    scaled = tl.where(scale == 0.0, 0.0, tl.div_rn(x, scale))
    return in_float16_bits(tl.clamp(scaled, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)).to(tl.float8e4nv)


@triton.jit
def in_float16_bits(x):
    """float32 x in the ten bits of mantissa that float16 has, the last of which is set where x has others below ("round to odd"). What is
    rounded again from there is rounded as from x. Triton converts to e4m3 by way of float16, rounded towards zero, for compute capability 8.9."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits & -0x2000) | tl.where((bits & 0x1FFF) != 0, 0x2000, 0)).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_scale(x, axis: tl.constexpr):
    """max|x| / 448 along `axis`; NaN where x holds a NaN, which tl.max alone would drop."""
    largest = tl.max(tl.abs(x), axis)
    has_nan = tl.max((x != x).to(tl.int32), axis)
    return tl.where(has_nan == 1, float("nan"), tl.div_rn(largest, tl.full(largest.shape, E4M3_MAX, tl.float32)))


@triton.jit
def _per_row(x, codes, scale, columns, blocks, WIDTH: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    row_scale = e4m3_scale(values, 0)
    tl.store(scale + row * blocks + block, row_scale)
    tl.store(codes + row * columns + column, e4m3(values, row_scale), mask=inside)


@triton.jit
def _static(x, factors, scale, codes, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if factors is not None:
        values *= tl.load(factors + row)
    tl.store(codes + row * columns + column, e4m3(values, tl.load(scale)), mask=inside)
