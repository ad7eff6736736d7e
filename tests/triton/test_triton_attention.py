"""The attention kernels against the reference, around every tile, split and chunk boundary, in every paging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import few_examples, generator, same_bits
from guards import Guarded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama4_kernels.reference.attention import chunked_attention as reference
from llama4_kernels.triton import attention

pytestmark = pytest.mark.triton

FP8 = torch.float8_e4m3fn
BOUNDS = {torch.bfloat16: 4e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """requests: (keys in all, queries) each. A chunk of 40 is no multiple of the interpreter's tiles of 16 keys or 32 rows."""

    requests: tuple[tuple[int, int], ...]
    chunk_size: int | None = 40
    num_heads: int = 5
    num_kv_heads: int = 1
    head_dim: int = 16
    page_size: int = 1
    holds: str = "pages"
    mapped: bool = False
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    padding: int = 0
    seed: int = 0

    def arguments(self, device: torch.device) -> dict:
        """What chunked_attention takes. Slots that no query sees, and the first and last page, hold NaN; so does the padding of q."""
        random = generator(self.seed)
        lengths = torch.tensor([keys for keys, _ in self.requests], dtype=torch.int32)
        queries = torch.tensor([0] + [count for _, count in self.requests], dtype=torch.int32)
        step = self.page_size
        columns = -(-max(int(lengths.max()), 1) // step)
        pages = len(self.requests) * columns + 2
        table = torch.randperm(pages - 2, generator=random).view(len(self.requests), columns) + 1
        caches = torch.full((2, pages, step, self.num_kv_heads, self.head_dim), torch.nan)
        slots = (table[:, :, None] * step + torch.arange(step)).flatten(1)
        for row, (keys, count) in zip(slots, self.requests):
            first = 0 if self.chunk_size is None else (keys - count) // self.chunk_size * self.chunk_size
            seen = row[first:keys]
            caches.flatten(1, 2)[:, seen] = torch.randn(2, len(seen), *caches.shape[3:], generator=random)
        q = torch.randn(int(queries.sum()) + self.padding, self.num_heads, self.head_dim, generator=random)
        q[int(queries.sum()) :] = torch.nan
        k_cache, v_cache = caches.to(self.kv_dtype)
        arguments = dict(
            q=q.to(self.dtype), k_cache=k_cache, v_cache=v_cache, page_table=table.int(), seq_lens=lengths,
            query_start_loc=queries.cumsum(0).int(), chunk_size=self.chunk_size, scale=self.head_dim**-0.5, page_table_holds=self.holds,
        )  # fmt: skip
        if self.holds == "slots":
            order = torch.randperm(len(self.requests), generator=random)
            arguments |= dict(page_table=slots.int()[order], page_table_rows=order.argsort())
        if self.mapped:
            forward = torch.randperm(pages * step, generator=random)
            arguments |= dict(page_table=forward.argsort()[arguments["page_table"].long()].int(), slot_map=forward)
        if self.kv_dtype == FP8:
            arguments |= dict(k_scale=torch.tensor(0.7), v_scale=torch.tensor([1.3]))
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def run(arguments: dict) -> Tensor:
    with Guarded() as guarded:
        return attention.chunked_attention(**{name: guarded(value) if isinstance(value, Tensor) else value for name, value in arguments.items()})


def check(case: Case, device: torch.device) -> Tensor:
    arguments = case.arguments(device)
    out = run(arguments)
    expected = reference(**arguments | {"q": arguments["q"].float()})
    assert (out.float() - expected).norm() <= BOUNDS[case.dtype] * expected.norm()
    padding = out[int(arguments["query_start_loc"][-1]) :]
    assert same_bits(padding, torch.zeros_like(padding))
    return out


@pytest.mark.parametrize("queries", [1, 8, 9, 45])
@pytest.mark.parametrize("keys", [39, 40, 41, 79, 80, 81, 97])
def test_around_chunk_boundaries(device, keys, queries):
    check(Case(((max(keys, queries), queries),)), device)


@pytest.mark.parametrize("chunk_size", [1, 16, 32, 1000, 2**31 - 1, None])
@pytest.mark.parametrize("queries", [3, 33])
def test_chunk_sizes(device, chunk_size, queries):
    check(Case(((70, queries),), chunk_size), device)


@pytest.mark.parametrize("keys", range(15, 20))
def test_around_tile_boundaries(device, keys):
    check(Case(((keys, 3), (keys + 16, 3)), None), device)


def test_block_with_more_keys_than_a_chunk(device):
    """Queries on both sides of a chunk's border see one chunk and more between them, which takes one split more."""
    check(Case(((66, 4),), chunk_size=32), device)


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("holds, mapped", [("pages", False), ("slots", False), ("slots", True)])
@pytest.mark.parametrize("queries", [2, 20])
def test_paging(device, page_size, holds, mapped, queries):
    check(Case(((90, queries), (13, 13)), page_size=page_size, holds=holds, mapped=mapped), device)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (4, 4), (4, 1), (10, 2), (40, 2)])
@pytest.mark.parametrize("queries", [1, 12])
def test_groups(device, num_heads, num_kv_heads, queries):
    check(Case(((50, queries),), num_heads=num_heads, num_kv_heads=num_kv_heads), device)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
@pytest.mark.parametrize("queries", [2, 14])
def test_head_dims(device, head_dim, queries):
    check(Case(((50, queries),), head_dim=head_dim, num_heads=4, num_kv_heads=2), device)


@pytest.mark.parametrize("dtype, kv_dtype", [(torch.float32, torch.float32), (torch.bfloat16, FP8), (torch.float32, FP8), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("queries", [2, 20])
def test_dtypes(device, dtype, kv_dtype, queries):
    check(Case(((90, queries), (30, 1)), dtype=dtype, kv_dtype=kv_dtype), device)


@pytest.mark.parametrize("requests", [((90, 2), (30, 1)), ((90, 20), (30, 1)), ((90, 20),)])
def test_caches_in_float32_are_not_rounded_to_the_dtype_of_q(device, requests):
    arguments = Case(requests, kv_dtype=torch.float32).arguments(device)
    assert same_bits(run(arguments), run(arguments | {"q": arguments["q"].float()}).bfloat16())


REQUESTS = st.lists(st.tuples(st.integers(0, 70), st.one_of(st.integers(0, 9), st.integers(0, 50))), min_size=1, max_size=5)


@given(REQUESTS, st.sampled_from([7, 16, 40, None]), st.sampled_from([1, 3, 16]), st.sampled_from(["pages", "slots"]), st.integers(0, 12))
@few_examples
def test_any_batch(device, requests, chunk_size, page_size, holds, padding):
    requests = tuple((before + queries, queries) for before, queries in requests)
    check(Case(requests, chunk_size, page_size=page_size, holds=holds, padding=padding), device)


@pytest.mark.parametrize("requests", [((0, 0), (0, 0)), ((0, 0), (60, 1), (0, 0)), ((0, 0), (60, 50), (0, 0), (9, 1))])
@pytest.mark.parametrize("padding", [0, 1, 30])
def test_empty_requests_and_padding(device, requests, padding):
    check(Case(requests, padding=padding), device)


def test_long_request_where_most_are_short(device):
    """8 queries per request or fewer on average: the split kernel computes the long request too."""
    check(Case(((60, 32), (5, 1), (99, 1), (9, 1), (40, 2))), device)


def test_long_and_short_requests(device):
    """The prefill kernel takes those of 9 queries and more, the split kernel the others."""
    check(Case(((60, 9), (60, 8), (90, 40), (33, 1))), device)


def test_no_queries(device):
    assert run(Case(((5, 0),)).arguments(device)).shape == (0, 5, 16)


@pytest.mark.parametrize("case", [Case(((90, 1), (64, 3))), Case(((90, 50),)), Case(((90, 50), (70, 2)))])
def test_same_bits_again(device, case):
    arguments = case.arguments(device)
    assert same_bits(run(arguments), run(arguments))


@pytest.mark.parametrize("others", [((33, 1), (79, 4), (0, 0), (120, 1)), ((64, 60), (10, 1))])
def test_bits_do_not_depend_on_neighbours(device, others):
    """A long and a short request, in a batch of their own and among `others`."""
    own = Case(((90, 50), (75, 2))).arguments(device)
    alone = run(own)
    neighbours = Case(others, seed=1).arguments(device)
    shift = len(own["k_cache"])
    columns = max(own["page_table"].shape[1], neighbours["page_table"].shape[1])
    pad = torch.nn.functional.pad
    tables = [pad(neighbours["page_table"] + shift, (0, columns - neighbours["page_table"].shape[1])), pad(own["page_table"], (0, columns - own["page_table"].shape[1]))]
    counts = torch.cat([neighbours["query_start_loc"].diff(), own["query_start_loc"].diff()])
    among = own | dict(
        {name: torch.cat([own[name], neighbours[name]]) for name in ("k_cache", "v_cache")},
        **{name: torch.cat([neighbours[name], own[name]]) for name in ("q", "seq_lens")},
        page_table=torch.cat(tables),
        query_start_loc=pad(counts.cumsum(0).int(), (1, 0)),
    )
    assert same_bits(run(among)[-len(alone) :], alone)


@pytest.mark.parametrize("case", [Case(((90, 2), (300, 1)), None), Case(((90, 2), (300, 1), (30, 30)), None)])
def test_fewer_splits_than_keys_would_fill(device, case, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SPLITS", 3)
    check(case, device)


@pytest.mark.parametrize("case", [Case(((90, 1), (75, 7))), Case(((90, 50),)), Case(((90, 30), (75, 2)))])
def test_unwritten_partial_results_are_not_read(device, case):
    """Guarded allocations are NaN until written: the output is finite, so that nothing unwritten was read."""
    assert run(case.arguments(device)).isfinite().all()


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("queries", [4, 50])
@pytest.mark.parametrize("position", [38, 39, 40, 56, 59])
def test_nonfinite_values_reach_only_queries_that_see_them(device, position, queries, special):
    arguments = Case(((60, queries),)).arguments(device)
    clean = run(arguments)
    slot = arguments["page_table"][0, position]
    arguments["v_cache"][slot] = special
    spoilt = run(arguments)
    seen = torch.arange(60 - queries, 60)
    seen = (seen >= position) & (seen // 40 == position // 40)
    assert not spoilt[seen].isfinite().any()
    assert same_bits(spoilt[~seen], clean[~seen])


@pytest.mark.parametrize("position", [1_000_000, 2_500_000, 10_000_000])
@pytest.mark.parametrize("queries", [1, 20])
def test_extreme_positions(device, position, queries):
    """A short cache planted where a long context ends; every request shares one row of a page table that long."""
    chunk_size = 8192
    keys = position // chunk_size * chunk_size + 50
    table = torch.full((1, keys), -1, dtype=torch.int32)
    table[0, -50:] = torch.randperm(64, generator=generator(0))[:50]
    k_cache, v_cache = torch.randn(2, 64, 1, 1, 16, generator=generator(1)).bfloat16()
    arguments = dict(
        q=torch.randn(queries, 5, 16, generator=generator(2)).bfloat16(), k_cache=k_cache, v_cache=v_cache, page_table=table,
        seq_lens=torch.tensor([keys], dtype=torch.int32), query_start_loc=torch.tensor([0, queries], dtype=torch.int32),
        chunk_size=chunk_size, scale=0.25, page_table_holds="slots",
    )  # fmt: skip
    arguments = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    out = attention.chunked_attention(**arguments)
    near = arguments | dict(page_table=arguments["page_table"][:, -50:], seq_lens=torch.tensor([50], dtype=torch.int32, device=device))
    expected = reference(**near | {"q": arguments["q"].float()})
    assert (out.float() - expected).norm() <= BOUNDS[torch.bfloat16] * expected.norm()


def sparse(path: Path, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `size` elements; on the CPU those that are never touched take no memory."""
    if device.type == "cuda":
        return torch.empty(size, dtype=dtype, device=device)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


@pytest.mark.parametrize("queries", [1, 20])
def test_slots_and_page_table_rows_beyond_32_bits(device, tmp_path, queries):
    """The same keys in a cache and a page table whose last elements are more than 2³¹ away."""
    case = Case(((40, queries),), holds="slots", head_dim=128)
    arguments = case.arguments(device)
    expected = run(arguments)
    near = arguments["k_cache"]
    last = 2**24 + 2 * len(near)
    cache = sparse(tmp_path / "cache", last * 128, torch.bfloat16, device).view(-1, 1, 1, 128)
    far = cache[-2 * len(near) :].view(2, *near.shape)
    far[0], far[1] = near, arguments["v_cache"]
    table = sparse(tmp_path / "table", 2**31 + 40, torch.int32, device).as_strided((3, 40), (2**30, 1))
    table[2] = arguments["page_table"][0] + last - 2 * len(near)
    v_cache = cache[len(near) :]
    given = arguments | dict(k_cache=cache, v_cache=v_cache, page_table=table, page_table_rows=torch.tensor([2], dtype=torch.int32, device=device))
    assert same_bits(attention.chunked_attention(**given), expected)
