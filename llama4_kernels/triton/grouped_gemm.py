"""Grouped GEMM: persistent programs walk the tiles of all groups, whose sizes stay on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama4_kernels.ops.types import Linear, Quantized
from llama4_kernels.triton import config
from llama4_kernels.triton.quantization import quantize_for, why_not_columns, why_not_e4m3
from llama4_kernels.triton.tiles import (
    NONE,
    accumulate,
    accumulates_scaled,
    activation_scale,
    activations,
    block_k,
    find_tile,
    group_bounds,
    groups_width,
    load_columns,
    most_tiles,
    product,
    tile_pointers,
    weight_scale,
    weights,
)


def grouped_gemm(
    a: Tensor | Quantized, b: Linear, offsets: Tensor, *, rows: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    if isinstance(a, Tensor) and b.scale is not None:
        a = quantize_for(a, b)
    x, w = activations(a), weights(b)
    groups, n, k = w.values.shape
    tokens = len(x.values) if rows is None else len(rows)
    out = torch.empty(tokens, n, dtype=out_dtype, device=offsets.device)
    shape = dict(groups=groups, n=n, k=k, form=w.form, shared_kib=config.shared_kib(offsets.device))
    launch = config.choose("grouped_gemm", offsets.device, w.values.dtype, tokens=tokens, **shape)
    step = block_k(x.values, w.values)
    tiles = most_tiles(tokens, groups, launch["BLOCK_T"]) * triton.cdiv(n, launch["BLOCK_N"])
    if tiles and groups:
        _grouped_gemm[(min(tiles, config.programs(offsets.device, launch)),)](
            x.values, x.scale, w.values, w.scale, offsets, rows, out, groups, n, k, triton.cdiv(k, 128),
            GROUPS=groups_width(groups), A_FORM=x.form, B_FORM=w.form, SCALED_STEPS=accumulates_scaled(x, w),
            BLOCK_K=step, EVEN_K=k % step == 0, **config.options(launch),
        )  # fmt: skip
    return out


def why_not_grouped_gemm(a: Tensor | Quantized, b: Linear, offsets: Tensor, **_) -> str:
    if b.scale is None:
        return ""
    return why_not_e4m3(offsets.device) or (why_not_columns(a.shape[1]) if isinstance(a, Tensor) else "")


@triton.jit
def _grouped_gemm(
    a, a_scale, b, b_scale, offsets, rows, out, groups, n, k, k_blocks,
    GROUPS: tl.constexpr, A_FORM: tl.constexpr, B_FORM: tl.constexpr, SCALED_STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    start, end = group_bounds(offsets, groups, GROUPS)
    n_tiles = tl.cdiv(n, BLOCK_N)
    units = tl.sum(tl.cdiv(end - start, BLOCK_T), 0) * n_tiles
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0)):
        group, first, group_end = find_tile(unit // n_tiles, start, end, BLOCK_T)
        position = first + tl.arange(0, BLOCK_T)
        row = position
        if rows is not None:
            row = tl.load(rows + position, mask=position < group_end, other=0)
        row = tl.where(position < group_end, row, 0)
        column = unit % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        channel = tl.where(column < n, column, 0)
        a_tile = tile_pointers(a, row, k, BLOCK_K)
        b_tile = tile_pointers(b, group.to(tl.int64) * n + channel, k, BLOCK_K)
        total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for first_k in tl.range(0, k, BLOCK_K):
            w = load_columns(b_tile, first_k, k, BLOCK_K, EVEN_K)
            x = load_columns(a_tile, first_k, k, BLOCK_K, EVEN_K)
            if SCALED_STEPS:
                block = first_k // 128
                w_scale = weight_scale(b_scale, group, channel, n, block, k_blocks, B_FORM)
                x_scale = activation_scale(a_scale, row, block, k_blocks, A_FORM)
                total += product(w, x) * (w_scale[:, None] * x_scale[None, :])
            else:
                total = accumulate(total, w, x)
        if B_FORM != NONE and not SCALED_STEPS:
            w_scale = weight_scale(b_scale, group, channel, n, 0, k_blocks, B_FORM)
            x_scale = activation_scale(a_scale, row, 0, k_blocks, A_FORM)
            total *= w_scale[:, None] * x_scale[None, :]
        pointers = out + position.to(tl.int64)[None, :] * n + column[:, None]
        tl.store(pointers, total.to(out.dtype.element_ty), mask=(position < group_end)[None, :] & (column < n)[:, None])
