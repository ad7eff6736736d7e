"""chunked_attention and rope_qk_norm at the shapes of Scout and Maverick, one rank of TP 1, 2, 4 and 8.

FP8 caches need the conversions of compute capability 8.9.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from llama4_kernels.triton.attention import chunked_attention
from llama4_kernels.triton.rope import rope_qk_norm

HEADS, KV_HEADS, CHUNK = 40, 8, 8192
HEAD_DIM = 128
TENSOR_PARALLEL = (1, 2, 4, 8)
BATCHES = ((1, 1), (64, 64), (8, 64), (1, 8192), (8, 8192))  # requests, tokens: decode, speculation, prefill, mixed
PAGINGS = (("slots", 1, True), ("slots", 1, False), ("pages", 64, False))  # what the page table holds, page size, SWA pool

WGMMA = {"prefill_kernel", "split_kernel"}


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(requests: int, tokens: int, ranks: int, kv_dtype: torch.dtype, holds: str, page_size: int, swa: bool, head_dim: int) -> None:
    cache = empty(4096, page_size, KV_HEADS // ranks, head_dim, dtype=kv_dtype)
    scale = empty(dtype=torch.float32) if kv_dtype == torch.float8_e4m3fn else None
    chunked_attention(
        empty(tokens, HEADS // ranks, head_dim, dtype=torch.bfloat16), cache, cache, page_table=empty(4096, 1 << 20), seq_lens=empty(requests),
        query_start_loc=empty(requests + 1), chunk_size=CHUNK, scale=head_dim**-0.5, page_table_holds=holds,
        page_table_rows=empty(requests, dtype=torch.int64) if holds == "slots" else None,
        slot_map=empty(4096, dtype=torch.int64) if swa else None, k_scale=scale, v_scale=scale,
    )  # fmt: skip


def rope(tokens: int, ranks: int, kv_dtype: torch.dtype, swa: bool, **steps: object) -> None:
    cache = empty(4096, 1, KV_HEADS // ranks, HEAD_DIM, dtype=kv_dtype)
    scale = empty(dtype=torch.float32) if kv_dtype == torch.float8_e4m3fn else None
    rope_qk_norm(
        empty(tokens, (HEADS + 2 * KV_HEADS) // ranks * HEAD_DIM, dtype=torch.bfloat16), empty(tokens, dtype=torch.int64), num_heads=HEADS // ranks,
        num_kv_heads=KV_HEADS // ranks, head_dim=HEAD_DIM, k_cache=cache, v_cache=cache, slots=empty(tokens, dtype=torch.int64),
        slot_map=empty(4096, dtype=torch.int64) if swa else None, k_scale=scale, v_scale=scale, **steps,
    )  # fmt: skip


def calls(architecture: str) -> Iterator[Callable[[], object]]:
    kv_dtypes = (torch.bfloat16, torch.float8_e4m3fn) if architecture == "sm_90" else (torch.bfloat16,)
    for (requests, tokens), ranks, kv_dtype, paging in itertools.product(BATCHES, TENSOR_PARALLEL, kv_dtypes, PAGINGS):
        yield functools.partial(attention, requests, tokens, ranks, kv_dtype, *paging, HEAD_DIM)
    for requests, tokens in BATCHES:
        yield functools.partial(attention, requests, tokens, 8, torch.bfloat16, *PAGINGS[0], 64)
    cos_sin = empty(1 << 20, HEAD_DIM, dtype=torch.float32)
    local_scout, local_maverick, full = dict(cos_sin=cos_sin, qk_norm_eps=1e-5), dict(cos_sin=cos_sin), dict(temperature=(0.1, 8192))
    for ranks, kv_dtype, (steps, swa) in itertools.product(TENSOR_PARALLEL, kv_dtypes, ((local_scout, True), (local_maverick, True), (full, False))):
        yield functools.partial(rope, 8192, ranks, kv_dtype, swa, **steps)
