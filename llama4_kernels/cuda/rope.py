"""RoPE, qk-norm, attention temperature and the KV-cache write in CUDA: csrc/rope.cu."""

from __future__ import annotations

from torch import Tensor

from llama4_kernels.cuda import _C, launch


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
    attn_scale, floor_scale = temperature or (0.0, 0)
    _C.rope_qk_norm(
        qkv=qkv.data_ptr(),
        dtype=launch.DTYPES[qkv.dtype],
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        kv_dtype=launch.DTYPES[k.dtype],
        tokens=tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        positions=launch.indices(positions),
        cos_sin=launch.address(cos_sin),
        interleaved=interleaved,
        qk_norm_eps=qk_norm_eps,
        attn_scale=attn_scale,
        floor_scale=floor_scale,
        slots=launch.address(slots),
        slot_map=launch.indices(slot_map),
        k_scale=launch.address(k_scale),
        v_scale=launch.address(v_scale),
        stream=launch.stream(),
    )
    return (q, k, v) if k_cache is None else q


def why_not_rope_qk_norm(*_args, head_dim: int, **_kwargs) -> str:
    return f"head_dim is {head_dim}, above {_C.MAX_ROPE_HEAD_DIM}" if head_dim > _C.MAX_ROPE_HEAD_DIM else ""
