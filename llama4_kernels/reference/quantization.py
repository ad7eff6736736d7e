"""FP8 e4m3 quantisation in every form that checkpoints ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.ops.types import SCALE_BLOCK, Linear, Quantized

E4M3_MAX = 448.0


def full_range(largest: Tensor) -> Tensor:
    """The scales with which the largest magnitudes become 448, float32."""
    return largest / torch.full_like(largest, E4M3_MAX)  # by a number torch multiplies with its reciprocal on a GPU, off in the last bit


def quantize_per_token(x: Tensor) -> Quantized:
    scale = full_range(torch.nn.functional.pad(x.float().abs(), (0, 1)).amax(-1))  # a row may have no columns
    return Quantized(_encode(x, scale[:, None]), scale)


def quantize_per_block(x: Tensor) -> Quantized:
    """One scale per row and 128 columns; the last block of a row may be shorter."""
    blocks = torch.nn.functional.pad(x.float().abs(), (0, -x.shape[-1] % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK))
    scale = full_range(blocks.amax(-1))
    return Quantized(_encode(x, _spread(scale, 1, x.shape[1])), scale)


def quantize_static(x: Tensor, scale: Tensor) -> Quantized:
    """One given scale for the whole tensor; values beyond ±448 · scale saturate."""
    return Quantized(_encode(x, scale), scale)


def quantize_for(x: Tensor, linear: Linear) -> Quantized:
    """x in the form that the fp8 weight `linear` is multiplied with."""
    if linear.input_granularity == "tensor":
        return quantize_static(x, linear.input_scale)
    return quantize_per_block(x) if linear.input_granularity == "block" else quantize_per_token(x)


def dequantize(x: Tensor | Quantized) -> Tensor:
    """x in float32."""
    if isinstance(x, Tensor):
        return x.float()
    scale = x.scale
    if x.granularity == "block":
        scale = _spread(scale, 1, x.codes.shape[1])
    elif x.granularity == "row":
        scale = scale[:, None]
    return x.codes.float() * scale


def dequantize_weight(linear: Linear, index: int | None = None) -> Tensor:
    """One weight [N, K] of `linear` in float32: the whole of it, or the one at `index` of a stack."""
    weight, scale = linear.weight, linear.scale
    if index is not None:
        weight, scale = weight[index], None if scale is None else scale[index]
    if scale is None:
        return weight.float()
    if linear.granularity == "block":
        scale = _spread(_spread(scale, 0, weight.shape[0]), 1, weight.shape[1])
    elif linear.granularity == "channel":
        scale = scale[:, None]
    return weight.float() * scale


def _spread(scale: Tensor, dim: int, size: int) -> Tensor:
    """Repeat each block's scale for the SCALE_BLOCK elements that it covers; the last block ends at `size`."""
    return scale.repeat_interleave(SCALE_BLOCK, dim).narrow(dim, 0, size)


def _encode(x: Tensor, scale: Tensor) -> Tensor:
    scaled = torch.where(scale == 0, 0.0, x.float() / scale)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
