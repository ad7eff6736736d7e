"""What every launch through llama4_kernels.cuda._C needs of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[int]:
    """Make `device` current; gives the handle of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
