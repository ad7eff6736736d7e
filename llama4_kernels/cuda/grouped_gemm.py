"""Grouped GEMM over rows sorted by group, in CUDA: csrc/grouped_gemm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.cuda import _C, launch
from llama4_kernels.cuda.quantization import quantize_for
from llama4_kernels.ops.types import SCALE_BLOCK, Linear, Quantized, dtype_name, scale_of, values_of


def grouped_gemm(
    a: Tensor | Quantized, b: Linear, offsets: Tensor, *, rows: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    if isinstance(a, Tensor) and b.scale is not None:
        a = quantize_for(a, b)
    values, scale = values_of(a), scale_of(a)
    groups, n, k = b.weight.shape
    m = len(values) if rows is None else len(rows)
    out = torch.empty(m, n, dtype=out_dtype, device=values.device)
    _C.grouped_gemm(
        a=values.data_ptr(),
        b=b.weight.data_ptr(),
        dtype=launch.DTYPES[values.dtype],
        out=out.data_ptr(),
        out_dtype=launch.DTYPES[out_dtype],
        a_rows=len(values),
        m=m,
        n=n,
        k=k,
        groups=groups,
        offsets=offsets.data_ptr(),
        rows=launch.address(rows),
        a_scale=launch.address(scale),
        a_scale_dimensions=0 if scale is None else scale.dim(),
        b_scale=launch.address(b.scale),
        b_scale_dimensions=0 if b.scale is None else b.scale.dim(),
        stream=launch.stream(),
    )
    return out


def why_not_grouped_gemm(a: Tensor | Quantized, b: Linear, offsets: Tensor, **_kwargs) -> str:
    values = values_of(a)
    dtypes = {values.dtype, b.weight.dtype} - {torch.bfloat16} if b.scale is None else set()
    if dtypes:
        return f"{dtype_name(values.dtype)} is multiplied with {dtype_name(b.weight.dtype)}: the tensor cores take bfloat16 for both, or an fp8 weight"
    if len(b.weight) > _C.MAX_GEMM_GROUPS:
        return f"b has {len(b.weight)} groups, above {_C.MAX_GEMM_GROUPS}"
    row_bytes = b.weight.shape[2] * b.weight.element_size()
    if row_bytes == 0 or row_bytes % _C.GEMM_ROW_ALIGNMENT:
        return f"a row of b.weight has {row_bytes} bytes, not a multiple of {_C.GEMM_ROW_ALIGNMENT}"
    if isinstance(a, Tensor) and b.input_granularity == "block" and b.weight.shape[2] % SCALE_BLOCK:
        return f"K is {b.weight.shape[2]}, not a multiple of {SCALE_BLOCK}, and a is to be quantised per {SCALE_BLOCK} of it"
    for name, tensor in (("a", values), ("b.weight", b.weight)):
        if tensor.data_ptr() % _C.GEMM_ROW_ALIGNMENT:
            return f"{name} begins at an address that is not a multiple of {_C.GEMM_ROW_ALIGNMENT}"
    return ""
