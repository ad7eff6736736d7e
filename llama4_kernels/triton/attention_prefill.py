"""Attention for many queries: one program per KV head and tile of BLOCK_M rows, a row being a query token and one of its GROUP heads.

Each program reads the keys that its rows see once, for all of them. Tiles start anew at every request, so that what a request's rows
are computed from, and in which order, does not depend on the other requests.
"""

import triton
import triton.language as tl

from llama4_kernels.triton.attention_paging import keys_seen, load_keys, table_row, without_nonfinite

_REQUESTS_AT_ONCE = tl.constexpr(128)


def tiles(num_tokens: int, num_requests: int, group: int, block_m: int) -> int:
    """Enough tiles for any split of the tokens into requests and padding."""
    return num_tokens * group // block_m + num_requests + 1


@triton.jit
def _request_of(tile, query_start_loc, num_requests, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(request, its first tile) for a tile; the request num_requests is the padding.

    Request b starts at tile ⌊query_start_loc[b] · GROUP / BLOCK_M⌋ + b, which leaves each request at least as many tiles as it fills.
    """
    requests_begun = 0
    first_tile = 0
    for start in range(0, num_requests + 1, _REQUESTS_AT_ONCE):
        requests = start + tl.arange(0, _REQUESTS_AT_ONCE)
        exists = requests <= num_requests
        first_tiles = tl.load(query_start_loc + requests, mask=exists, other=0) * GROUP // BLOCK_M + requests
        begun = exists & (first_tiles <= tile)
        requests_begun += tl.sum(begun.to(tl.int32))
        first_tile = tl.maximum(first_tile, tl.max(tl.where(begun, first_tiles, 0)))
    return requests_begun - 1, first_tile


@triton.jit
def _attend(
    maximum, total, acc, q, positions, chunk_starts, begin, end, k_cache, v_cache, row, slot_map, scale, kv_head, num_kv_heads,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, HOLDS_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from begin to end. Not MASKED: every row sees each of them.

    attention_decode.py has it with rows and keys exchanged: here the many rows stand on the M side of both products, there the keys, and one
    function for both would have to transpose the scores between registers.
    """
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k, v = load_keys(k_cache, v_cache, row, slot_map, keys, keys < end, kv_head, num_kv_heads, HEAD_DIM, PAGE_SIZE, HOLDS_SLOTS, BLOCK_D)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        v = v.to(q.dtype)
        if MASKED:
            seen = (keys[None, :] <= positions[:, None]) & (keys[None, :] >= chunk_starts[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            v, nonfinite = without_nonfinite(v)
            total += tl.where(tl.max((seen & nonfinite[None, :]).to(tl.int32), 1) == 1, float("nan"), 0.0)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        if MASKED:
            reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        else:
            reference = new_maximum
        p = tl.exp2(scores - reference[:, None])
        correction = tl.exp2(maximum - reference)
        total = total * correction + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v, acc * correction[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc


@triton.jit(do_not_specialize=["num_tokens", "num_requests", "row_stride", "longer_than"])
def prefill_kernel(
    q, k_cache, v_cache, out, page_table, page_table_rows, slot_map, seq_lens, query_start_loc, k_scale, v_scale,
    num_tokens, num_requests, row_stride, chunk_size, scale, longer_than,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, HOLDS_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the output of requests with more than longer_than queries, and zeros to the padding. `scale` turns q·k into bits."""
    # late tiles see the most keys: begin with them
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    request, first_tile = _request_of(tile, query_start_loc, num_requests, GROUP, BLOCK_M)
    is_padding = request == num_requests
    first_token = tl.load(query_start_loc + request)
    end_token = num_tokens
    if not is_padding:
        end_token = tl.load(query_start_loc + request + 1)
    num_queries = end_token - first_token
    first_row = (tile - first_tile) * BLOCK_M
    if first_row >= num_queries * GROUP:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    queries = tl.minimum(rows // GROUP, num_queries - 1)
    head_rows = ((first_token + queries).to(tl.int64) * num_kv_heads + kv_head) * GROUP + rows % GROUP
    elements = head_rows[:, None] * HEAD_DIM + dims[None, :]
    writes = (rows < num_queries * GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    if is_padding:
        tl.store(out + elements, tl.zeros((BLOCK_M, BLOCK_D), out.dtype.element_ty), mask=writes)
        return
    if num_queries <= longer_than:
        return

    q_tile = tl.load(q + elements, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    if k_cache.dtype.element_ty == tl.float32:
        q_tile = q_tile.to(tl.float32)  # keys and values are taken in q's dtype
    row = table_row(page_table, page_table_rows, row_stride, request)
    if k_scale is not None:
        scale *= tl.load(k_scale)
    before = tl.load(seq_lens + request) - num_queries
    positions = before + queries
    chunk_starts = positions // chunk_size * chunk_size
    first_position = before + first_row // GROUP
    last_position = before + tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_queries - 1)
    begin, end = keys_seen(first_position, last_position, chunk_size)
    seen_by_all = begin + (first_position + 1 - begin) // BLOCK_N * BLOCK_N
    if last_position // chunk_size * chunk_size > begin:
        seen_by_all = begin

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum, total, acc = _attend(
        maximum, total, acc, q_tile, positions, chunk_starts, begin, seen_by_all, k_cache, v_cache, row, slot_map, scale, kv_head, num_kv_heads,
        False, HEAD_DIM, PAGE_SIZE, HOLDS_SLOTS, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    maximum, total, acc = _attend(
        maximum, total, acc, q_tile, positions, chunk_starts, seen_by_all, end, k_cache, v_cache, row, slot_map, scale, kv_head, num_kv_heads,
        True, HEAD_DIM, PAGE_SIZE, HOLDS_SLOTS, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    inverse = 1.0 / total
    if v_scale is not None:
        inverse *= tl.load(v_scale)
    tl.store(out + elements, (acc * inverse[:, None]).to(out.dtype.element_ty), mask=writes)
