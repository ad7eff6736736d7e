"""Quantisation of activations to FP8 e4m3."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops import backend, checks
from llama4_kernels.ops.types import Quantized


def quantize_per_token(x: Tensor) -> Quantized:
    """Quantise each row to e4m3 with its own scale: scale[t] = max|x[t]| / 448, codes[t] = e4m3(x[t] / scale[t]).

    x: [T, K] bfloat16 or float32, contiguous.
    Returns codes [T, K] float8_e4m3fn, rounded to nearest even and saturated to ±448, and scale [T] float32. A row of zeros has scale
    0 and codes 0; a row with a NaN or infinity has a non-finite scale, and other rows are not touched by it.
    Raises TypeError or ValueError for a wrong dtype, shape or layout; BackendError where a backend is asked for that cannot compute it;
    RuntimeError in a backward pass.

    >>> import torch
    >>> from llama4_kernels import ops
    >>> q = ops.quantize_per_token(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> q.codes.float()
    tensor([[ 224., -448.],
            [   0.,    0.]])
    >>> q.scale * 448
    tensor([2., 0.])
    """
    checks.tensor("quantize_per_token", "x", x, dtype=checks.FLOATS, shape=("T", "K"))
    return Quantized(*torch.ops.llama4_kernels.quantize_per_token(x))


@torch.library.custom_op("llama4_kernels::quantize_per_token", mutates_args=())
def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    quantized = backend.call("quantize_per_token", x.device, x)
    return quantized.codes, quantized.scale


@_quantize_per_token.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=checks.FP8), x.new_empty(x.shape[0], dtype=torch.float32)
