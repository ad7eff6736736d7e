"""Paged causal attention, full or local to chunks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llama4_kernels.ops import backend, checks


def chunked_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    page_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    chunk_size: int | None,
    scale: float | None = None,
    page_table_rows: Tensor | None = None,
    page_table_holds: Literal["pages", "slots"] = "pages",
    slot_map: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of B requests' new tokens to their keys in a paged KV cache: prefill, decode, or a mix of both.

    The query at position p sees the key at position j where j ≤ p and, with a chunk_size C, ⌊j / C⌋ = ⌊p / C⌋ (the mask of
    `create_chunked_causal_mask` in Hugging Face transformers): softmax(scale · q · kᵀ) · v over those, in fp32. Query i of a request
    with n queries stands at position seq_lens − n + i; all its keys, those of the new tokens too, are in the caches already.

    All tensors are contiguous, but page_table's rows may be strided.

    q: [Tq, Hq, D] bfloat16 or float32, the requests one after another.
    k_cache, v_cache: [pages, page_size, Hkv, D] bfloat16, float32 or float8_e4m3fn. Hq is a multiple of Hkv; query head h
        uses KV head h // (Hq / Hkv).
    query_start_loc: [B + 1] int32, rows query_start_loc[b] to query_start_loc[b + 1] of q are request b's, and there may be none. Rows
        from query_start_loc[B] on are padding, and come out as zeros.
    seq_lens: [B] int32, how many keys a request has in all.
    page_table: [R, L] int32. With page_table_holds "pages", position j of a request is at offset j % page_size of
        page page_table[row, j // page_size]; with "slots" it is at slot page_table[row, j] = page · page_size + offset.
    page_table_rows: [B] int32 or int64, each request's row of page_table; None is row b for request b.
    slot_map: [slots] int32 or int64, only with "slots": the slot in these caches for each slot in page_table.
    chunk_size: C ≥ 1, or None for full causal attention. scale: finite; None is 1 / √D.
    k_scale, v_scale: float32 [] or [1], finite and at least 0, only with fp8 caches: k = codes · k_scale; None is 1.
    Returns [Tq, Hq, D] in q's dtype. Only entries of page_table and keys that some query of the request sees are read: what stands
    elsewhere, NaN included, does not matter.
    Raises TypeError or ValueError for a wrong dtype, shape, device or layout, and on the CPU (on a GPU with LLAMA4_KERNELS_CHECK_VALUES=1)
    for lengths, rows, pages, slots or scales out of range; BackendError where a backend is asked for that cannot compute it; RuntimeError
    in a backward pass.

    >>> import torch
    >>> from llama4_kernels import ops
    >>> k_cache, v_cache = torch.zeros(4, 1, 1, 2), torch.arange(8.0).view(4, 1, 1, 2)
    >>> table = torch.tensor([[3, 2, 1, 0]], dtype=torch.int32)
    >>> one, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    >>> ops.chunked_attention(torch.ones(1, 1, 2), k_cache, v_cache, page_table=table, seq_lens=lens, query_start_loc=one, chunk_size=2)
    tensor([[[1., 2.]]])
    >>> ops.chunked_attention(torch.ones(1, 1, 2), k_cache, v_cache, page_table=table, seq_lens=lens, query_start_loc=one, chunk_size=None)
    tensor([[[3., 4.]]])
    """
    op = "chunked_attention"
    checks.tensor(op, "q", q, dtype=checks.FLOATS, shape=("Tq", "Hq", "D"))
    device, (_, num_heads, head_dim) = q.device, q.shape
    checks.kv_caches(op, k_cache, v_cache, k_scale, v_scale, num_kv_heads="Hkv", head_dim=head_dim, device=device)
    num_kv_heads = k_cache.shape[2]
    if num_heads == 0 or head_dim == 0:
        raise ValueError(f"{op}: q has shape {list(q.shape)}, needs at least one head and one dimension")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: q has {num_heads} heads, needs a multiple of the caches' {num_kv_heads}")
    checks.tensor(op, "seq_lens", seq_lens, dtype=torch.int32, shape=("B",), device=device)
    requests = len(seq_lens)
    checks.tensor(op, "query_start_loc", query_start_loc, dtype=torch.int32, shape=(requests + 1,), device=device)
    checks.tensor(op, "page_table", page_table, dtype=torch.int32, shape=("R", "L"), device=device, contiguous=False)
    if page_table.stride(1) != 1 and page_table.shape[1] > 1:
        raise ValueError(f"{op}: page_table has strides {list(page_table.stride())}, needs a last stride of 1")
    if page_table_rows is not None:
        checks.tensor(op, "page_table_rows", page_table_rows, dtype=checks.INTEGERS, shape=(requests,), device=device)
    elif len(page_table) < requests:
        raise ValueError(f"{op}: page_table has {len(page_table)} rows, needs one for each of the {requests} requests, or page_table_rows")
    if page_table_holds not in ("pages", "slots"):
        raise ValueError(f"{op}: page_table_holds is {page_table_holds!r}, needs 'pages' or 'slots'")
    if slot_map is not None:
        if page_table_holds == "pages":
            raise ValueError(f"{op}: slot_map is given with page_table_holds='pages', needs 'slots'")
        checks.tensor(op, "slot_map", slot_map, dtype=checks.INTEGERS, shape=("slots",), device=device)
    if chunk_size is not None:
        checks.integer(op, "chunk_size", chunk_size, needs="an int of at least 1, or None for full causal attention")
    if scale is not None:
        checks.number(op, "scale", scale)
    return torch.ops.llama4_kernels.chunked_attention(
        q, k_cache, v_cache, page_table, seq_lens, query_start_loc, chunk_size, head_dim**-0.5 if scale is None else scale,
        page_table_rows, page_table_holds, slot_map, k_scale, v_scale,
    )  # fmt: skip


@torch.library.custom_op("llama4_kernels::chunked_attention", mutates_args=())
def _chunked_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    chunk_size: int | None,
    scale: float,
    page_table_rows: Tensor | None,
    page_table_holds: str,
    slot_map: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    if checks.values_wanted(q.device):
        checks.scale_values("chunked_attention", "k_scale", k_scale)
        checks.scale_values("chunked_attention", "v_scale", v_scale)
        _check_values(q, k_cache, page_table, seq_lens, query_start_loc, chunk_size, page_table_rows, page_table_holds, slot_map)
    return backend.call(
        "chunked_attention",
        q.device,
        q,
        k_cache,
        v_cache,
        page_table=page_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        chunk_size=chunk_size,
        scale=scale,
        page_table_rows=page_table_rows,
        page_table_holds=page_table_holds,
        slot_map=slot_map,
        k_scale=k_scale,
        v_scale=v_scale,
    )


@_chunked_attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    chunk_size: int | None,
    scale: float,
    page_table_rows: Tensor | None,
    page_table_holds: str,
    slot_map: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    return torch.empty_like(q)


def _check_values(
    q: Tensor,
    k_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    chunk_size: int | None,
    page_table_rows: Tensor | None,
    page_table_holds: str,
    slot_map: Tensor | None,
) -> None:
    """Check every index that leads to a key, and no entry of the page table that is not read."""
    op = "chunked_attention"
    checks.offsets(op, "query_start_loc", query_start_loc, len(q))
    queries = query_start_loc.diff()
    active = queries > 0
    if not active.any():
        return
    lens, queries = seq_lens[active].long(), queries[active].long()
    if (lens < queries).any():
        needs = f"at least each request's number of queries, {query_start_loc.diff().tolist()}"
        raise ValueError(f"{op}: seq_lens is {seq_lens.tolist()}, needs {needs}")
    rows = torch.arange(len(seq_lens), device=q.device) if page_table_rows is None else page_table_rows
    checks.in_range(op, "page_table_rows", rows[active], 0, len(page_table), f"the {len(page_table)} rows of page_table")
    pages, page_size = k_cache.shape[:2]
    step = page_size if page_table_holds == "pages" else 1
    width = -(-int(lens.max()) // step)
    if width > page_table.shape[1]:
        raise ValueError(f"{op}: page_table has {page_table.shape[1]} columns, needs {width} for seq_lens up to {int(lens.max())}")
    first = lens - queries
    first = torch.zeros_like(first) if chunk_size is None else first // chunk_size * chunk_size
    spans = zip(rows[active].tolist(), first.tolist(), lens.tolist())
    read = torch.cat([page_table[row, low // step : -(-high // step)] for row, low, high in spans])
    if page_table_holds == "pages":
        checks.in_range(op, "page_table", read, 0, pages, f"the {pages} pages of the caches")
        return
    slots = pages * page_size
    if slot_map is None:
        checks.in_range(op, "page_table", read, 0, slots, f"the {slots} slots of the caches")
    else:
        checks.in_range(op, "page_table", read, 0, len(slot_map), f"the {len(slot_map)} slots of slot_map")
        checks.in_range(op, "slot_map", slot_map[read], 0, slots, f"the {slots} slots of the caches")
