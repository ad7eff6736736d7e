"""RoPE, qk-norm, attention temperature and the KV-cache write."""

from __future__ import annotations

import torch
from torch import Tensor

from llama4_kernels.reference.quantization import quantize_static


def rope_qk_norm(
    qkv: Tensor,
    positions: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos_sin: Tensor | None = None,
    interleaved: bool = False,
    qk_norm_eps: float | None = None,
    temperature: tuple[float, int] | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    slot_map: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    heads = qkv.float().unflatten(1, (-1, head_dim))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    if cos_sin is not None:
        cos, sin = cos_sin[positions][:, None].chunk(2, -1)
        q, k = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    if qk_norm_eps is not None:
        q, k = _normalise(q, qk_norm_eps), _normalise(k, qk_norm_eps)
    if temperature is not None:
        attn_scale, floor_scale = temperature
        steps = ((positions.long() + 1) // floor_scale).float()
        q = q * (1 + attn_scale * steps.log1p())[:, None, None]

    if k_cache is None:
        return _rounded(q, qkv.dtype), _rounded(k, qkv.dtype), _rounded(v, qkv.dtype)
    if slot_map is not None:
        written = slots >= 0
        slots = slots.masked_scatter(written, slot_map[slots[written]].long())
    _write(k_cache, slots, k, k_scale)
    _write(v_cache, slots, v, v_scale)
    return _rounded(q, qkv.dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        pairs = x.unflatten(-1, (-1, 2))
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = x.chunk(2, -1)
    rotated = first * cos - second * sin, first * sin + second * cos
    return torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _write(cache: Tensor, slots: Tensor, values: Tensor, scale: Tensor | None) -> None:
    written = slots >= 0
    values = values[written]
    if cache.dtype == torch.float8_e4m3fn:
        values = quantize_static(values, torch.ones(()) if scale is None else scale).codes
    cache.flatten(0, 1)[slots[written]] = values.to(cache.dtype)
