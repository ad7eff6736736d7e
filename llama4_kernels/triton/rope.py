"""RoPE, qk-norm, attention temperature and the KV-cache write, in one launch.

A row is one head of one token, of q, k and v alike. A program holds ROWS of them, as the two halves of each head that RoPE pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama4_kernels.triton.quantization import e4m3, why_not_e4m3

ROWS = 16


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
    tokens = len(qkv)
    q = qkv.new_empty(tokens, num_heads, head_dim)
    k, v = k_cache, v_cache
    if k_cache is None:
        k, v = (qkv.new_empty(tokens, num_kv_heads, head_dim) for _ in range(2))
    attn_scale, floor_scale = temperature or (None, None)
    if tokens:
        rows = tokens * (num_heads + 2 * num_kv_heads)
        _rope_kernel[(triton.cdiv(rows, ROWS),)](
            qkv, positions, cos_sin, q, k, v, slots, slot_map, k_scale, v_scale, rows, qk_norm_eps, attn_scale, floor_scale,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            INTERLEAVED=interleaved, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return (q, k, v) if k_cache is None else q


def why_not_rope_qk_norm(qkv: Tensor, positions: Tensor, *, k_cache: Tensor | None = None, **_) -> str:
    return why_not_e4m3(qkv.device) if k_cache is not None and k_cache.dtype == torch.float8_e4m3fn else ""


@triton.jit
def _cached(x, scale, dtype: tl.constexpr):
    """x as the cache holds it."""
    if dtype == tl.float8e4nv:
        if scale is None:
            return e4m3(x, tl.full(x.shape, 1.0, tl.float32))
        else:
            return e4m3(x, tl.load(scale) + tl.zeros(x.shape, tl.float32))
    else:
        return x.to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _rope_kernel(
    qkv, positions, cos_sin, q, k, v, slots, slot_map, k_scale, v_scale, rows, qk_norm_eps, attn_scale, floor_scale,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    token, head = row // HEADS, row % HEADS
    pair = tl.arange(0, BLOCK_HALF)
    inside = exists[:, None] & (pair < HALF)[None, :]
    if INTERLEAVED:
        dim, partner = 2 * pair, 1
    else:
        dim, partner = pair, HALF
    source = qkv + row[:, None] * (2 * HALF) + dim[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    is_q, is_v = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    position = tl.load(positions + token, mask=exists, other=0).to(tl.int64)

    first, second = a, b
    if cos_sin is not None:
        turned = inside & ~is_v[:, None]
        angle = cos_sin + position[:, None] * (2 * HALF) + pair[None, :]
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + HALF, mask=turned, other=0.0)
        first, second = a * cos - b * sin, a * sin + b * cos
    if qk_norm_eps is not None:
        mean = tl.sum(first * first + second * second, 1) / (2 * HALF)
        factor = tl.rsqrt(mean + qk_norm_eps)[:, None]
        first, second = first * factor, second * factor
    if attn_scale is not None:
        steps = (position + 1) // floor_scale
        factor = (1.0 + attn_scale * tl.log(1.0 + steps.to(tl.float32)))[:, None]
        first, second = tl.where(is_q[:, None], first * factor, first), tl.where(is_q[:, None], second * factor, second)

    target = q + ((token * NUM_HEADS + head) * (2 * HALF))[:, None] + dim[None, :]
    writes = inside & is_q[:, None]
    tl.store(target, first.to(q.dtype.element_ty), mask=writes)
    tl.store(target + partner, second.to(q.dtype.element_ty), mask=writes)

    slot = token
    if slots is not None:
        slot = tl.load(slots + token, mask=exists, other=-1)
    if slot_map is not None:
        slot = tl.load(slot_map + slot, mask=exists & (slot >= 0), other=-1).to(tl.int64)
    stored = inside & (slot >= 0)[:, None]
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    target = ((slot * NUM_KV_HEADS + kv_head) * (2 * HALF))[:, None] + dim[None, :]
    writes = stored & ~(is_q | is_v)[:, None]
    tl.store(k + target, _cached(first, k_scale, k.dtype.element_ty), mask=writes)
    tl.store(k + target + partner, _cached(second, k_scale, k.dtype.element_ty), mask=writes)
    writes = stored & is_v[:, None]
    tl.store(v + target, _cached(a, v_scale, v.dtype.element_ty), mask=writes)
    tl.store(v + target + partner, _cached(b, v_scale, v.dtype.element_ty), mask=writes)
