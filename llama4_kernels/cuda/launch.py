"""What every launch through llama4_kernels.cuda._C needs of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from llama4_kernels.cuda import _C

DTYPES = {torch.bfloat16: _C.Dtype.bfloat16, torch.float32: _C.Dtype.float32}


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[int]:
    """Make `device` current; gives the handle of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
