"""RoPE, qk-norm, attention temperature and the KV-cache write."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from llama4_kernels.ops import backend, checks


@overload
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
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    slot_map: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor: ...


@overload
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
    k_cache: None = None,
    v_cache: None = None,
    slots: None = None,
    slot_map: None = None,
    k_scale: None = None,
    v_scale: None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


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
    """What comes between the qkv projection and attention, each step where its argument is given, in this order, in fp32:

    1. cos_sin: RoPE of q and k. A pair (a, b) of a head at position p becomes (a · cos − b · sin, a · sin + b · cos), with
       cos = cos_sin[p, i] and sin = cos_sin[p, D/2 + i] for pair i. `apply_rotary_emb` of Hugging Face transformers
       (modeling_llama4.py) is interleaved=True: pairs (2i, 2i + 1). interleaved=False: pairs (i, i + D/2).
    2. qk_norm_eps: x · rsqrt(mean(x²) + eps) of each q and k head, without weight (`Llama4TextL2Norm`).
    3. temperature = (attn_scale, floor_scale): q · (1 + attn_scale · ln(1 + ⌊(p + 1) / floor_scale⌋)), for layers without RoPE
       (`Llama4TextAttention`). The floor is exact at any position.
    4. k_cache, v_cache: each token's k and v are written to its slot.

    All tensors are contiguous.

    qkv: [T, (num_heads + 2 · num_kv_heads) · D] bfloat16 or float32, q | k | v. positions: [T] int32 or int64.
    num_heads, num_kv_heads: of q, and of k and v each; both at least 1, on this tensor-parallel rank.
    head_dim: D, even. cos_sin: [max_position, D] float32, D/2 cosines, then D/2 sines.
    k_cache, v_cache: [pages, page_size, num_kv_heads, D] bfloat16, float32 or float8_e4m3fn; written in place, and no memory is both's.
    slots: [T] int64, page · page_size + offset in the page; a token with slot −1 is not written. Required with the caches.
        Each element of a slot that is named more than once ends up as one of those tokens has it.
    slot_map: [slots] int32 or int64, only with the caches: a token is written to slot_map[slot] instead, or not at all where that is −1.
    k_scale, v_scale: float32 [] or [1], finite and at least 0, only with fp8 caches: codes = e4m3(k / k_scale), saturated to ±448, and 0
        where the scale is 0; None is 1.
    Returns q [T, num_heads, D] in qkv's dtype; without caches (q, k, v), k and v [T, num_kv_heads, D]. Each rounded once.
    Raises TypeError or ValueError for a wrong dtype, shape, device or layout, for a qk_norm_eps that is negative, for it or an attn_scale
    that is not finite, for a floor_scale below 1, and on the CPU (on a GPU with LLAMA4_KERNELS_CHECK_VALUES=1) for positions outside
    cos_sin, slots outside the caches and scales out of range; BackendError where a backend is asked for that cannot compute it;
    RuntimeError in a backward pass.

    >>> import torch
    >>> from llama4_kernels import ops
    >>> cos_sin = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # position 1 turns by 90 degrees
    >>> qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    >>> q, k, v = ops.rope_qk_norm(qkv, torch.tensor([1]), num_heads=1, num_kv_heads=1, head_dim=2, cos_sin=cos_sin)
    >>> q, k, v
    (tensor([[[-2.,  1.]]]), tensor([[[-4.,  3.]]]), tensor([[[5., 6.]]]))
    """
    op = "rope_qk_norm"
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        checks.integer(op, name, value)
    if head_dim % 2:
        raise ValueError(f"{op}: head_dim is {head_dim}, needs to be even")
    checks.tensor(op, "qkv", qkv, dtype=checks.FLOATS, shape=("T", (num_heads + 2 * num_kv_heads) * head_dim))
    tokens, device = len(qkv), qkv.device
    checks.tensor(op, "positions", positions, dtype=checks.INTEGERS, shape=(tokens,), device=device)
    if cos_sin is not None:
        checks.tensor(op, "cos_sin", cos_sin, dtype=torch.float32, shape=("max_position", head_dim), device=device)
    checks.flag(op, "interleaved", interleaved)
    if qk_norm_eps is not None:
        checks.number(op, "qk_norm_eps", qk_norm_eps, least=0)
    if temperature is not None:
        _check_temperature(op, temperature)
    _check_caches(op, k_cache, v_cache, slots, slot_map, k_scale, v_scale, tokens, num_kv_heads, head_dim, device)
    attn_scale, floor_scale = (None, None) if temperature is None else temperature
    q, k, v = torch.ops.llama4_kernels.rope_qk_norm(
        qkv, positions, num_heads, num_kv_heads, head_dim, cos_sin, interleaved, qk_norm_eps, attn_scale, floor_scale,
        k_cache, v_cache, slots, slot_map, k_scale, v_scale,
    )  # fmt: skip
    return (q, k, v) if k_cache is None else q


def _check_temperature(op: str, value: object) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        error = ValueError if isinstance(value, (tuple, list)) else TypeError
        raise error(f"{op}: temperature is {value!r}, needs (attn_scale, floor_scale)")
    attn_scale, floor_scale = value
    checks.number(op, "attn_scale of temperature", attn_scale)
    checks.integer(op, "floor_scale of temperature", floor_scale)


def _check_caches(
    op: str,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slots: Tensor | None,
    slot_map: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tokens: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
) -> None:
    given = {"k_cache": k_cache, "v_cache": v_cache, "slots": slots}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        for name, value in (("slot_map", slot_map), ("k_scale", k_scale), ("v_scale", v_scale)):
            if value is not None:
                raise ValueError(f"{op}: {name} is given without k_cache and v_cache, needs them")
        return
    if missing:
        raise ValueError(f"{op}: {missing[0]} is None, needs a Tensor: k_cache, v_cache and slots go together")
    checks.kv_caches(op, k_cache, v_cache, k_scale, v_scale, num_kv_heads=num_kv_heads, head_dim=head_dim, device=device)
    checks.tensor(op, "slots", slots, dtype=torch.int64, shape=(tokens,), device=device)
    if slot_map is not None:
        checks.tensor(op, "slot_map", slot_map, dtype=checks.INTEGERS, shape=("slots",), device=device)


@torch.library.custom_op("llama4_kernels::rope_qk_norm", mutates_args=("k_cache", "v_cache"))
def _rope_qk_norm(
    qkv: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos_sin: Tensor | None,
    interleaved: bool,
    qk_norm_eps: float | None,
    attn_scale: float | None,
    floor_scale: int | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slots: Tensor | None,
    slot_map: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if k_cache is not None:
        checks.own_memory("rope_qk_norm", "v_cache", v_cache, "k_cache", k_cache)
    if checks.values_wanted(qkv.device):
        checks.scale_values("rope_qk_norm", "k_scale", k_scale)
        checks.scale_values("rope_qk_norm", "v_scale", v_scale)
        if cos_sin is not None:
            checks.in_range("rope_qk_norm", "positions", positions, 0, len(cos_sin), f"the {len(cos_sin)} rows of cos_sin")
        elif floor_scale is not None:
            checks.in_range("rope_qk_norm", "positions", positions, 0, torch.iinfo(positions.dtype).max)
        if slots is not None:
            pages, page_size = k_cache.shape[:2]
            why = f"−1 or one of {pages} pages of {page_size}"
            if slot_map is None:
                checks.in_range("rope_qk_norm", "slots", slots, -1, pages * page_size, why)
            else:
                checks.in_range("rope_qk_norm", "slots", slots, -1, len(slot_map), f"−1 or one of the {len(slot_map)} slots of slot_map")
                checks.in_range("rope_qk_norm", "slot_map", slot_map[slots[slots >= 0]], -1, pages * page_size, why)
    result = backend.call(
        "rope_qk_norm",
        qkv.device,
        qkv,
        positions,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        cos_sin=cos_sin,
        interleaved=interleaved,
        qk_norm_eps=qk_norm_eps,
        temperature=None if attn_scale is None else (attn_scale, floor_scale),
        k_cache=k_cache,
        v_cache=v_cache,
        slots=slots,
        slot_map=slot_map,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return result if k_cache is None else (result, qkv.new_empty(0), qkv.new_empty(0))


@_rope_qk_norm.register_fake
def _(
    qkv: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos_sin: Tensor | None,
    interleaved: bool,
    qk_norm_eps: float | None,
    attn_scale: float | None,
    floor_scale: int | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slots: Tensor | None,
    slot_map: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, num_heads, head_dim)
    if k_cache is not None:
        return q, qkv.new_empty(0), qkv.new_empty(0)
    return q, qkv.new_empty(tokens, num_kv_heads, head_dim), qkv.new_empty(tokens, num_kv_heads, head_dim)
