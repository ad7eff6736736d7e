"""How evenly chunked_attention's items of work fall on 132 blocks, in tiles: taken by stride, and drawn. Arithmetic, not a measurement: an
item costs its tiles, and every tile the same; of few queries also ITEM_TILES.

The items are those of csrc/attention_schedule.cuh, called on the host; the rows of docs/attention.md's table are held to what comes out.
"""

from __future__ import annotations

import ctypes
import heapq
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import emulation
import pytest

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "-")

DOCUMENT = Path(__file__).parents[1] / "docs" / "attention.md"
COST = emulation.CSRC / "attention_cost.cuh"
BLOCKS = 132
TILES_AHEAD = 3  # before the last tile is loaded, the two before it are on their way or attended to, and the one before those is done
ITEM_TILES = {False: 2.5, True: 5.0}  # what an item of few queries costs beside its tiles, in bfloat16 and in fp8, at D = 128
CHUNK, NO_CHUNK, MAX_SPLITS = 8192, 1 << 30, 128
CAPACITY = 1 << 17


@pytest.fixture(scope="module")
def items() -> Callable[..., list[int]]:
    """Of requests of (keys, queries) the tiles of each item, in the order of their numbers. run: splits that an item of few queries takes
    at most, in place of what the kernel chooses."""
    library = ctypes.CDLL(str(emulation.build(sources=[Path(__file__).with_name("attention_items.cu")])))

    def items(requests: list[tuple[int, int]], heads: tuple[int, int], chunk_size: int, *, fp8: bool = False, run: int = 0) -> list[int]:
        starts = [0]
        for _, queries in requests:
            starts.append(starts[-1] + queries)
        tiles, seq_lens = (ctypes.c_int * CAPACITY)(), (ctypes.c_int * len(requests))(*(keys for keys, _ in requests))
        query_start_loc = (ctypes.c_int * len(starts))(*starts)
        count = library.attention_items(
            len(requests), seq_lens, query_start_loc, *heads, fp8, chunk_size, MAX_SPLITS, run, BLOCKS, tiles, CAPACITY
        )
        assert count <= CAPACITY
        return tiles[:count]

    return items


def decode_time(tiles: list[int], item_tiles: float) -> float:
    """When the last block ends, in tiles, where each draws its next item as soon as it is free."""
    ends = [0.0] * BLOCKS
    for count in tiles:
        heapq.heapreplace(ends, ends[0] + count + item_tiles)
    return max(ends)


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


def decoding(requests: int, least: int, most: int, rng: random.Random) -> list[tuple[int, int]]:
    """Requests of a query each, whose keys are spread evenly by their logarithm."""
    return [(int(least * (most / least) ** rng.random()), 1) for _ in range(requests)]


def decode_batches() -> dict[str, list[tuple[int, int]]]:
    rng = random.Random(8192)
    batches = {f"{b} × {keys}": [(keys, 1)] * b for b in (1, 8, 16, 64, 128, 140, 256) for keys in (1000, 8192, 8300)}
    batches |= {f"{b} × {keys}": [(keys, 1)] * b for b in (1, 16, 64) for keys in (65536, 131072)}
    batches |= {f"{b} × 100 to 100,000": decoding(b, 100, 100_000, rng) for b in (8, 64, 256)}
    batches |= {f"{b} × 1000 to 8000": decoding(b, 1000, 8000, rng) for b in (8, 64, 256)}
    batches |= {f"{b} × 1000, one of 100,000": [*decoding(b, 500, 2000, rng), (100_000, 1)] for b in (8, 64, 256)}
    return batches


DECODE_BATCHES = decode_batches()
IN_THE_DOCUMENT = ["1 × 8192", "8 × 8192", "16 × 8192", "64 × 8192", "140 × 8192", "256 × 1000", "64 × 65536", "64 × 100 to 100,000"]


@pytest.mark.parametrize("fp8", [False, True])
def test_how_many_splits_an_item_of_few_queries_takes(items, fp8):
    """By this arithmetic the kernel's choice is 1 % behind the best one on average."""
    losses = {}
    for name, batch in DECODE_BATCHES.items():
        for heads in ((5, 1), (40, 8)):
            chosen, *others = (
                decode_time(items(batch, heads, NO_CHUNK, fp8=fp8, run=run), ITEM_TILES[fp8]) for run in (0, 1, 2, 3, 4, 6, 8, 11, 16, 22, 32)
            )
            losses[name, heads] = chosen / min(others)
    assert max(losses.values()) < 1.25, max(losses.items(), key=lambda item: item[1])
    assert statistics.mean(losses.values()) < 1.015


@pytest.mark.parametrize("name", IN_THE_DOCUMENT)
def test_the_document_says_what_runs_of_splits_gain(items, name):
    row = f"| {name} |"
    for fp8 in (False, True):
        alone, chosen = (items(DECODE_BATCHES[name], (5, 1), NO_CHUNK, fp8=fp8, run=run) for run in (1, 0))
        before, after = (decode_time(tiles, ITEM_TILES[fp8]) * BLOCKS / sum(tiles) for tiles in (alone, chosen))
        row += f" {len(alone)} → {len(chosen)} | {before:.2f} → {after:.2f} |"
    assert row in DOCUMENT.read_text().splitlines()


def test_what_an_item_costs_in_tiles_is_what_the_kernel_says():
    bytes_of_item = int(re.search(r"ATTENTION_ITEM_BYTES = (\d+) << 10", COST.read_text())[1]) << 10
    assert ITEM_TILES == {fp8: bytes_of_item / (2 * 128 * 128 * (1 if fp8 else 2)) for fp8 in (False, True)}


def balance(items: Callable[..., list[int]], name: str, heads: tuple[int, int], chunk_size: int) -> tuple[float, float]:
    """Of a batch the busiest block by stride, and where blocks draw."""
    tiles = items(BATCHES[name], heads, chunk_size)
    before, after = busiest(by_stride(tiles)), busiest(drawn(tiles))
    assert after <= before + 0.005
    return before, after


@pytest.mark.parametrize("name", BATCHES)
def test_the_document_says_what_comes_out(items, name):
    row = f"| {name} |"
    for chunk_size in (CHUNK, NO_CHUNK):
        before, after = balance(items, name, (5, 1), chunk_size)
        row += f" {before:.2f} → {after:.2f} |"
    assert row in DOCUMENT.read_text().splitlines()


def test_the_document_says_what_comes_out_for_all_heads(items):
    found = [balance(items, name, (40, 8), chunk_size) for name in BATCHES for chunk_size in (CHUNK, NO_CHUNK)]
    before, after = (max(ratios) for ratios in zip(*found, strict=True))
    assert f"With 40 query heads and 8 KV heads it is at most {before:.2f} → {after:.2f} in these batches." in DOCUMENT.read_text()


def test_a_block_of_short_items_draws_more_of_them():
    assert busiest(by_stride([99] * BLOCKS + [1] * BLOCKS)) == 1
    assert drawn([99] + [10] * (BLOCKS + 50)) == [99] + [20] * 51 + [10] * (BLOCKS - 52)
    assert drawn([5, 4]) == [5, 4] + [0] * (BLOCKS - 2)
