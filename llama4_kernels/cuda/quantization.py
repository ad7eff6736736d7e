"""FP8 e4m3 quantisation in CUDA: csrc/quantization.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.cuda import _C, launch
from llama4_kernels.ops.types import SCALE_BLOCK, Linear, Quantized


def quantize_per_token(x: Tensor) -> Quantized:
    rows, columns = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    _C.quantize_per_token(
        x=x.data_ptr(),
        dtype=launch.DTYPES[x.dtype],
        rows=rows,
        columns=columns,
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        stream=launch.stream(),
    )
    return Quantized(codes, scale)


def quantize_static(x: Tensor, scale: Tensor) -> Quantized:
    """One given scale [] for the whole tensor; values beyond ±448 · scale saturate."""
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _C.quantize_static(
        x=x.data_ptr(),
        dtype=launch.DTYPES[x.dtype],
        elements=x.numel(),
        scale=scale.data_ptr(),
        codes=codes.data_ptr(),
        stream=launch.stream(),
    )
    return Quantized(codes, scale)


def quantize_per_block(x: Tensor) -> Quantized:
    """One scale per row and 128 columns, whose number is a multiple of 128."""
    rows, columns = x.shape
    blocks = quantize_per_token(x.view(-1, SCALE_BLOCK))
    return Quantized(blocks.codes.view(rows, columns), blocks.scale.view(rows, columns // SCALE_BLOCK))


def quantize_for(x: Tensor, linear: Linear) -> Quantized:
    """x in the form that the fp8 weight `linear` is multiplied with."""
    if linear.input_granularity == "tensor":
        return quantize_static(x, linear.input_scale)
    return quantize_per_block(x) if linear.input_granularity == "block" else quantize_per_token(x)
