"""Paged causal attention, full or local to chunks, in CUDA: csrc/attention.cu."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llama4_kernels.counters import tickets
from llama4_kernels.cuda import _C, launch
from llama4_kernels.ops.types import dtype_name

HEAD_DIMS = (64, 128)
PARTIAL_BYTES = 1 << 27  # where the results of the splits of few or of many queries could take more, there are fewer splits


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
    if len(k_cache) == 0:  # so that every token is padding, and TMA takes no empty tensor
        return torch.zeros_like(q)
    out = torch.empty_like(q)
    tokens, num_heads, head_dim = q.shape
    pages, page_size, num_kv_heads, _ = k_cache.shape
    requests, device = len(seq_lens), q.device
    chunk_size = min(chunk_size or _C.ATTENTION_NO_CHUNK, _C.ATTENTION_NO_CHUNK)
    table_keys = page_table.shape[1] * (1 if page_table_holds == "slots" else page_size)
    few_rows = min(tokens, requests * _C.ATTENTION_FEW_QUERIES)
    few_splits = max_few_splits(few_rows * num_heads, head_dim, table_keys, chunk_size)
    few_parts = few_splits * _C.ATTENTION_FEW_PARTS
    few_partial = torch.empty(few_rows, num_heads, few_parts, head_dim, dtype=torch.float32, device=device)
    few_lse = torch.empty(few_rows, num_heads, few_parts, dtype=torch.float32, device=device)
    many_splits = max_many_splits(tokens * num_heads, head_dim, table_keys, chunk_size)
    many_parts = many_splits if many_splits > 1 else 0
    many_partial = torch.empty(tokens, num_heads, many_parts, head_dim, dtype=torch.float32, device=device)
    many_lse = torch.empty(tokens, num_heads, many_parts, dtype=torch.float32, device=device)
    many_blocks = tokens * (num_heads // num_kv_heads) // _C.ATTENTION_MANY_ROWS + requests
    counters = tickets(device, 1 + (requests + many_blocks) * num_kv_heads)
    _C.chunked_attention(
        q=q.data_ptr(),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        kv_dtype=launch.DTYPES[k_cache.dtype],
        out=out.data_ptr(),
        tokens=tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        slots=pages * page_size,
        page_size=page_size,
        holds_slots=page_table_holds == "slots",
        page_table=page_table.data_ptr(),
        page_table_stride=page_table.stride(0),
        requests=requests,
        page_table_rows=launch.indices(page_table_rows),
        slot_map=launch.indices(slot_map),
        seq_lens=seq_lens.data_ptr(),
        query_start_loc=query_start_loc.data_ptr(),
        chunk_size=chunk_size,
        scale=scale,
        k_scale=launch.address(k_scale),
        v_scale=launch.address(v_scale),
        few_partial=few_partial.data_ptr(),
        few_lse=few_lse.data_ptr(),
        few_tickets=counters[1:].data_ptr(),
        few_max_splits=few_splits,
        many_partial=many_partial.data_ptr(),
        many_lse=many_lse.data_ptr(),
        many_tickets=counters[1 + requests * num_kv_heads :].data_ptr(),
        many_max_splits=many_splits,
        drawn=counters.data_ptr(),
        stream=launch.stream(),
    )
    return out


def max_few_splits(rows: int, head_dim: int, table_keys: int, chunk_size: int) -> int:
    """Splits that the keys of few queries may have: as many as they can fill and memory allows, from shapes alone."""
    most_keys = min(table_keys, chunk_size + _C.ATTENTION_FEW_QUERIES)
    most_tiles = most_keys // _C.ATTENTION_TILE + 2  # the first and the last may be cut
    by_keys = -(-most_tiles // _C.ATTENTION_FEW_SPLIT_TILES)
    by_memory = PARTIAL_BYTES // max(4 * rows * head_dim * _C.ATTENTION_FEW_PARTS, 1)
    return max(min(_C.ATTENTION_FEW_MAX_SPLITS, by_keys, by_memory), 1)


def max_many_splits(rows: int, head_dim: int, table_keys: int, chunk_size: int) -> int:
    """Splits that the keys of many queries may have: as many as they can fill and memory allows, from shapes alone."""
    by_keys = (min(table_keys, chunk_size) // _C.ATTENTION_TILE + 2) // _C.ATTENTION_MANY_SPLIT_TILES
    by_memory = PARTIAL_BYTES // max(4 * rows * head_dim, 1)
    return max(min(_C.ATTENTION_MANY_MAX_SPLITS, by_keys, by_memory), 1)


def why_not_dtype(dtype: torch.dtype, name: str) -> str:
    return "" if dtype == torch.bfloat16 else f"{name} is {dtype_name(dtype)}, not bfloat16"


def why_not_chunked_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, seq_lens: Tensor, scale: float, **_) -> str:
    if reason := why_not_dtype(q.dtype, "q"):
        return reason
    if k_cache.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return f"the caches are {dtype_name(k_cache.dtype)}, not bfloat16 or float8_e4m3fn"
    if q.shape[2] not in HEAD_DIMS:
        return f"head_dim is {q.shape[2]}, not {' or '.join(map(str, HEAD_DIMS))}"
    if scale <= 0:
        return f"scale is {scale}, not above 0"
    if len(seq_lens) > _C.ATTENTION_MAX_REQUESTS:
        return f"there are {len(seq_lens)} requests, above {_C.ATTENTION_MAX_REQUESTS}"
    if any(tensor.data_ptr() % 16 for tensor in (q, k_cache, v_cache)):
        return "q or a cache does not start at a multiple of 16 bytes"
    return ""
