"""How evenly the stages of moe_gate_up and moe_down fall on blocks: in equal runs, as csrc/moe_runs.cuh cuts them, and in whole splits of every
tile along K, as before. `PYTHONPATH=tests python tests/moe_balance.py` prints the rows of docs/moe.md's table, and those between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

MULTIPROCESSORS = 132
MIN_RUN, MANY_ROUNDS = 4, 8  # of csrc/moe.h
HIDDEN, INNER = 5120, 1024  # Scout's and Maverick's at TP 8
MODELS = {"Scout": 16, "Maverick": 128}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024)
IN_THE_DOCUMENT = (1, 64, 128, 1024)


def spread(tokens: int, experts: int) -> list[int]:
    """Tokens of each expert, where they are spread as evenly as can be."""
    return [tokens * (expert + 1) // experts - tokens * expert // experts for expert in range(experts)]


def tile_tokens(tokens: int) -> int:
    return 16 if tokens <= 16 else 64 if tokens <= 64 else 96


def down_channels(tokens: int) -> int:
    return 128 if tokens <= 64 else 256


def gate_up_tiles(counts: Sequence[int], hidden: int, inner: int, row_bytes: tuple[int, int] = (1, 1)) -> list[int]:
    """Stages of each tile. counts: tokens of each expert; row_bytes: bytes per weight, (shared, routed)."""
    rows, columns = tile_tokens(sum(counts)), _ceil_div(inner, 128)
    shared, routed = (_ceil_div(hidden * size, 128) for size in row_bytes)
    row_tiles = sum(_ceil_div(count, rows) for count in counts)
    return [shared] * (_ceil_div(sum(counts), rows) * columns) + [routed] * (row_tiles * columns)


def down_tiles(counts: Sequence[int], hidden: int, inner: int, row_bytes: tuple[int, int] = (1, 1)) -> list[int]:
    rows = tile_tokens(sum(counts))
    columns = _ceil_div(hidden, down_channels(sum(counts)))
    shared, routed = (_ceil_div(inner * size, 128) for size in row_bytes)
    ends = list(accumulate(counts))
    present = [
        sum(end - count < first + rows and end > first and count > 0 for end, count in zip(ends, counts, strict=True))
        for first in range(0, sum(counts), rows)
    ]
    return [shared + routed * experts for experts in present for _ in range(columns)]


def in_runs(tiles: Sequence[int], blocks: int = MULTIPROCESSORS) -> float:
    """Stages of the block that has most, over the mean of all."""
    if len(tiles) >= MANY_ROUNDS * blocks:
        return _busiest_over_mean(list(tiles), blocks)
    stages = sum(tiles)
    return _ceil_div(stages, min(blocks, _ceil_div(stages, MIN_RUN))) * blocks / stages


def in_splits(tiles: Sequence[int], most_tiles: int, tile_bytes: int, blocks: int = MULTIPROCESSORS) -> float:
    """The same where each tile was cut along K into as many splits as left the fewest blocks idle in the last round of `most_tiles` tiles,
    a percent for each split, at most 16 and 128 MiB of sums, and block b took every unit b + i · blocks."""
    most = 1 if most_tiles >= MANY_ROUNDS * blocks else max(min(*tiles, 16, (1 << 27) // (tile_bytes * most_tiles)), 1)

    def busy(splits: int) -> float:
        units = most_tiles * splits
        return units / (_ceil_div(units, blocks) * blocks)

    splits = max(range(1, most + 1), key=lambda splits: (busy(splits) - 0.01 * splits, -splits))
    units = [steps * (split + 1) // splits - steps * split // splits for steps in tiles for split in range(splits)]
    return _busiest_over_mean(units, blocks)


def table(token_counts: Sequence[int] = IN_THE_DOCUMENT) -> list[str]:
    lines = ["| model | T | gate_up: splits | runs | down: splits | runs |", "|---|---|---|---|---|---|"]
    for model, experts in MODELS.items():
        for tokens in token_counts:
            counts, rows = spread(tokens, experts), tile_tokens(tokens)
            gate_up, down = gate_up_tiles(counts, HIDDEN, INNER), down_tiles(counts, HIDDEN, INNER)
            most = (_ceil_div(tokens, rows) + min(tokens, tokens // rows + experts)) * _ceil_div(INNER, 128)
            tile_bytes = 4 * rows * down_channels(tokens)
            ratios = in_splits(gate_up, most, 4 * rows * 256), in_runs(gate_up), in_splits(down, len(down), tile_bytes), in_runs(down)
            lines.append(f"| {model} | {tokens} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


def _busiest_over_mean(units: Sequence[int], blocks: int) -> float:
    return max(sum(units[block::blocks]) for block in range(blocks)) * blocks / sum(units)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


if __name__ == "__main__":
    print("\n".join(table(TOKENS)))
