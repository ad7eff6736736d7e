"""How evenly chunked_attention's items of work fall on 132 blocks, in tiles: taken by stride, and drawn. Arithmetic, not a measurement: an
item costs its tiles, and every tile the same.

The items are those of csrc/attention_work.cuh, called on the host; the rows of docs/attention.md's table are held to what comes out.
"""

from __future__ import annotations

import ctypes
import heapq
import random
from collections.abc import Callable
from pathlib import Path

import emulation
import pytest

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

DOCUMENT = Path(__file__).parents[1] / "docs" / "attention.md"
BLOCKS = 132
TILES_AHEAD = 3  # before the last tile is loaded, the two before it are on their way or attended to, and the one before those is done
CHUNK, NO_CHUNK, MAX_SPLITS = 8192, 1 << 30, 128
CAPACITY = 1 << 16


@pytest.fixture(scope="module")
def items() -> Callable[..., list[int]]:
    """Of requests of (keys, queries) the tiles of each item, in the order of their numbers."""
    library = ctypes.CDLL(str(emulation.build(sources=[Path(__file__).with_name("attention_items.cu")])))

    def items(requests: list[tuple[int, int]], heads: tuple[int, int], chunk_size: int) -> list[int]:
        starts = [0]
        for _, queries in requests:
            starts.append(starts[-1] + queries)
        tiles, seq_lens = (ctypes.c_int * CAPACITY)(), (ctypes.c_int * len(requests))(*(keys for keys, _ in requests))
        query_start_loc = (ctypes.c_int * len(starts))(*starts)
        count = library.attention_items(len(requests), seq_lens, query_start_loc, *heads, chunk_size, MAX_SPLITS, BLOCKS, tiles, CAPACITY)
        assert count <= CAPACITY
        return tiles[:count]

    return items


def by_stride(tiles: list[int]) -> list[int]:
    """Tiles of each block, where block b takes items b, b + BLOCKS, …"""
    return [sum(tiles[block::BLOCKS]) for block in range(BLOCKS)]


def drawn(tiles: list[int]) -> list[int]:
    """Tiles of each block, where it draws its next item when it has TILES_AHEAD left of those that it has."""
    load = tiles[:BLOCKS] + [0] * (BLOCKS - len(tiles))
    draws = [(max(load[block] - TILES_AHEAD, 0), block) for block in range(min(BLOCKS, len(tiles)))]
    heapq.heapify(draws)
    for tile_count in tiles[BLOCKS:]:
        time, block = draws[0]
        load[block] += tile_count
        heapq.heapreplace(draws, (max(load[block] - TILES_AHEAD, time), block))
    assert sum(load) == sum(tiles)
    return load


def busiest(load: list[int]) -> float:
    """The busiest block's tiles in terms of the mean: 1 is even."""
    return max(load) * BLOCKS / sum(load)


def mixed() -> list[tuple[int, int]]:
    """64 requests in any order: prompts with and without a prefix, single queries, and the end of one long prompt."""
    rng = random.Random(64)
    requests = [(queries + rng.choice([0, 0, 2000, 30000]), queries) for queries in rng.choices([1, 30, 100, 300, 1000], k=63)]
    requests.append((120_000, 500))
    rng.shuffle(requests)
    return requests


BATCHES = {f"{keys // 1024}k": [(keys, keys)] for keys in (4096, 8192, 16384, 131072)}
BATCHES |= {
    "8k after 56k": [(65536, 8192)],
    "8k after 120k": [(131072, 8192)],
    "64 mixed": mixed(),
    "64 mixed, long first": sorted(mixed(), reverse=True),
}


@pytest.mark.parametrize("heads", [(5, 1), (40, 8)], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_the_document_says_what_comes_out(items, name, heads):
    row = f"| {name} | {heads[0]} : {heads[1]} |"
    for chunk_size in (CHUNK, NO_CHUNK):
        tiles = items(BATCHES[name], heads, chunk_size)
        before, after = busiest(by_stride(tiles)), busiest(drawn(tiles))
        assert after <= before + 0.005
        row += f" {before:.2f} → {after:.2f} |"
    assert row in DOCUMENT.read_text().splitlines()


def test_a_block_of_short_items_draws_more_of_them():
    assert busiest(by_stride([99] * BLOCKS + [1] * BLOCKS)) == 1
    assert drawn([99] + [10] * (BLOCKS + 50)) == [99] + [20] * 51 + [10] * (BLOCKS - 52)
    assert drawn([5, 4]) == [5, 4] + [0] * (BLOCKS - 2)
