"""What every launch through llama4_kernels.cuda._C needs of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.cuda import _C

DTYPES = {torch.bfloat16: _C.Dtype.bfloat16, torch.float32: _C.Dtype.float32, torch.float8_e4m3fn: _C.Dtype.float8_e4m3fn}


def address(tensor: Tensor | None) -> int:
    """Where `tensor` begins on its device, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def indices(tensor: Tensor | None) -> _C.Indices:
    """An int32 or int64 tensor, or None."""
    return _C.Indices(address(tensor), tensor is not None and tensor.dtype == torch.int64)


def stream() -> int:
    """The handle of the current device's current stream. llama4_kernels.ops.backend.call has made current the device of the tensors."""
    return torch.cuda.current_stream().cuda_stream
