"""csrc/attention.cu itself, built for the host and called through llama4_kernels/cuda/attention.py, between guard bytes, against float64.

Unused slots hold NaN and unused entries of page tables garbage (test_attention.batch), so that any stray read shows.
"""

from __future__ import annotations

import emulation
import planted
import pytest
import torch
from guards import Guarded
from test_attention import GARBAGE, batch, far_batch, far_slots, oracle
from torch import Tensor

from backends import assert_same_bits, assert_within
from weights import FP8

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

BF16 = torch.bfloat16
SCOUT = dict(heads=(5, 1, 128), dtype=BF16)
TILE = 128

LOAD, ATTEND, MAIN = "attention_load.cuh", "attention_attend.cuh", "attention.cu"
GEOMETRY, SCHEDULE, DRAWS = "attention_geometry.cuh", "attention_schedule.cuh", "attention_draws.cuh"
FENCE = "if (Loader<HEAD_DIM, Element>::IS_FP8 || ring.is_gathered(count)) hopper::fence_async_proxy();"
GIVE_BACK = "        if (threadIdx.x % 32 == 0) empty[count % SLOTS].arrive();\n"
SEEN = f"        const int item = items[count % SLOTS];\n        __syncwarp();\n{GIVE_BACK}        return item;\n"
RELEASE_FOR_BOTH = "                release<ATTENDING>(v.empty, count + tile);"
LOAD_K = "                if (i < tiles) load(k, k_map, a.k_cache, slot, item.kv_head, number);\n"
LOAD_V = "                if (i > 0) load(v, v_map, a.v_cache, slot_before, item.kv_head, number - 1);\n"
SLOW_LANES = """
        if (threadIdx.x >= 128 && threadIdx.x % 32) {
            for (int i = 0; i < 200; ++i) emulation::scheduler().poll(emulation::Site::here(), "its turn");
        }
"""
PLANTED = {
    "keys before the chunk are read": (LOAD, "«position < keys.begin» || ", "false"),
    "boxes one key late": (LOAD, "load_boxes(map, «int(first_slot)»,", "int(first_slot) + 1"),
    "copies not waited for": (LOAD, "hopper::cp_async_arrive(full);", "full.arrive();"),
    "codes not waited for": (LOAD, "hopper::cp_async_wait<2>();", "hopper::cp_async_wait<3>();"),
    "V not waited for": (ATTEND, "wait_for_operand(v, count);", ""),
    "buffers not waited for": (LOAD, "«ring.wait_empty(count);»\n        const int64_t first_slot", ""),
    "no proxy fence": (ATTEND, FENCE, ""),
    "no proxy fence for gathered rows": (ATTEND, FENCE, FENCE.replace("|| ring.is_gathered(count)", "")),
    "gathered rows of which nobody tells": (LOAD, "= «!consecutive»;", "false"),
    "runs that leave out the last split": (
        SCHEDULE, "«ceil_div(splits.count, items)» : 1;", "max(ceil_div(splits.count, items) - 1, 1)"
    ),
    "positions without the prefix": (GEOMETRY, "before = «max(a.seq_lens[request] - queries, 0)»;", "0"),
    "masks of boundary tiles left out": (ATTEND, "if (start < seen_by_all_from || start + ATTENTION_TILE > seen_by_all_to) mask(start);", ""),
    "old output not corrected": (ATTEND, "            «correct_output();»\n            pack_weights();", ""),
    "parts unweighted": (ATTEND, "«hopper::exp2_approximate(part_weights[part] - highest)»;", "1.0f"),
    "tiles of few queries given back by one warpgroup for itself": (ATTEND, RELEASE_FOR_BOTH, RELEASE_FOR_BOTH.replace("ATTENDING", "1")),
    "ticket not given back": (
        ATTEND, "«is_last_ticket(ticket_of(a, item), item.runs)»;", "hopper::add_acquire_release(ticket_of(a, item), 1) + 1 == unsigned(item.runs)"
    ),
    "counter of draws not turned back": (DRAWS, "«unsigned(items) - 1»);", "~0u"),
    "counter of draws turned back one draw late": (DRAWS, "«unsigned(items) - 1»);", "unsigned(items)"),
    "counter of draws turned back one draw early": (DRAWS, "«unsigned(items) - 1»);", "unsigned(max(items - 2, 0))"),
    "turns of the warpgroups not passed on": (ATTEND, "turns.pass();", ""),
    "turns where the warpgroups visit different tiles": (ATTEND, RELEASE_FOR_BOTH, f"{RELEASE_FOR_BOTH} turns.take(), turns.pass();"),
    "nobody passes the first turn": ("issue_turns.cuh", "if (warpgroup_ == 1) pass();", ";"),
    "nobody takes the last turn": (MAIN, "attend.finish();", ""),
    "draws that overtake the block's warps": (MAIN, "shared.drawn.wait_empty(taken);", ""),
    "a draw given back before slow lanes have seen it": (DRAWS, SEEN, GIVE_BACK + SLOW_LANES + SEEN.replace(GIVE_BACK, "")),
}  # fmt: skip
RUN_OF_ALL = "__ffs(__ballot_sync(ALL_LANES, time == __reduce_min_sync(ALL_LANES, time)))"
CHANGES = PLANTED | {"splits alone": (SCHEDULE, RUN_OF_ALL, "1"), "slow lanes": (DRAWS, SEEN, SLOW_LANES + SEEN), "v first": (LOAD, LOAD_K + LOAD_V, LOAD_V + LOAD_K)}


def op_of(kernels, together: int = 3):
    """chunked_attention with these kernels, of whose three blocks so many take turns."""
    kernels.run_together(together)
    return emulation.op_module("attention", kernels).chunked_attention


@pytest.fixture(scope="module")
def op():
    return op_of(emulation.load(emulation.build()))


def run(op, arguments: tuple, options: dict) -> Tensor:
    """The output; elements that nothing wrote are NaN."""
    scale = {"scale": arguments[0].shape[2] ** -0.5} | options
    with Guarded() as guarded:
        options = {name: guarded(value) if isinstance(value, Tensor) else value for name, value in scale.items()}
        return op(*map(guarded, arguments), **options)


def assert_attention(op, arguments: tuple, options: dict) -> None:
    got, (want, bound) = run(op, arguments, options), oracle(*arguments, **options)
    assert_within(got, want, bound + (2.0**-7 * want.abs().amax() if want.numel() else 0))
    assert_counters_are_zero(op)


def assert_counters_are_zero(op) -> None:
    assert not op.__globals__["tickets"](torch.device("cpu"), 1).any()


def alone(arguments: tuple, options: dict, request: int) -> tuple[tuple, dict]:
    """The call with one of the requests only."""
    q, k_cache, v_cache = arguments
    start, end = options["query_start_loc"][request : request + 2].tolist()
    one = dict(page_table=options["page_table"][request : request + 1].contiguous(), seq_lens=options["seq_lens"][request : request + 1])
    return (q[start:end], k_cache, v_cache), options | one | dict(query_start_loc=torch.tensor([0, end - start], dtype=torch.int32))


@pytest.mark.parametrize("chunk_size", [None, TILE, 200, 2 * TILE])
@pytest.mark.parametrize("keys", [1, TILE - 1, TILE, TILE + 1, 199, 200, 201, 2 * TILE, 2 * TILE + 1, 5 * TILE + 3])
def test_lengths_about_tiles_and_chunks(op, keys, chunk_size):
    """Of each length a prompt, one query, and the most queries of a speculative step."""
    lengths = [(keys, min(keys, 150)), (keys, 1), (keys, min(keys, 8)), (keys, min(keys, 9))]
    assert_attention(op, *batch(lengths, chunk_size=chunk_size, page_size=16, **SCOUT))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("table", ["pages", "slots", "mapped slots"])
@pytest.mark.parametrize("heads", [(5, 1, 128), (4, 2, 64), (16, 1, 64)])
@pytest.mark.parametrize("cache_dtype", [BF16, FP8])
def test_caches(op, page_size, table, heads, cache_dtype):
    holds, slot_map = ("pages", False) if table == "pages" else ("slots", table == "mapped slots")
    lengths = [(300, 1), (0, 0), (290, 90), (130, 8), (40, 5), (9, 0)]
    assert_attention(op, *batch(lengths, chunk_size=192, page_size=page_size, holds=holds, heads=heads, dtype=BF16, cache_dtype=cache_dtype,
                                padding=3, rows=True, slot_map=slot_map))  # fmt: skip


def test_prefixes_that_end_within_a_chunk(op):
    lengths = [(prefix + new, new) for prefix, new in [(150, 100), (255, 2), (256, 140), (390, 12)]]
    assert_attention(op, *batch(lengths, chunk_size=2 * TILE, page_size=64, **SCOUT))


def test_a_chunk_smaller_than_a_tile(op):
    assert_attention(op, *batch([(300, 140), (300, 1), (65, 8)], chunk_size=48, page_size=16, **SCOUT))


def test_consecutive_slots_at_page_size_one(op):
    (q, k_cache, v_cache), options = batch([(400, 40), (300, 1)], chunk_size=None, holds="slots", **SCOUT)
    for request, keys in enumerate(options["seq_lens"].tolist()):
        slots = options["page_table"][request, :keys].long()
        start = 5 + request * 400
        for cache in (k_cache, v_cache):
            cache[start : start + keys] = cache[slots].nan_to_num()
        options["page_table"][request, :keys] = torch.arange(start, start + keys)
    assert_attention(op, (q, k_cache, v_cache), options)


def test_only_padding(op):
    arguments, options = batch([], chunk_size=None, padding=5, **SCOUT)
    assert (run(op, arguments, options) == 0).all()
    arguments, options = batch([(7, 0)], chunk_size=None, **SCOUT)
    assert run(op, arguments, options).shape == (0, 5, 128)


@pytest.mark.parametrize("cache_dtype", [BF16, FP8])
def test_caches_without_pages(op, cache_dtype):
    (q, *caches), options = batch([(0, 0)], chunk_size=None, padding=5, cache_dtype=cache_dtype, **SCOUT)
    assert_same_bits(run(op, (q, *(cache[:0] for cache in caches)), options), torch.zeros_like(q))


@pytest.mark.parametrize(("scale", "k_scale"), [(1e-8, 0.0), (1e-46, 1.0), (1e-30, 1e-30)])
def test_scales_whose_product_is_0_in_float32(op, scale, k_scale):
    arguments, options = batch([(300, 1), (290, 90)], chunk_size=192, page_size=16, cache_dtype=FP8, **SCOUT)
    assert_attention(op, arguments, options | dict(scale=scale, k_scale=torch.tensor(k_scale)))


@pytest.mark.parametrize("last", [1_000_000, 2_500_000, 9_999_999])
def test_far_positions(op, last):
    near, far = far_batch(last, **SCOUT)
    want, bound = oracle(*near[0], **near[1])
    assert_within(op(*far[0], **far[1], scale=128**-0.5), want, bound + 2.0**-7 * want.abs().amax())


def test_far_slots(op):
    near, far = far_slots()
    want, bound = oracle(*near[0], **near[1])
    assert_within(op(*far[0], **far[1], scale=128**-0.5), want, bound + 2.0**-7 * want.abs().amax())


MIXED = [(700, 1), (300, 150), (520, 8), (290, 9), (1, 1)]
SHORT = [(20, 20)] * 9  # of one tile each


@pytest.mark.parametrize("cache_dtype", [BF16, FP8])
def test_bits_depend_on_the_request_alone(op, cache_dtype):
    """Not on what stands beside it, nor on what ran before."""
    arguments, options = batch(MIXED, chunk_size=512, page_size=16, cache_dtype=cache_dtype, **SCOUT)
    together = run(op, arguments, options)
    assert_same_bits(run(op, arguments, options), together)
    for request, (start, end) in enumerate(zip(options["query_start_loc"].tolist(), options["query_start_loc"].tolist()[1:])):
        assert_same_bits(run(op, *alone(arguments, options, request)), together[start:end])


@pytest.mark.parametrize("cache_dtype", [BF16, FP8])
def test_bits_do_not_depend_on_how_many_splits_a_run_has(op, cache_dtype):
    """On three blocks long runs of up to 32, in requests whose splits are no multiple of a run and end in one tile; and each split alone."""
    lengths = [(9000, 1), (3000, 8), (4100, 2), (700, 1), (1290, 3)]
    arguments, options = batch(lengths, chunk_size=None, page_size=64, heads=(5, 1, 64), dtype=BF16, cache_dtype=cache_dtype)
    assert_attention(op, arguments, options)
    each_alone = op_of(planted.kernels(CHANGES, "splits alone"))
    assert_same_bits(run(op, arguments, options), run(each_alone, arguments, options))


@pytest.mark.parametrize(("cache_dtype", "splits"), [(BF16, 2), (FP8, 3)])
def test_many_queries_after_a_long_prefix(op, cache_dtype, splits):
    """Their keys are split, whatever stands beside them."""
    heads, prefix = (2, 1, 64), splits * 64 * TILE + 5
    arguments, options = batch(
        [(300, 20), (prefix + 50, 50), (prefix, 1)], chunk_size=None, page_size=64, heads=heads, dtype=BF16, cache_dtype=cache_dtype
    )
    assert op.__globals__["max_many_splits"](71 * 2, 64, options["page_table"].shape[1] * 64, 1 << 30) == splits
    together = run(op, arguments, options)
    assert_attention(op, arguments, options)
    assert_same_bits(run(op, *alone(arguments, options, 1)), together[20:70])


def test_a_launch_asks_for_every_counter_that_it_counts_in():
    """As no launch has asked for more before. The last one counts the splits of the last rows of the last KV head."""
    fresh = op_of(emulation.load(emulation.build()))
    lengths = [(2 * 64 * TILE + 55, 50)]
    assert_attention(fresh, *batch(lengths, chunk_size=None, page_size=64, heads=(4, 2, 64), dtype=BF16))


@pytest.mark.parametrize(
    "rows, table_keys, chunk_size, want",
    [(5 << 13, 1 << 20, 1 << 30, 4), (5 << 13, 1 << 20, 8192, 1), (5 << 13, 1 << 14, 1 << 30, 2), (40 << 13, 1 << 20, 1 << 30, 1), (0, 1 << 20, 1 << 30, 4)],
)  # fmt: skip
def test_how_many_splits_many_queries_may_have(op, rows, table_keys, chunk_size, want):
    assert op.__globals__["max_many_splits"](rows, 128, table_keys, chunk_size) == want


@pytest.mark.parametrize("slow_lanes", [False, True])
def test_bits_do_not_depend_on_who_computes_what(op, slow_lanes):
    """However many of the blocks are there to draw, every item is computed once, and the counters are 0 again."""
    arguments, options = batch([*MIXED, *SHORT], chunk_size=512, page_size=16, **SCOUT)
    together = run(op, arguments, options)
    kernels = planted.kernels(CHANGES, "slow lanes") if slow_lanes else emulation.load(emulation.build())
    for blocks in (1, 2, 3):
        alone = op_of(kernels, blocks)
        for _ in range(3):
            assert_same_bits(run(alone, arguments, options), together)
            assert_counters_are_zero(alone)


def test_few_queries_free_a_tile_of_v_before_the_next_of_k(op, monkeypatch):
    """So that loading V does not wait for that K: loading it first comes to the same, in splits of many tiles."""
    arguments, options = batch([(700, 1), (520, 8), (1200, 3)], chunk_size=None, page_size=16, **SCOUT)
    v_first = op_of(planted.kernels(CHANGES, "v first"))
    for each in (op, v_first):
        monkeypatch.setitem(each.__globals__, "PARTIAL_BYTES", 1)
    assert_same_bits(run(v_first, arguments, options), run(op, arguments, options))


def test_fewer_splits_where_memory_is_short(op, monkeypatch):
    arguments, options = batch([(1500, 1), (900, 8)], chunk_size=None, page_size=16, **SCOUT)
    monkeypatch.setitem(op.__globals__, "PARTIAL_BYTES", 2 * 9 * 5 * 4 * 128 * 2)  # for two
    assert_attention(op, arguments, options)


@pytest.mark.parametrize(
    "rows, most_keys, chunk_size, want",
    [(1, 1, 8192, 1), (1, 1 << 20, 8192, 33), (1, 1 << 20, 1 << 30, 128), (1 << 11, 1 << 20, 1 << 30, 64)],
)
def test_how_many_splits_there_may_be(op, rows, most_keys, chunk_size, want):
    assert op.__globals__["max_few_splits"](rows, 128, most_keys, chunk_size) == want


def test_lengths_that_are_too_small_keep_nobody_waiting(op):
    """They are an error that only the check of values notices; the other request does not."""
    arguments, options = batch([(600, 400), (300, 1)], chunk_size=None, page_size=16, **SCOUT)
    want = run(op, arguments, options)[400:]
    options["seq_lens"] = torch.tensor([5, 300], dtype=torch.int32)
    assert_same_bits(run(op, arguments, options)[400:], want)
    assert_counters_are_zero(op)


def test_nan_that_a_request_sees_stays_in_it(op):
    (q, k_cache, v_cache), options = batch([(60, 4), (200, 140), (150, 1)], chunk_size=None, **SCOUT)
    clean = run(op, (q, k_cache, v_cache), options)
    slot = int(options["page_table"][1, 3])
    for cache in (k_cache, v_cache):
        cache[slot] = float("nan")
        spoilt = run(op, (q, k_cache, v_cache), options)
        assert spoilt[4:144].isnan().all()
        assert_same_bits(spoilt[:4], clean[:4]), assert_same_bits(spoilt[144:], clean[144:])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        (dict(dtype=torch.float32), "q is float32, not bfloat16"),
        (dict(cache_dtype=torch.float32), "the caches are float32, not bfloat16 or float8_e4m3fn"),
        (dict(heads=(4, 2, 32)), "head_dim is 32, not 64 or 128"),
    ],
)
def test_what_it_does_not_take(op, changes, reason):
    arguments, options = batch([(3, 1)], chunk_size=None, **(SCOUT | changes))
    why_not = op.__globals__["why_not_chunked_attention"]
    assert why_not(*arguments, **options, scale=0.1) == reason
    assert op.__globals__["why_not_dtype"](arguments[0].dtype, "q") == (reason if reason.startswith("q is") else "")
    if not reason:
        assert why_not(*arguments, **options, scale=-0.1) == "scale is -0.1, not above 0"
        shifted = torch.empty(arguments[0].numel() + 1, dtype=BF16)[1:].view_as(arguments[0])
        assert why_not(shifted, *arguments[1:], **options, scale=0.1) == "q or a cache does not start at a multiple of 16 bytes"


def without_wild_entries(arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """The same with entries of the page table that lead to NaN in place of garbage, so that a stray read is not a crash."""
    _, k_cache, _ = arguments
    pages, table = k_cache.float().isnan().flatten(1).all(1), options["page_table"].clone()
    unused = int(pages.nonzero()[0])
    if options["page_table_holds"] == "slots":
        unused *= k_cache.shape[1]
        unused = unused if options["slot_map"] is None else int((options["slot_map"] == unused).nonzero()[0])
    table[table == GARBAGE] = unused
    return arguments, options | {"page_table": table}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_noticed(bug, monkeypatch):
    op = op_of(planted.kernels(CHANGES, bug))
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right(op, monkeypatch)


def test_without_a_bug_nothing_is_noticed(monkeypatch):
    assert_right(op_of(planted.kernels(CHANGES, None)), monkeypatch)


def assert_right(op, monkeypatch) -> None:
    """In three batches: of gathered rows, of pages that TMA takes, and of fp8; and in the first one again, in splits of five tiles."""
    lengths = [(590, 1), (640, 150), (520, 8), (605, 9), (900, 2), *SHORT]
    mapped = batch(lengths, chunk_size=600, page_size=4, holds="slots", slot_map=True, padding=2, **SCOUT)
    paged = batch(lengths, chunk_size=600, page_size=64, **SCOUT)
    fp8 = batch(lengths, chunk_size=600, page_size=16, cache_dtype=FP8, **SCOUT)
    for arguments, options in (mapped, paged, fp8):
        assert_attention(op, *without_wild_entries(arguments, options))
    monkeypatch.setitem(op.__globals__, "PARTIAL_BYTES", 1)
    assert_attention(op, *without_wild_entries(*mapped))


def test_sanitizers_watch_every_path():
    done = emulation.run_sanitized_kernels(RUN_SANITIZED)
    assert done.returncode == 0, done.stderr


RUN_SANITIZED = """
def zeros(size):
    address = libc.memalign(ctypes.c_size_t(16), ctypes.c_size_t(size))
    ctypes.memset(address, 0, size)
    return address
def ints(*values):
    address = zeros(4 * len(values))
    ctypes.memmove(address, (ctypes.c_int * len(values))(*values), 4 * len(values))
    return address
kernels.run_together(3)
requests, width, tokens, splits, none = 4, 300, 20, 2, kernels.Indices(0, False)
for head_dim in (64, 128):
    for dtype, size in (("bfloat16", 2), ("float8_e4m3fn", 1)):
        for page_size, holds_slots in ((1, True), (50, False)):
            columns = width if holds_slots else width // page_size
            cache = width * 2 * head_dim * size
            kernels.chunked_attention(
                q=zeros(tokens * 6 * head_dim * 2), k_cache=zeros(cache), v_cache=zeros(cache), kv_dtype=getattr(kernels.Dtype, dtype),
                out=zeros(tokens * 6 * head_dim * 2), tokens=tokens, num_heads=6, num_kv_heads=2, head_dim=head_dim, slots=width,
                page_size=page_size, holds_slots=holds_slots, page_table=ints(*range(columns), *[2**30] * columns, *range(columns), *range(columns)),
                page_table_stride=columns, requests=requests, page_table_rows=none, slot_map=none, seq_lens=ints(300, 9, 200, 1),
                query_start_loc=ints(0, 5, 5, 17, 18), chunk_size=190, scale=0.1, k_scale=zeros(4), v_scale=zeros(4),
                few_partial=zeros(tokens * 6 * splits * kernels.ATTENTION_FEW_PARTS * head_dim * 4),
                few_lse=zeros(tokens * 6 * splits * kernels.ATTENTION_FEW_PARTS * 4), few_tickets=zeros(requests * 2 * 4),
                few_max_splits=splits, many_partial=0, many_lse=0, many_tickets=0, many_max_splits=1, drawn=zeros(4), stream=0)
"""
