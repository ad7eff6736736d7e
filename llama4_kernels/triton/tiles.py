"""What the GEMM kernels share: operands and their scales, the tile of a group, and one step along K.

Every product is computed as weights × activationsᵀ: the weights' rows are the M side of the tensor core, the tokens its N side. wgmma takes
64 rows on M and as few as 8 columns on N, so a handful of tokens wastes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llama4_kernels.ops import types
from llama4_kernels.ops.types import Linear, Quantized, scale_of, values_of

# How an operand is scaled; a weight's PER_ROW is its output channel.
NONE, PER_TENSOR, PER_ROW, PER_BLOCK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SCALE_BLOCK = tl.constexpr(types.SCALE_BLOCK)
_FORMS = {
    None: NONE.value,
    "tensor": PER_TENSOR.value,
    "row": PER_ROW.value,
    "channel": PER_ROW.value,
    "block": PER_BLOCK.value,
}


class Operand(NamedTuple):
    """A GEMM operand as the kernels take it."""

    values: Tensor
    scale: Tensor | None
    form: int


def activations(x: Tensor | Quantized) -> Operand:
    return Operand(values_of(x), scale_of(x), _FORMS[x.granularity if isinstance(x, Quantized) else None])


def weights(linear: Linear) -> Operand:
    return Operand(linear.weight, linear.scale, _FORMS[linear.granularity])


def most_tiles(rows: int, groups: int, block: int) -> int:
    """Upper bound of the tiles of `block` rows that `rows` rows in `groups` groups fall into."""
    return min(rows, rows // block + groups)


def groups_width(groups: int) -> int:
    """Width of the vectors that hold one element per group: a warpgroup's threads at least, so that few kernels are compiled."""
    return max(triton.next_power_of_2(groups), 128)


@triton.jit
def group_bounds(offsets, groups, GROUPS: tl.constexpr):
    """Start and end of every group; a group past the last is empty."""
    group = tl.arange(0, GROUPS)
    start = tl.load(offsets + group, mask=group < groups, other=0)
    end = tl.load(offsets + group + 1, mask=group < groups, other=0)
    return start, end


@triton.jit
def find_tile(tile, start, end, BLOCK_T: tl.constexpr):
    """(group, first row, end of the group's rows) of a tile, the tiles being numbered by group and then by row."""
    tiles = (end - start + BLOCK_T - 1) // BLOCK_T
    last = tl.cumsum(tiles, 0)
    group = tl.sum((last <= tile).to(tl.int32), 0)
    here = tl.arange(0, start.shape[0]) == group
    first_tile = tl.sum(tl.where(here, last - tiles, 0), 0)
    group_start = tl.sum(tl.where(here, start, 0), 0)
    return group, group_start + (tile - first_tile) * BLOCK_T, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def activation_scale(scale, row, block, blocks, FORM: tl.constexpr):
    """Scales [T] of `row`, for columns of the given block of 128."""
    if FORM == PER_TENSOR:
        return tl.zeros(row.shape, tl.float32) + tl.load(scale)
    elif FORM == PER_ROW:
        return tl.load(scale + row)
    elif FORM == PER_BLOCK:
        return tl.load(scale + row.to(tl.int64) * blocks + block)
    else:
        return tl.full(row.shape, 1.0, tl.float32)


@triton.jit
def weight_scale(scale, group, column, n, block, blocks, FORM: tl.constexpr):
    """Scales [N] of the output channels `column` of one group's weight [n, k], for the given block of 128 along k."""
    if FORM == PER_TENSOR:
        return tl.zeros(column.shape, tl.float32) + tl.load(scale + group)
    elif FORM == PER_ROW:
        return tl.load(scale + group.to(tl.int64) * n + column)
    elif FORM == PER_BLOCK:
        row_blocks = (n + SCALE_BLOCK - 1) // SCALE_BLOCK
        return tl.load(scale + (group.to(tl.int64) * row_blocks + column // SCALE_BLOCK) * blocks + block)
    else:
        return tl.full(column.shape, 1.0, tl.float32)


@triton.jit
def product(w, x):
    """w [N, K] · x [T, K]ᵀ of one step, in fp32."""
    if w.dtype != x.dtype:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), input_precision="ieee")
    else:
        return tl.dot(w, tl.trans(x), input_precision="ieee")


@triton.jit
def accumulate(total, w, x):
    """total [N, T] + w [N, K] · x [T, K]ᵀ. fp8 tensor cores keep few bits of a long sum, so `total` is none of theirs: at most 128 products
    go into one."""
    if w.dtype != x.dtype:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), total, input_precision="ieee")
    elif w.dtype == tl.float8e4nv:
        return total + tl.dot(w, tl.trans(x), max_num_imprecise_acc=128)
    else:
        return tl.dot(w, tl.trans(x), total, input_precision="ieee")


@triton.jit
def tile_pointers(base, row, columns, BLOCK_K: tl.constexpr):
    """Pointers [rows, BLOCK_K] to the first columns of `row` of a matrix of `columns` columns."""
    return base + row.to(tl.int64)[:, None] * columns + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def load_columns(pointers, first, columns, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """BLOCK_K columns from `first` on; zero past the last one."""
    if EVEN_K:
        return tl.load(pointers + first)
    else:
        return tl.load(pointers + first, mask=(first + tl.arange(0, BLOCK_K) < columns)[None, :], other=0.0)


def accumulates_scaled(a: Operand, b: Operand) -> bool:
    """Whether scales change along K, so that each step's product is scaled by itself."""
    return PER_BLOCK.value in (a.form, b.form)


def block_k(a: Tensor, b: Tensor) -> int:
    """Columns of one step along K: 128 bytes of a row of the wider operand, as wide as the shared-memory swizzle and as a block of scales of
    fp8."""
    return 128 // max(a.element_size(), b.element_size())
