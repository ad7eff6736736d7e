"""Paged causal attention, full or local to chunks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MAX_SCORES = 1 << 25  # in memory at a time: 128 MB


def chunked_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    page_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    chunk_size: int | None,
    scale: float,
    page_table_rows: Tensor | None = None,
    page_table_holds: Literal["pages", "slots"] = "pages",
    slot_map: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    out = torch.zeros_like(q)
    starts = query_start_loc.tolist()
    rows = range(len(seq_lens)) if page_table_rows is None else page_table_rows.tolist()
    for row, start, end, keys in zip(rows, starts, starts[1:], seq_lens.tolist()):
        if start == end:
            continue
        position = keys - (end - start)
        block = max(1, MAX_SCORES // (q.shape[1] * (keys - chunk_start(position, chunk_size))))
        for first in range(start, end, block):
            last = min(first + block, end)
            low, high = chunk_start(position + first - start, chunk_size), position + last - start
            slots = read_slots(page_table[row], low, high, k_cache.shape[1], page_table_holds, slot_map)
            k, v = _gather(k_cache, slots, k_scale), _gather(v_cache, slots, v_scale)
            query_positions = torch.arange(high - (last - first), high, device=q.device)[:, None]
            key_positions = torch.arange(low, high, device=q.device)
            visible = key_positions <= query_positions
            if chunk_size is not None:
                visible &= key_positions // chunk_size == query_positions // chunk_size
            out[first:last] = _attend(q[first:last].float() * scale, k, v, visible)
    return out


def chunk_start(position: int, chunk_size: int | None) -> int:
    """The first position that a query at `position` sees."""
    return 0 if chunk_size is None else position // chunk_size * chunk_size


def read_slots(row: Tensor, low: int, high: int, page_size: int, holds: str, slot_map: Tensor | None) -> Tensor:
    """The slots of positions low to high, from the only entries of a page table's row that hold them."""
    if holds == "slots":
        slots = row[low:high].long()
        return slots if slot_map is None else slot_map[slots].long()
    first_page = low // page_size
    pages = row[first_page : -(-high // page_size)].long()
    slots = (pages[:, None] * page_size + torch.arange(page_size, device=row.device)).flatten()
    return slots[low - first_page * page_size : high - first_page * page_size]


def _gather(cache: Tensor, slots: Tensor, scale: Tensor | None) -> Tensor:
    """[num_kv_heads, keys, D] float32."""
    values = cache.flatten(0, 1)[slots].float().transpose(0, 1)
    return values if scale is None else values * scale


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [n, num_heads, D], already scaled; k, v [num_kv_heads, keys, D]; visible [n, keys]. All in float32."""
    grouped = q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # [num_kv_heads, heads per kv head, n, D]
    scores = (grouped @ k[:, None].transpose(-1, -2)).masked_fill(~visible, float("-inf"))
    out = _weighted_sum(scores.softmax(-1), v[:, None], visible)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _weighted_sum(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """weights · v, where a NaN or infinity in v reaches only the queries that see it, as NaN: 0 · NaN must not count."""
    finite = v.isfinite()
    out = weights @ v.where(finite, 0)
    return out if finite.all() else out.masked_fill(visible.float() @ (~finite).float() > 0, float("nan"))
