"""Paged causal attention, full or local to chunks: which kernels run is chosen from shapes alone.

Where requests have SHORT queries or fewer on average, all go to the split kernel; a single request with more goes to the prefill kernel;
else both run, and each takes the requests that are its own.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
from torch import Tensor

from llama4_kernels.triton import config
from llama4_kernels.triton.attention_decode import combine_kernel, split_kernel
from llama4_kernels.triton.attention_prefill import prefill_kernel, tiles
from llama4_kernels.triton.quantization import why_not_e4m3

SHORT = 8
MAX_SPLITS = 128
MOST_DIMS = 512  # of a head: the smallest tiles of more fill the shared memory of small GPUs
PARTIAL_BYTES = 1 << 26  # where the splits' results would take more, there are fewer splits
NO_CHUNK = 1 << 30


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
    out = torch.empty_like(q)
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens == 0:
        return out
    num_requests, device = len(seq_lens), q.device
    page_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    chunk_size = min(chunk_size or NO_CHUNK, NO_CHUNK)
    holds_slots = page_table_holds == "slots"
    keys = (page_table, page_table_rows, slot_map, seq_lens, query_start_loc, k_scale, v_scale)
    scale_in_bits = scale * math.log2(math.e)
    heads = dict(GROUP=group, HEAD_DIM=head_dim, BLOCK_D=max(triton.next_power_of_2(head_dim), 16))
    paging = dict(PAGE_SIZE=page_size, HOLDS_SLOTS=holds_slots)
    dtype = torch.float32 if torch.float32 in (q.dtype, k_cache.dtype) else k_cache.dtype
    facts = dict(tokens=num_tokens, head_dim=head_dim)

    only_short = num_tokens <= SHORT * num_requests
    if not only_short:
        launch = config.choose("attention_prefill", device, dtype, shared_kib=config.shared_kib(device), **facts)
        prefill_kernel[tiles(num_tokens, num_requests, group, launch["BLOCK_M"]), num_kv_heads](
            q, k_cache, v_cache, out, *keys, num_tokens, num_requests, page_table.stride(0), chunk_size, scale_in_bits,
            SHORT if num_requests > 1 else 0, **heads, **paging, **config.options(launch),
        )  # fmt: skip
    if only_short or num_requests > 1:
        queries = triton.cdiv(num_tokens, num_requests) if only_short else 1
        launch = config.choose("attention_split", device, dtype, rows=queries * group, **facts)
        rows = num_tokens if only_short else num_requests * SHORT
        most_keys = min(page_table.shape[1] * (1 if holds_slots else page_size), chunk_size + launch["BLOCK_M"])
        most_splits = min(MAX_SPLITS, PARTIAL_BYTES // (4 * rows * num_heads * head_dim), triton.cdiv(most_keys, launch["SPLIT_KEYS"]))
        max_splits = max(most_splits, 1)
        partial = torch.empty(rows, num_heads, max_splits, head_dim, dtype=torch.float32, device=device)
        lse = torch.empty(rows, num_heads, max_splits, dtype=torch.float32, device=device)
        splitting = dict(WIDTH=0 if only_short else SHORT, BLOCK_B=max(triton.next_power_of_2(num_requests), 128))
        split_kernel[(config.programs(device, launch),)](
            q, k_cache, v_cache, partial, lse, *keys, num_requests, num_kv_heads, page_table.stride(0), chunk_size, scale_in_bits,
            max_splits, **heads, **paging, **splitting, **config.options(launch),
        )  # fmt: skip
        combine_kernel[rows, num_heads](
            partial, lse, out, seq_lens, query_start_loc, num_requests, chunk_size, max_splits, **heads, **splitting,
            **{name: launch[name] for name in ("SPLIT_KEYS", "BLOCK_M", "BLOCK_N")}, BLOCK_S=triton.next_power_of_2(max_splits),
        )  # fmt: skip
    return out


def why_not_chunked_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_) -> str:
    if q.shape[2] > MOST_DIMS:
        return f"heads have {q.shape[2]} dimensions, more than {MOST_DIMS}"
    return why_not_e4m3(q.device) if k_cache.dtype == torch.float8_e4m3fn else ""
