"""chunked_attention against a softmax in float64, one query at a time, and against transformers' chunked mask."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import chunked_causal_mask_function

from backends import assert_passes_opcheck, assert_replays, assert_same_bits, assert_within, compute, device_of, to, where_it_computes
from llama4_kernels import ops
from llama4_kernels.reference import attention as reference
from weights import FP8

GARBAGE = 2**30


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch(lengths: list[tuple[int, int]], *, chunk_size: int | None, page_size: int = 1, holds: str = "pages", heads=(4, 2, 16),
          dtype=torch.float32, cache_dtype=None, padding=0, rows=False, slot_map=False) -> tuple[tuple, dict]:  # fmt: skip
    """Arguments for requests of (keys, queries), whose caches hold NaN and page tables garbage wherever nothing may be read."""
    num_heads, num_kv_heads, head_dim = heads
    most = max([1, *(keys for keys, _ in lengths)])
    pages_each = -(-most // page_size)
    pages = len(lengths) * pages_each + 2
    cache_dtype = cache_dtype or dtype
    shape = (pages, page_size, num_kv_heads, head_dim)
    caches = [torch.full(shape, float("nan")).to(cache_dtype) for _ in range(2)]
    order = torch.randperm(pages)
    requests = [order[i * pages_each : (i + 1) * pages_each] for i in range(len(lengths))]
    translation = torch.randperm(pages * page_size + 3) if slot_map else None
    columns = pages_each if holds == "pages" else pages_each * page_size
    table = torch.full((len(lengths) + 2, columns + 1), GARBAGE, dtype=torch.int32)
    table_rows = torch.randperm(len(lengths) + 2)[: len(lengths)] if rows else torch.arange(len(lengths))
    for row, own_pages, (keys, queries) in zip(table_rows.tolist(), requests, lengths):
        low = 0 if chunk_size is None else (keys - queries) // chunk_size * chunk_size
        slots = (own_pages[:, None] * page_size + torch.arange(page_size)).flatten()[:keys]
        if queries == 0:
            continue
        for cache in caches:
            cache.flatten(0, 1)[slots[low:]] = torch.randn(keys - low, num_kv_heads, head_dim).to(cache_dtype)
        if holds == "pages":
            table[row, low // page_size : -(-keys // page_size)] = own_pages[low // page_size : -(-keys // page_size)].int()
        else:
            table[row, low:keys] = (slots if translation is None else translation.argsort()[slots])[low:].int()
    counts = [queries for _, queries in lengths]
    q = torch.randn(sum(counts) + padding, num_heads, head_dim).to(dtype)
    if padding:
        q[-padding:] = float("nan")
    options = dict(
        page_table=table,
        seq_lens=torch.tensor([keys for keys, _ in lengths], dtype=torch.int32),
        query_start_loc=torch.tensor([0, *counts]).cumsum(0).int(),
        chunk_size=chunk_size,
        page_table_holds=holds,
        page_table_rows=table_rows if rows else None,
        slot_map=translation,
    )
    if cache_dtype == FP8:
        options |= dict(k_scale=torch.tensor(0.5), v_scale=torch.tensor([2.0]))
    return (q, *caches), options


def oracle(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, page_table, seq_lens, query_start_loc, chunk_size, page_table_holds="pages",
           page_table_rows=None, slot_map=None, scale=None, k_scale=None, v_scale=None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output in float64, and a bound on what fp32 may lose; one query and key at a time."""
    out, bound = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape, dtype=torch.float64)
    k_all = k_cache.double() * (1 if k_scale is None else k_scale.double())
    v_all = v_cache.double() * (1 if v_scale is None else v_scale.double())
    page_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    starts = query_start_loc.tolist()
    for request, (start, end, keys) in enumerate(zip(starts, starts[1:], seq_lens.tolist())):
        row = page_table[request if page_table_rows is None else int(page_table_rows[request])].tolist()
        for i in range(start, end):
            position = keys - (end - start) + i - start
            seen = [j for j in range(position + 1) if chunk_size is None or j // chunk_size == position // chunk_size]
            if page_table_holds == "pages":
                slots = [row[j // page_size] * page_size + j % page_size for j in seen]
            else:
                slots = [row[j] if slot_map is None else int(slot_map[row[j]]) for j in seen]
            k = k_all.flatten(0, 1)[slots].repeat_interleave(group, 1)
            v = v_all.flatten(0, 1)[slots].repeat_interleave(group, 1)
            scores = torch.einsum("hd,khd->hk", q[i].double(), k) * (q.shape[2] ** -0.5 if scale is None else scale)
            weights = scores.softmax(-1)
            out[i] = torch.einsum("hk,khd->hd", weights, v)
            bound[i] = 2.0**-16 * (1 + scores.abs().amax(-1))[:, None] * torch.einsum("hk,khd->hd", weights, v.abs())
    return out, bound


def far_batch(last: int, **how) -> tuple[tuple[tuple, dict], tuple[tuple, dict]]:
    """Arguments for three queries up to position `last`, and the same for the same keys in the first chunk, where the oracle can follow:
    attention knows no positions but those within the chunk."""
    chunk_size = 512
    arguments, near = batch([(last % chunk_size + 1, 3)], chunk_size=chunk_size, holds="slots", **how)
    table = torch.empty(1, last + 1, dtype=torch.int32)
    table[0, last // chunk_size * chunk_size :] = near["page_table"][0, : last % chunk_size + 1]
    return (arguments, near), (arguments, near | dict(page_table=table, seq_lens=int32(last + 1)))


def far_slots() -> tuple[tuple[tuple, dict], tuple[tuple, dict]]:
    """Caches of more than 2^31 elements, of which only those of the last slots are touched; and the same in small ones."""
    (q, k_cache, v_cache), near = batch([(40, 3)], chunk_size=None, holds="slots", heads=(5, 1, 128), dtype=torch.bfloat16, cache_dtype=FP8)
    slots = 2**31 // 128 + len(k_cache)
    far_caches = [torch.empty(slots, *cache.shape[1:], dtype=FP8) for cache in (k_cache, v_cache)]
    for far_cache, cache in zip(far_caches, (k_cache, v_cache)):
        far_cache[-len(cache) :] = cache
    table = near["page_table"].clone()
    table[0, :40] += slots - len(k_cache)
    return ((q, k_cache, v_cache), near), ((q, *far_caches), near | dict(page_table=table))


def assert_attention(backend: str, arguments: tuple, options: dict) -> None:
    got = compute(backend, "chunked_attention", *arguments, **options)
    want, bound = oracle(*arguments, **options)
    rounded_weights = 2.0**-7 * want.abs().amax() if got.dtype == torch.bfloat16 and want.numel() else 0
    assert got.dtype == arguments[0].dtype
    assert_within(got, want, bound + rounded_weights)


@st.composite
def request(draw) -> tuple[int, int]:
    queries = draw(st.sampled_from([0, 1, 1, 2, 5, 17]))
    return queries + draw(st.sampled_from([0, 1, 7, 8, 15, 16, 31, 40])), queries


@given(
    lengths=st.lists(request(), min_size=0, max_size=4),
    chunk_size=st.sampled_from([None, 1, 8, 12, 16, 64]),
    page_size=st.sampled_from([1, 4, 16, 7]),
    table=st.sampled_from(["pages", "slots", "mapped slots"]),
    heads=st.sampled_from([(1, 1, 2), (5, 1, 64), (4, 2, 16), (6, 6, 20), (5, 1, 128)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    fp8=st.booleans(),
    padding=st.sampled_from([0, 3]),
    rows=st.booleans(),
)
def test_mixed_batches(backend, lengths, chunk_size, page_size, table, heads, dtype, fp8, padding, rows):
    holds, slot_map = ("pages", False) if table == "pages" else ("slots", table == "mapped slots")
    arguments, options = batch(lengths, chunk_size=chunk_size, page_size=page_size, holds=holds, heads=heads, dtype=dtype,
                               cache_dtype=FP8 if fp8 else None, padding=padding, rows=rows, slot_map=slot_map)  # fmt: skip
    assert_attention(backend, arguments, options)


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 55])
@pytest.mark.parametrize("chunk_size", [16, None])
def test_prefill_and_decode_about_the_chunk(backend, keys, chunk_size):
    assert_attention(backend, *batch([(keys, keys), (keys, 1), (keys + 3, 3)], chunk_size=chunk_size, page_size=4))


@pytest.mark.parametrize("cache_dtype", [None, FP8])
def test_many_keys(backend, cache_dtype):
    arguments, options = batch([(700, 1), (300, 150)], chunk_size=512, page_size=16, heads=(5, 1, 128), dtype=torch.bfloat16,
                               cache_dtype=cache_dtype)  # fmt: skip
    assert_attention(backend, arguments, options)


@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_last_step_of_any_number_of_keys(backend, head_dim, cache_dtype):
    """On a GPU a step of the split kernel has 64 keys, and each step of the tensor cores 16 of them."""
    lengths = [(keys, 1) for keys in (1, 15, 16, 17, 33, 63, 64, 65, 129)]
    assert_attention(backend, *batch(lengths, chunk_size=None, heads=(5, 1, head_dim), dtype=torch.bfloat16, cache_dtype=cache_dtype))


@pytest.mark.parametrize("last", [1_000_000, 2_500_000, 9_999_999])
def test_far_positions(backend, last):
    near, far = far_batch(last, heads=(5, 1, 128), dtype=torch.bfloat16)
    want, bound = oracle(*near[0], **near[1])
    got = compute(backend, "chunked_attention", *far[0], **far[1])
    assert_within(got, want, bound + 2.0**-7 * want.abs().amax())


def test_far_slots(backend):
    near, far = far_slots()
    want, bound = oracle(*near[0], **near[1])
    got = compute(backend, "chunked_attention", *far[0], **far[1])
    assert_within(got, want, bound + 2.0**-7 * want.abs().amax())


def test_a_scale_is_taken(backend):
    arguments, options = batch([(20, 4)], chunk_size=None)
    assert_attention(backend, arguments, options | {"scale": 0.7})


@pytest.mark.parametrize(("scale", "k_scale"), [(1e-8, 0.0), (1e-46, 1.0), (1e-30, 1e-30)])
@pytest.mark.parametrize("lengths", [[(30, 1), (9, 2)], [(40, 20)]])
def test_scales_whose_product_is_0_in_float32(backend, lengths, scale, k_scale):
    """All keys weigh the same then."""
    arguments, options = batch(lengths, chunk_size=16, heads=(5, 1, 128), dtype=torch.bfloat16, cache_dtype=FP8)
    assert_attention(backend, arguments, options | dict(scale=scale, k_scale=torch.tensor(k_scale)))


@pytest.mark.parametrize("lengths", [[(30, 1), (9, 2)], [(40, 20)]])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_with_float32_on_either_side_nothing_else_is_rounded(backend, lengths, dtype, cache_dtype):
    """But the output, to q's dtype."""
    arguments, options = batch(lengths, chunk_size=16, dtype=dtype, cache_dtype=cache_dtype)
    assert_within(compute(backend, "chunked_attention", *arguments, **options), *oracle(*arguments, **options))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_caches_without_pages(backend, cache_dtype):
    """All tokens are padding."""
    (q, *caches), options = batch([(0, 0)], chunk_size=None, heads=(5, 1, 128), dtype=torch.bfloat16, cache_dtype=cache_dtype, padding=5)
    out = compute(backend, "chunked_attention", q, *(cache[:0] for cache in caches), **options)
    assert_same_bits(out, torch.zeros_like(q))


def test_the_reference_keeps_nan_to_the_queries_that_see_it():
    """NaN in keys and values of the first chunk reaches that chunk's later queries, and not those of the next."""
    (q, k_cache, v_cache), options = batch([(16, 16)], chunk_size=8)
    clean = compute("reference", "chunked_attention", q, k_cache, v_cache, **options)
    slot = int(options["page_table"][0, 3])
    others = [0, 1, 2, *range(8, 16)]
    for cache in (v_cache, k_cache):
        cache[slot] = float("nan")
        spoilt = compute("reference", "chunked_attention", q, k_cache, v_cache, **options)
        assert spoilt[3:8].isnan().all()
        torch.testing.assert_close(spoilt[others], clean[others], rtol=1e-6, atol=1e-6)


def test_padding_and_requests_without_queries(backend):
    arguments, options = batch([(9, 0), (5, 2), (0, 0)], chunk_size=4, padding=3)
    out = compute(backend, "chunked_attention", *arguments, **options)
    assert (out[2:] == 0).all() and (out[:2] != 0).all()
    assert_attention(backend, arguments, options)


def test_the_page_table_may_be_a_window_of_a_wider_one(backend):
    arguments, options = batch([(9, 2), (5, 2)], chunk_size=4)
    wide = torch.full((options["page_table"].shape[0], 40), GARBAGE, dtype=torch.int32)
    window = wide[:, : options["page_table"].shape[1]]
    window.copy_(options["page_table"])
    assert not window.is_contiguous()
    assert_attention(backend, arguments, options | {"page_table": window})


def test_follows_the_mask_of_transformers(backend):
    chunk_size, length = 8, 30
    (q, k_cache, v_cache), options = batch([(length, length)], chunk_size=chunk_size)
    mask_function = chunked_causal_mask_function(chunk_size, torch.zeros(1, dtype=torch.long))
    positions = torch.arange(length)
    mask = torch.stack([mask_function(0, 0, positions.new_full((), i), positions) for i in positions])
    slots = options["page_table"][0, :length].long()
    k, v = (cache.flatten(0, 1)[slots].transpose(0, 1)[None] for cache in (k_cache, v_cache))
    want = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
    got = compute(backend, "chunked_attention", q, k_cache, v_cache, **options)
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_the_reference_splits_long_prefills_into_blocks_of_queries(monkeypatch):
    arguments, options = batch([(40, 33), (30, 30)], chunk_size=16)
    whole = compute("reference", "chunked_attention", *arguments, **options)
    monkeypatch.setattr(reference, "MAX_SCORES", 4 * 40 * 3)  # three queries at a time
    torch.testing.assert_close(compute("reference", "chunked_attention", *arguments, **options), whole, rtol=1e-6, atol=1e-6)


def test_gives_the_same_bits_twice(backend):
    arguments, options = batch([(70, 1), (40, 33)], chunk_size=64)
    assert_same_bits(*(compute(backend, "chunked_attention", *arguments, **options) for _ in range(2)))


@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize(("holds", "page_size"), [("pages", 64), ("slots", 1)])
def test_gives_the_same_bits_twice_in_bfloat16(gpu_backend, holds, page_size, cache_dtype):
    """With few queries and with many, whose rows CUDA copies by TMA where they follow each other and gathers where they do not."""
    arguments, options = batch([(700, 1), (40, 33), (600, 150), (300, 8)], chunk_size=512, page_size=page_size, holds=holds, heads=(5, 1, 128),
                               dtype=torch.bfloat16, cache_dtype=cache_dtype, padding=2)  # fmt: skip
    assert_same_bits(*(compute(gpu_backend, "chunked_attention", *arguments, **options) for _ in range(2)))


@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize("holds", ["pages", "slots"])
@pytest.mark.parametrize("queries", ["few", "many"])
def test_replays_in_a_cuda_graph(graph_backend, queries, holds, cache_dtype):
    """For other lengths of as many queries in all, so that requests come and go."""
    most, many, chunk_size, head_dim = (700, 100, 512, 128) if device_of(graph_backend).type == "cuda" else (100, 12, 64, 16)
    lengths = {
        "few": ([(most, 1), (30, 1)], [(0, 0), (most, 2)]),
        "many": ([(most, many), (9, 1)], [(9, 9), (most, many - 8)]),
    }[queries]
    how = dict(chunk_size=chunk_size, page_size=16, holds=holds, heads=(5, 1, head_dim), dtype=torch.bfloat16, cache_dtype=cache_dtype,
               padding=2, rows=True, slot_map=holds == "slots")  # fmt: skip
    assert_replays(graph_backend, "chunked_attention", *(batch(each, **how) for each in lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, FP8])
@pytest.mark.parametrize(
    "lengths",
    [[(2000, 1)] * 300, [*[(8192, 1)] * 62, (3000, 1), (5000, 3)], [(300, 20), (17000, 40)]],
    ids=["runs of splits", "long runs", "split prefix"],
)
def test_in_as_many_splits_as_a_gpu_makes(gpu_backend, lengths, cache_dtype):
    """In CUDA several splits of few queries are one item of work, and those of many have their keys split after a long prefix."""
    arguments, options = batch(lengths, chunk_size=None, page_size=64, heads=(5, 1, 128), dtype=torch.bfloat16, cache_dtype=cache_dtype)
    assert_attention(gpu_backend, arguments, options)


@pytest.mark.gpu
def test_a_graph_of_many_requests_replays_after_a_launch_of_few(gpu_backend):
    """In CUDA they are launches of one kernel with more and with less shared memory."""
    lengths = [(9, 1)] * 900, [(9, 1), (5, 1)] * 450, [(9, 1)] * 2
    many, others, few = (batch(each, chunk_size=8, heads=(5, 1, 128), dtype=torch.bfloat16) for each in lengths)
    launch_few = partial(compute, gpu_backend, "chunked_attention", *few[0], **few[1])
    assert_replays(gpu_backend, "chunked_attention", many, others, meanwhile=launch_few)


@pytest.mark.gpu
def test_a_new_thread_computes_the_same(gpu_backend):
    """Its memory comes from torch's cache, so that the op is the first to need a CUDA context there."""
    arguments, options = to(batch([(40, 1), (30, 30)], chunk_size=16, heads=(5, 1, 128), dtype=torch.bfloat16), torch.device("cuda"))

    def call() -> Tensor:
        with where_it_computes(gpu_backend):
            return ops.chunked_attention(*arguments, **options)

    _, want = call(), call()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(call).result()
    assert_same_bits(got, want)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, FP8)]
)
@pytest.mark.parametrize("holds", ["pages", "slots"])
def test_opcheck(backend, holds, dtype, cache_dtype):
    (q, *caches), options = batch([(20, 3)], chunk_size=8, holds=holds, heads=(4, 2, 64), dtype=dtype, cache_dtype=cache_dtype,
                                  rows=holds == "slots", slot_map=holds == "slots")  # fmt: skip
    caches = [cache.float().nan_to_num().to(cache_dtype) for cache in caches]
    assert_passes_opcheck(backend, "chunked_attention", q, *caches, **options)


CACHE = torch.ones(4, 2, 2, 8)
FP8_CACHES = {"k_cache": CACHE.to(FP8), "v_cache": CACHE.to(FP8)}
SLOTS = {"page_table_holds": "slots", "page_table": torch.arange(6).int()[None]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.ones(3, 4, 8).half()}, TypeError, "q has dtype float16, needs bfloat16 or float32"),
        ({"q": torch.ones(3, 32)}, ValueError, r"q has shape \[3, 32\], needs \[Tq, Hq, D\]"),
        ({"q": torch.ones(4, 3, 8).transpose(0, 1)}, ValueError, "q has strides"),
        ({"q": torch.ones(3, 0, 8)}, ValueError, r"q has shape \[3, 0, 8\], needs at least one head and one dimension"),
        ({"q": torch.ones(3, 5, 8)}, ValueError, "q has 5 heads, needs a multiple of the caches' 2"),
        ({"k_cache": CACHE[:, :, :0], "v_cache": CACHE[:, :, :0]}, ValueError, "q has 4 heads, needs a multiple of the caches' 0"),
        ({"k_cache": torch.ones(4, 2, 2, 9)}, ValueError, r"k_cache has shape \[4, 2, 2, 9\], needs \[pages, page_size, Hkv, 8\]"),
        ({"k_cache": torch.ones(2, 4, 2, 8).transpose(0, 1)}, ValueError, "k_cache has strides"),
        ({"v_cache": CACHE[:3]}, ValueError, r"v_cache has shape \[3, 2, 2, 8\], needs \[4, 2, 2, 8\]"),
        ({"k_scale": torch.ones(())}, ValueError, "k_scale is given with a float32 cache, needs to be None"),
        (FP8_CACHES | {"k_scale": torch.tensor(-1.0)}, ValueError, "k_scale holds values from -1 to -1, needs finite ones of at least 0"),
        (FP8_CACHES | {"v_scale": torch.tensor([float("inf")])}, ValueError, "v_scale holds values from inf to inf, needs finite ones"),
        ({"seq_lens": torch.tensor([6])}, TypeError, "seq_lens has dtype int64, needs int32"),
        ({"query_start_loc": int32(0, 1, 3)}, ValueError, r"query_start_loc has shape \[3\], needs \[2\]"),
        ({"query_start_loc": int32(0, 3).to("meta")}, ValueError, "query_start_loc is on meta, needs cpu"),
        ({"page_table": int32(0, 1, 2)}, ValueError, r"page_table has shape \[3\], needs \[R, L\]"),
        ({"page_table": torch.ones(3, 3, dtype=torch.int32).t()}, ValueError, r"page_table has strides \[1, 3\], needs a last stride of 1"),
        ({"page_table": torch.ones(0, 3, dtype=torch.int32)}, ValueError, "page_table has 0 rows, needs one for each of the 1"),
        ({"page_table_rows": torch.ones(1)}, TypeError, "page_table_rows has dtype float32, needs int32 or int64"),
        ({"page_table_holds": "blocks"}, ValueError, "page_table_holds is 'blocks', needs 'pages' or 'slots'"),
        ({"slot_map": torch.arange(8)}, ValueError, "slot_map is given with page_table_holds='pages', needs 'slots'"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0, needs an int of at least 1, or None"),
        ({"chunk_size": 2**63}, ValueError, f"chunk_size is {2**63}, needs an int of at least 1, or None .*, at most {2**63 - 1}"),
        ({"chunk_size": 8.0}, TypeError, "chunk_size is 8.0, needs an int of at least 1, or None"),
        ({"scale": torch.tensor(1.0)}, TypeError, r"scale is tensor\(1.\), needs a finite float"),
        ({"scale": float("nan")}, ValueError, "scale is nan, needs a finite float"),
        ({"scale": -1e39}, ValueError, r"scale is -1e\+39, needs a finite float"),
        ({"scale": True}, TypeError, "scale is True, needs a finite float"),
        ({"query_start_loc": int32(0, 4)}, ValueError, r"query_start_loc is \[0, 4\], needs .* end at most at 3"),
        ({"query_start_loc": int32(1, 3)}, ValueError, r"query_start_loc is \[1, 3\], needs to start at 0"),
        ({"seq_lens": int32(2)}, ValueError, r"seq_lens is \[2\], needs at least each request's number of queries, \[3\]"),
        ({"seq_lens": int32(7)}, ValueError, "page_table has 3 columns, needs 4 for seq_lens up to 7"),
        ({"page_table_rows": torch.tensor([1])}, ValueError, "page_table_rows holds values from 1 to 1, needs 0 to 0, the 1 rows"),
        ({"page_table": int32(0, 4, 2)[None]}, ValueError, "page_table holds values from 0 to 4, needs 0 to 3, the 4 pages of the caches"),
        ({"page_table": int32(0, -1, 2)[None]}, ValueError, "page_table holds values from -1 to 2, needs 0 to 3"),
        (SLOTS | {"page_table": int32(0, 1, 2, 3, 4, 8)[None]}, ValueError, "page_table holds values from 0 to 8, needs 0 to 7"),
        (SLOTS | {"slot_map": torch.arange(5)}, ValueError, "page_table holds values from 0 to 5, needs 0 to 4, the 5 slots of slot_map"),
        (SLOTS | {"slot_map": torch.arange(6) + 4}, ValueError, "slot_map holds values from 4 to 9, needs 0 to 7, the 8 slots"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes, error, message):
    arguments = dict(q=torch.ones(3, 4, 8), k_cache=CACHE, v_cache=CACHE, page_table=int32(0, 1, 2)[None], seq_lens=int32(6),
                     query_start_loc=int32(0, 3), chunk_size=None)  # fmt: skip
    with pytest.raises(error, match=f"^chunked_attention: {message}"):
        ops.chunked_attention(**(arguments | changes))
