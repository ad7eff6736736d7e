"""Grouped GEMM over rows sorted by group."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops.types import Linear, Quantized
from llama4_kernels.reference.quantization import dequantize, dequantize_weight, quantize_for


def grouped_gemm(
    a: Tensor | Quantized, b: Linear, offsets: Tensor, *, rows: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    if isinstance(a, Tensor) and b.scale is not None:
        a = quantize_for(a, b)
    a = dequantize(a)
    if rows is not None:
        written = int(offsets[-1])
        a = torch.nn.functional.pad(a[rows[:written]], (0, 0, 0, len(rows) - written))
    return multiply(a, b, offsets).to(out_dtype)


def multiply(a: Tensor, b: Linear, offsets: Tensor) -> Tensor:
    """a [M, K] float32 times each group's weight, in float32; rows past the last group stay zero."""
    out = a.new_zeros(len(a), b.weight.shape[1])
    bounds = offsets.tolist()
    for group, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if start < end:
            out[start:end] = a[start:end] @ dequantize_weight(b, group).t()
    return out
