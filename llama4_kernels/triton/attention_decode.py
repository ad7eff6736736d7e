"""Attention for few queries: the keys of each request are split among programs, and a second kernel combines what they found.

The programs are as many as the GPU runs at once, whatever the batch; each takes work items in turn, an item being one KV head, one block
of BLOCK_M rows (a row is a query token and one of its heads) and one split of the keys that these rows see. The items are counted from
seq_lens on the device. How a request's keys are split depends on its own length alone, so its bits do not depend on its neighbours.

Keys stand on the M side of the matrix products, where Hopper's wgmma needs 64 rows, and the few queries on the N side.
"""

import triton
import triton.language as tl

from llama4_kernels.triton.attention_paging import keys_seen, load_keys, table_row, without_nonfinite

_SPLITS_AT_ONCE = tl.constexpr(16)


@triton.jit
def _split_size(num_keys, max_splits, SPLIT_KEYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys per split: SPLIT_KEYS, or as many more as leave at most max_splits splits."""
    return tl.maximum(SPLIT_KEYS, tl.cdiv(tl.cdiv(num_keys, max_splits), BLOCK_N) * BLOCK_N)


@triton.jit
def _keys_of_block(block, before, num_queries, chunk_size, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(begin, end) of the keys that one block of a request's rows sees; `before` keys precede the request's first query."""
    first = before + block * BLOCK_M // GROUP
    last = before + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
    return keys_seen(first, last, chunk_size)


@triton.jit
def _attend(
    maximum, total, acc, q, positions, chunk_starts, begin, end, k_cache, v_cache, row, slot_map, scale, kv_head, num_kv_heads,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, HOLDS_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from begin to end, for q [dims, rows]. Not MASKED: every row sees each of them.

    attention_prefill.py has it with rows and keys exchanged, and says why they are two.
    """
    # Keys that wgmma takes from shared memory stay in a pipeline's buffers: else p overlays them, for which ptxas 12.8 makes wrong code.
    unpipelined: tl.constexpr = MASKED and k_cache.dtype.element_ty != q.dtype
    for start in tl.range(begin, end, BLOCK_N, num_stages=1 if unpipelined else None):
        keys = start + tl.arange(0, BLOCK_N)
        exists = keys < end
        k, v = load_keys(k_cache, v_cache, row, slot_map, keys, exists, kv_head, num_kv_heads, HEAD_DIM, PAGE_SIZE, HOLDS_SLOTS, BLOCK_D)
        scores = tl.dot(k.to(q.dtype), q, input_precision="ieee") * scale
        v = v.to(q.dtype)
        if MASKED:
            seen = exists[:, None] & (keys[:, None] <= positions[None, :]) & (keys[:, None] >= chunk_starts[None, :])
            scores = tl.where(seen, scores, float("-inf"))
            v, nonfinite = without_nonfinite(v)
            total += tl.where(tl.max((seen & nonfinite[:, None]).to(tl.int32), 0) == 1, float("nan"), 0.0)
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        if MASKED:
            reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        else:
            reference = new_maximum
        p = tl.exp2(scores - reference[None, :])
        correction = tl.exp2(maximum - reference)
        total = total * correction + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(q.dtype), acc * correction[None, :], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc


@triton.jit(do_not_specialize=["num_requests", "num_kv_heads", "row_stride", "max_splits"])
def split_kernel(
    q, k_cache, v_cache, partial, lse, page_table, page_table_rows, slot_map, seq_lens, query_start_loc, k_scale, v_scale,
    num_requests, num_kv_heads, row_stride, chunk_size, scale, max_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, HOLDS_SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial [rows, heads, max_splits, HEAD_DIM] and lse [rows, heads, max_splits], in bits, of every split that exists.

    WIDTH 0: any number of queries per request, rows are tokens. Else: only requests of at most WIDTH queries, rows are request · WIDTH + query.
    """
    requests = tl.arange(0, BLOCK_B)
    real = requests < num_requests
    lengths = tl.load(seq_lens + requests, mask=real, other=0)
    widths = tl.load(query_start_loc + requests + 1, mask=real, other=0) - tl.load(query_start_loc + requests, mask=real, other=0)
    if WIDTH:
        widths = tl.where(widths <= WIDTH, widths, 0)
    blocks = tl.cdiv(widths * GROUP, BLOCK_M)
    first_keys = tl.maximum(lengths - widths, 0) // chunk_size * chunk_size
    most_keys = tl.minimum(lengths - first_keys, chunk_size + (BLOCK_M - 1) // GROUP + 1)
    splits = tl.minimum(tl.cdiv(most_keys, SPLIT_KEYS), max_splits)
    items = blocks * splits
    item_ends = tl.cumsum(items, 0)

    dims = tl.arange(0, BLOCK_D)
    if k_scale is not None:
        scale *= tl.load(k_scale)
    for item in range(tl.program_id(0), tl.sum(items) * num_kv_heads, tl.num_programs(0)):
        kv_head = item % num_kv_heads
        index = item // num_kv_heads
        request = tl.sum((item_ends <= index).to(tl.int32))
        index -= tl.max(tl.where(item_ends <= index, item_ends, 0))
        # blocks of one split follow each other, so that its keys come from L2 for all but the first
        request_blocks = tl.max(tl.where(requests == request, blocks, 0))
        split = index // request_blocks
        block = index % request_blocks

        first_token = tl.load(query_start_loc + request)
        num_queries = tl.load(query_start_loc + request + 1) - first_token
        before = tl.load(seq_lens + request) - num_queries
        begin, end = _keys_of_block(block, before, num_queries, chunk_size, GROUP, BLOCK_M)
        size = _split_size(end - begin, max_splits, SPLIT_KEYS, BLOCK_N)
        last_chunk = (end - 1) // chunk_size * chunk_size
        first_position = before + block * BLOCK_M // GROUP
        seen_by_all = tl.where(last_chunk == begin, first_position + 1, begin)
        begin += split * size
        end = tl.minimum(begin + size, end)
        seen_by_all = begin + tl.maximum(tl.minimum(seen_by_all, end) - begin, 0) // BLOCK_N * BLOCK_N
        if begin < end:
            rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
            queries = tl.minimum(rows // GROUP, num_queries - 1)
            num_heads = num_kv_heads * GROUP
            heads = kv_head * GROUP + rows % GROUP
            positions = before + queries
            chunk_starts = positions // chunk_size * chunk_size
            elements = ((first_token + queries).to(tl.int64) * num_heads + heads)[None, :] * HEAD_DIM + dims[:, None]
            q_tile = tl.load(q + elements, mask=(dims < HEAD_DIM)[:, None], other=0.0)
            if k_cache.dtype.element_ty == tl.float32:
                q_tile = q_tile.to(tl.float32)  # keys and values are taken in q's dtype
            row = table_row(page_table, page_table_rows, row_stride, request)

            maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
            maximum, total, acc = _attend(
                maximum, total, acc, q_tile, positions, chunk_starts, begin, seen_by_all, k_cache, v_cache, row, slot_map, scale, kv_head,
                num_kv_heads, False, HEAD_DIM, PAGE_SIZE, HOLDS_SLOTS, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            maximum, total, acc = _attend(
                maximum, total, acc, q_tile, positions, chunk_starts, seen_by_all, end, k_cache, v_cache, row, slot_map, scale, kv_head,
                num_kv_heads, True, HEAD_DIM, PAGE_SIZE, HOLDS_SLOTS, BLOCK_N, BLOCK_D,
            )  # fmt: skip

            inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
            if v_scale is not None:
                inverse *= tl.load(v_scale)
            partial_rows = (first_token + queries).to(tl.int64)
            if WIDTH:
                partial_rows = request.to(tl.int64) * WIDTH + queries
            partial_rows = (partial_rows * num_heads + heads) * max_splits + split
            writes = rows < num_queries * GROUP
            tl.store(lse + partial_rows, maximum + tl.log2(total), mask=writes)
            elements = partial_rows[None, :] * HEAD_DIM + dims[:, None]
            tl.store(partial + elements, acc * inverse[None, :], mask=writes[None, :] & (dims < HEAD_DIM)[:, None])


@triton.jit(do_not_specialize=["num_requests", "max_splits"])
def combine_kernel(
    partial, lse, out, seq_lens, query_start_loc, num_requests, chunk_size, max_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per row of `partial` and head: the splits, weighted by their sums. WIDTH 0: also zeros to the padding."""
    row = tl.program_id(0)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    dims = tl.arange(0, BLOCK_D)
    if WIDTH:
        request = row // WIDTH
        first_token = tl.load(query_start_loc + request)
        query = row % WIDTH
    else:
        requests = tl.arange(0, BLOCK_B)
        starts = tl.load(query_start_loc + requests, mask=requests < num_requests, other=2147483647)
        request = tl.sum((starts <= row).to(tl.int32)) - 1
        first_token = tl.load(query_start_loc + request)
        query = row - first_token
    num_queries = tl.load(query_start_loc + request + 1) - first_token
    out_row = out + ((first_token + query).to(tl.int64) * num_heads + head) * HEAD_DIM
    if query >= num_queries:
        if WIDTH == 0:
            tl.store(out_row + dims, tl.zeros((BLOCK_D,), out.dtype.element_ty), mask=dims < HEAD_DIM)
        return
    if WIDTH:
        if num_queries > WIDTH:
            return

    before = tl.load(seq_lens + request) - num_queries
    block = (query * GROUP + head % GROUP) // BLOCK_M
    begin, end = _keys_of_block(block, before, num_queries, chunk_size, GROUP, BLOCK_M)
    num_splits = tl.cdiv(end - begin, _split_size(end - begin, max_splits, SPLIT_KEYS, BLOCK_N))

    first_split = (row.to(tl.int64) * num_heads + head) * max_splits
    all_splits = tl.arange(0, BLOCK_S)
    maximum = tl.max(tl.load(lse + first_split + all_splits, mask=all_splits < num_splits, other=float("-inf")))
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, num_splits, _SPLITS_AT_ONCE):
        splits = start + tl.arange(0, _SPLITS_AT_ONCE)
        exists = splits < num_splits
        weights = tl.exp2(tl.load(lse + first_split + splits, mask=exists, other=float("-inf")) - maximum)
        elements = (first_split + splits)[:, None] * HEAD_DIM + dims[None, :]
        found = tl.load(partial + elements, mask=exists[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        total += tl.sum(weights)
        acc += tl.sum(weights[:, None] * found, 0)
    tl.store(out_row + dims, (acc / total).to(out.dtype.element_ty), mask=dims < HEAD_DIM)
