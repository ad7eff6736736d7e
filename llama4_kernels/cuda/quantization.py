"""FP8 e4m3 quantisation in CUDA: csrc/quantization.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.cuda import _C, launch
from llama4_kernels.ops.types import Quantized


def quantize_per_token(x: Tensor) -> Quantized:
    rows, columns = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    with launch.on(x.device) as stream:
        _C.quantize_per_token(
            x=x.data_ptr(),
            dtype=launch.DTYPES[x.dtype],
            rows=rows,
            columns=columns,
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            stream=stream,
        )
    return Quantized(codes, scale)
