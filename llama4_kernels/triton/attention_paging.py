"""What the attention kernels share: which keys the queries of a tile see, and where those keys are stored."""

import triton
import triton.language as tl


@triton.jit
def keys_seen(first_position, last_position, chunk_size):
    """(begin, end) of the keys that the queries from first_position to last_position see between them."""
    return first_position // chunk_size * chunk_size, last_position + 1


@triton.jit
def table_row(page_table, page_table_rows, row_stride, request):
    """Pointer to a request's row of the page table."""
    if page_table_rows is None:
        row = request.to(tl.int64)
    else:
        row = tl.load(page_table_rows + request).to(tl.int64)
    return page_table + row * row_stride


@triton.jit
def load_keys(
    k_cache, v_cache, row, slot_map, keys, exists, kv_head, num_kv_heads, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HOLDS_SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """k and v [keys, BLOCK_D] of one KV head at the positions `keys`; zero, and not read, where no key `exists`."""
    if HOLDS_SLOTS or PAGE_SIZE == 1:
        slots = tl.load(row + keys, mask=exists, other=0).to(tl.int64)
    else:
        slots = tl.load(row + keys // PAGE_SIZE, mask=exists, other=0).to(tl.int64) * PAGE_SIZE + keys % PAGE_SIZE
    if slot_map is not None:
        slots = tl.load(slot_map + slots, mask=exists, other=0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    elements = (slots * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dims[None, :]
    if BLOCK_D == HEAD_DIM:
        mask = exists[:, None]
    else:
        mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(k_cache + elements, mask=mask, other=0.0), tl.load(v_cache + elements, mask=mask, other=0.0)


@triton.jit
def without_nonfinite(v):
    """v [keys, dims] with zeros for NaN and infinity, which times a weight of 0 would be NaN, and which keys had one."""
    finite = v - v == 0.0
    return tl.where(finite, v, tl.zeros(v.shape, v.dtype)), tl.min(finite.to(tl.int32), 1) == 0
