"""The MoE layer in three launches: routing; gate and up of both experts with SwiGLU and quantisation; down of both experts in one sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama4_kernels.counters import tickets
from llama4_kernels.ops.types import SCALE_BLOCK, Linear, MoEWeights, Quantized, Routing, new_hidden
from llama4_kernels.triton import config
from llama4_kernels.triton.quantization import (
    e4m3,
    e4m3_scale,
    quantize_per_block,
    quantize_per_token,
    quantize_static,
    why_not_columns,
    why_not_e4m3,
)
from llama4_kernels.triton.routing import route_top1
from llama4_kernels.triton.tickets import is_last
from llama4_kernels.triton.tiles import (
    NONE,
    PER_BLOCK,
    PER_TENSOR,
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
)
from llama4_kernels.triton.tiles import weights as weight_operand

BLOCK_H = SCALE_BLOCK  # one tile of h is one block of scales wide
MOST_TOKENS = 65_535 * 16  # moe_down's tiles of rows, of 16 at least, are the second dimension of its grid: neighbours share rows in L2


def moe_gate_up(x: Tensor | Quantized, routing: Routing, weights: MoEWeights) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    return _gate_up(_inputs(x, routing.scores, weights), routing, weights, x.dtype if isinstance(x, Tensor) else torch.bfloat16)


def moe_down(
    shared: Tensor | Quantized,
    routed: Tensor | Quantized,
    routing: Routing,
    weights: MoEWeights,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    h_s, h_r = activations(shared), activations(routed)
    w_s, w_r = weight_operand(weights.shared_w2), weight_operand(weights.w2)
    device = h_s.values.device
    tokens, k_s = h_s.values.shape
    experts, n, k_r = w_r.values.shape
    out = torch.empty(tokens, n, dtype=out_dtype, device=device)
    shape = dict(experts=experts, n=n, k=k_r, form=w_r.form, shared_kib=config.shared_kib(device))
    launch = config.choose("moe_down", device, w_r.values.dtype, tokens=tokens, **shape)
    row_tiles = triton.cdiv(tokens, launch["BLOCK_T"])
    if row_tiles:
        present = torch.empty(row_tiles, 3, experts, dtype=torch.int32, device=device)
        step_s, step_r = block_k(h_s.values, w_s.values), block_k(h_r.values, w_r.values)
        _down_kernel[(triton.cdiv(n, launch["BLOCK_N"]), row_tiles)](
            h_s.values, h_s.scale, w_s.values, w_s.scale, k_s, h_r.values, h_r.scale, w_r.values, w_r.scale, k_r,
            routing.order, routing.offsets, present, out, tokens, experts, n,
            GROUPS=groups_width(experts), H_S=h_s.form, W_S=w_s.form, K_S=step_s, EVEN_S=k_s % step_s == 0,
            H_R=h_r.form, W_R=w_r.form, K_R=step_r, EVEN_R=k_r % step_r == 0, **config.options(launch),
        )  # fmt: skip
    return out


def fused_moe(x: Tensor, weights: MoEWeights) -> Tensor:
    per_token = any(linear.input_granularity == "row" for linear in (weights.w13, weights.shared_w13))
    routing, quantized = route_top1(x, weights.router, quantize=per_token)
    shared, routed = _gate_up(_inputs(x, routing.scores, weights, quantized), routing, weights, x.dtype)
    return moe_down(shared, routed, routing, weights, out_dtype=x.dtype)


def why_not_moe_gate_up(x: Tensor | Quantized, routing: Routing | None, weights: MoEWeights) -> str:
    quantises = isinstance(x, Tensor) and any(linear.scale is not None for linear in (weights.w13, weights.shared_w13))
    return _why_not_weights(weights) or (why_not_columns(x.shape[1]) if quantises else "")


def why_not_moe_down(shared: Tensor | Quantized, routed: Tensor | Quantized, routing: Routing, weights: MoEWeights, **_) -> str:
    return _why_not_weights(weights) or _why_not_tokens(len(routing.order))


def why_not_fused_moe(x: Tensor, weights: MoEWeights) -> str:
    return why_not_moe_gate_up(x, None, weights) or _why_not_tokens(len(x))


def _why_not_weights(weights: MoEWeights) -> str:
    linears = (weights.w13, weights.w2, weights.shared_w13, weights.shared_w2)
    return why_not_e4m3(weights.router.device) if any(linear.scale is not None for linear in linears) else ""


def _why_not_tokens(tokens: int) -> str:
    return f"there are {tokens} tokens, above {MOST_TOKENS}" if tokens > MOST_TOKENS else ""


class _Inputs(NamedTuple):
    """x in token order as each expert's first weight takes it, and whether the routed one still has to be multiplied with the score."""

    shared: Tensor | Quantized
    routed: Tensor | Quantized
    weigh: bool


def _inputs(x: Tensor | Quantized, scores: Tensor, weights: MoEWeights, per_token: Quantized | None = None) -> _Inputs:
    """Quantise x in the forms that the two weights ask for, each form once. `per_token` is that form of x, where it is there already."""
    forms = {None: x, "row": per_token}
    if isinstance(x, Quantized):
        forms |= {"row": x, "block": x}

    def prepared(linear: Linear, factors: Tensor | None = None) -> Tensor | Quantized:
        form = linear.input_granularity
        if form == "tensor":
            return quantize_static(x, linear.input_scale, factors)
        if forms.get(form) is None:
            forms[form] = quantize_per_block(x) if form == "block" else quantize_per_token(x)
        return forms[form]

    return _Inputs(prepared(weights.shared_w13), prepared(weights.w13, scores), weigh=weights.w13.input_scale is None)


def _gate_up(inputs: _Inputs, routing: Routing, weights: MoEWeights, dtype: torch.dtype) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    x_s, x_r = activations(inputs.shared), activations(inputs.routed)
    w_s, w_r = weight_operand(weights.shared_w13), weight_operand(weights.w13)
    tokens, k = x_s.values.shape
    shared, routed = (new_hidden(tokens, down, dtype) for down in (weights.shared_w2, weights.w2))
    h_s, h_r = activations(shared), activations(routed)
    device = x_s.values.device
    experts, width_s, width_r = len(weights.router), h_s.values.shape[1], h_r.values.shape[1]
    shape = dict(experts=experts, n=width_r, k=k, form=w_r.form, shared_kib=config.shared_kib(device))
    launch = config.choose("moe_gate_up", device, w_r.values.dtype, tokens=tokens, **shape)
    tiles_s, tiles_r = triton.cdiv(width_s, BLOCK_H), triton.cdiv(width_r, BLOCK_H)
    tiles = triton.cdiv(tokens, launch["BLOCK_S"]) * tiles_s + most_tiles(tokens, experts, launch["BLOCK_R"]) * tiles_r
    if tiles == 0:
        return shared, routed
    splits = launch["SPLITS"]
    part = BLOCK_H * max(launch["BLOCK_S"], launch["BLOCK_R"])
    parts = counters = None
    if splits > 1:
        parts = torch.empty(tiles, splits, 2, part, dtype=torch.float32, device=device)
        counters = tickets(device, tiles)
    step_s, step_r = block_k(x_s.values, w_s.values), block_k(x_r.values, w_r.values)
    _gate_up_kernel[(min(tiles * splits, config.programs(device, launch)),)](
        x_s.values, x_s.scale, w_s.values, w_s.scale, h_s.values, h_s.scale, width_s,
        x_r.values, x_r.scale, w_r.values, w_r.scale, h_r.values, h_r.scale, width_r,
        routing.order, routing.offsets, routing.scores if inputs.weigh else None, parts, counters, tokens, experts, k,
        GROUPS=groups_width(experts), BLOCK_H=BLOCK_H, PART=part,
        X_S=x_s.form, W_S=w_s.form, H_S=h_s.form, SCALED_S=accumulates_scaled(x_s, w_s), K_S=step_s,
        X_R=x_r.form, W_R=w_r.form, H_R=h_r.form, SCALED_R=accumulates_scaled(x_r, w_r), K_R=step_r,
        EVEN_K=k % max(step_s, step_r) == 0, **config.options(launch),
    )  # fmt: skip
    return shared, routed


@triton.jit(do_not_specialize=["tokens"])
def _gate_up_kernel(
    x_s, x_s_scale, w_s, w_s_scale, h_s, h_s_scale, width_s,
    x_r, x_r_scale, w_r, w_r_scale, h_r, h_r_scale, width_r,
    order, offsets, scores, parts, counters, tokens, experts, k,
    GROUPS: tl.constexpr, BLOCK_H: tl.constexpr,
    X_S: tl.constexpr, W_S: tl.constexpr, H_S: tl.constexpr, SCALED_S: tl.constexpr, K_S: tl.constexpr,
    X_R: tl.constexpr, W_R: tl.constexpr, H_R: tl.constexpr, SCALED_R: tl.constexpr, K_R: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Persistent. Tiles of the shared expert come first, which need no routing but the order; then those of the experts that have tokens.
    Each is worked on by SPLITS programs, one per share of K."""
    start, end = group_bounds(offsets, experts, GROUPS)
    tiles_s, tiles_r = tl.cdiv(width_s, BLOCK_H), tl.cdiv(width_r, BLOCK_H)
    shared_tiles = tl.cdiv(tokens, BLOCK_S) * tiles_s
    tiles = shared_tiles + tl.sum(tl.cdiv(end - start, BLOCK_R), 0) * tiles_r
    for unit in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0)):
        tile, split = unit // SPLITS, unit % SPLITS
        if tile < shared_tiles:
            _gate_up_tile(
                x_s, x_s_scale, w_s, w_s_scale, h_s, h_s_scale, width_s, order, None, parts, counters, k,
                0, tile // tiles_s * BLOCK_S, tokens, tile % tiles_s, tile, split,
                X_S, W_S, H_S, SCALED_S, K_S, EVEN_K, BLOCK_H, BLOCK_S, SPLITS, PART,
            )  # fmt: skip
        else:
            group, first, group_end = find_tile((tile - shared_tiles) // tiles_r, start, end, BLOCK_R)
            _gate_up_tile(
                x_r, x_r_scale, w_r, w_r_scale, h_r, h_r_scale, width_r, order, scores, parts, counters, k,
                group, first, group_end, (tile - shared_tiles) % tiles_r, tile, split,
                X_R, W_R, H_R, SCALED_R, K_R, EVEN_K, BLOCK_H, BLOCK_R, SPLITS, PART,
            )  # fmt: skip


@triton.jit
def _gate_up_tile(
    x, x_scale, w, w_scale, h, h_scale, width, order, scores, parts, counters, k,
    group, first, last, h_tile, tile, split,
    X_FORM: tl.constexpr, W_FORM: tl.constexpr, H_FORM: tl.constexpr, SCALED_STEPS: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """h[first : first + BLOCK_T, BLOCK_H columns] of one weight [2 width, k], or one split's share of the sum along k."""
    group = tl.cast(group, tl.int64)
    position = first + tl.arange(0, BLOCK_T)
    token = tl.load(order + position, mask=position < last, other=0)
    column = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    gate_row = tl.where(column < width, column, 0)
    up_row = gate_row + width
    x_tile = tile_pointers(x, token, k, BLOCK_K)
    gate_tile = tile_pointers(w, group * (2 * width) + gate_row, k, BLOCK_K)
    up_tile = tile_pointers(w, group * (2 * width) + up_row, k, BLOCK_K)
    k_blocks = tl.cdiv(k, 128)
    share = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS) * BLOCK_K
    gate = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
    up = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
    for first_k in tl.range(split * share, tl.minimum((split + 1) * share, k), BLOCK_K):
        values = load_columns(x_tile, first_k, k, BLOCK_K, EVEN_K)
        w_gate = load_columns(gate_tile, first_k, k, BLOCK_K, EVEN_K)
        w_up = load_columns(up_tile, first_k, k, BLOCK_K, EVEN_K)
        if SCALED_STEPS:
            block = first_k // 128
            a = activation_scale(x_scale, token, block, k_blocks, X_FORM)[None, :]
            gate_scale = weight_scale(w_scale, group, gate_row, 2 * width, block, k_blocks, W_FORM)[:, None]
            up_scale = weight_scale(w_scale, group, up_row, 2 * width, block, k_blocks, W_FORM)[:, None]
            gate += product(w_gate, values) * (gate_scale * a)
            up += product(w_up, values) * (up_scale * a)
        else:
            gate = accumulate(gate, w_gate, values)
            up = accumulate(up, w_up, values)

    complete = True
    if SPLITS > 1:
        cell = tl.arange(0, BLOCK_H)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        part = parts + tl.cast(tile, tl.int64) * (SPLITS * 2 * PART) + cell
        tl.store(part + split * (2 * PART), gate)
        tl.store(part + split * (2 * PART) + PART, up)
        complete = is_last(counters + tile, SPLITS)
        if complete:
            gate = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
            up = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
            for other in tl.range(0, SPLITS):
                gate += tl.load(part + other * (2 * PART), cache_modifier=".cg")
                up += tl.load(part + other * (2 * PART) + PART, cache_modifier=".cg")

    if complete:
        factor = tl.full((BLOCK_T,), 1.0, tl.float32)
        if scores is not None:
            factor = tl.load(scores + token)
        gate *= factor[None, :]
        up *= factor[None, :]
        if W_FORM != NONE and not SCALED_STEPS:
            a = activation_scale(x_scale, token, 0, k_blocks, X_FORM)[None, :]
            gate *= weight_scale(w_scale, group, gate_row, 2 * width, 0, k_blocks, W_FORM)[:, None] * a
            up *= weight_scale(w_scale, group, up_row, 2 * width, 0, k_blocks, W_FORM)[:, None] * a
        hidden = gate * tl.sigmoid(gate) * up
        stored = (column < width)[:, None] & (position < last)[None, :]
        pointers = h + position.to(tl.int64)[None, :] * width + column[:, None]
        if H_FORM == PER_BLOCK:
            block_scale = e4m3_scale(tl.where((column < width)[:, None], hidden, 0.0), 0)
            tl.store(h_scale + position.to(tl.int64) * tl.cdiv(width, BLOCK_H) + h_tile, block_scale, mask=position < last)
            tl.store(pointers, e4m3(hidden, block_scale[None, :]), mask=stored)
        elif H_FORM == PER_TENSOR:
            tl.store(pointers, e4m3(hidden, tl.load(h_scale)), mask=stored)
        else:
            tl.store(pointers, hidden.to(h.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["tokens"])
def _down_kernel(
    h_s, h_s_scale, w_s, w_s_scale, k_s, h_r, h_r_scale, w_r, w_r_scale, k_r,
    order, offsets, present, out, tokens, experts, n,
    GROUPS: tl.constexpr, H_S: tl.constexpr, W_S: tl.constexpr, K_S: tl.constexpr, EVEN_S: tl.constexpr,
    H_R: tl.constexpr, W_R: tl.constexpr, K_R: tl.constexpr, EVEN_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N output channels of BLOCK_T sorted rows, whoever their experts are: it reads the shared weights once, then
    those of every expert that has a row here, with the rows of other experts set to zero, all into one sum. So a weight that is NaN or infinite
    reaches these rows too."""
    first = tl.program_id(1) * BLOCK_T
    position = first + tl.arange(0, BLOCK_T)
    row = tl.where(position < tokens, position, 0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.where(column < n, column, 0)
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)

    # Shared expert
    h_tile = tile_pointers(h_s, row, k_s, K_S)
    w_tile = tile_pointers(w_s, channel, k_s, K_S)
    for first_k in tl.range(0, k_s, K_S):
        w = load_columns(w_tile, first_k, k_s, K_S, EVEN_S)
        h = load_columns(h_tile, first_k, k_s, K_S, EVEN_S)
        total = _scaled_step(total, w, h, w_s_scale, h_s_scale, tl.cast(0, tl.int64), channel, row, n, first_k, k_s, W_S, H_S)

    # Which experts have rows here, and which rows
    start, end = group_bounds(offsets, experts, GROUPS)
    start, end = tl.maximum(start, first), tl.minimum(end, first + BLOCK_T)
    is_present = (start < end).to(tl.int32)
    listed = present + tl.program_id(1) * 3 * experts
    slot = listed + tl.cumsum(is_present, 0) - 1
    tl.store(slot, tl.arange(0, GROUPS), mask=is_present == 1)
    tl.store(slot + experts, start, mask=is_present == 1)
    tl.store(slot + 2 * experts, end, mask=is_present == 1)
    tl.debug_barrier()

    # Routed experts: one loop over all of them and K, so that loads run ahead from one to the next
    h_tile = tile_pointers(h_r, row, k_r, K_R)
    w_tile = tile_pointers(w_r, channel, k_r, K_R)
    steps = tl.cdiv(k_r, K_R)
    inside = tl.arange(0, K_R)
    for step in tl.range(0, tl.sum(is_present, 0) * steps):
        expert = tl.load(listed + step // steps).to(tl.int64)
        mine = (position >= tl.load(listed + experts + step // steps)) & (position < tl.load(listed + 2 * experts + step // steps))
        first_k = step % steps * K_R
        w = load_columns(w_tile + expert * n * k_r, first_k, k_r, K_R, EVEN_R)
        h = tl.load(h_tile + first_k, mask=mine[:, None] & (first_k + inside < k_r)[None, :], other=0.0)
        total = _scaled_step(total, w, h, w_r_scale, h_r_scale, expert, channel, row, n, first_k, k_r, W_R, H_R)

    token = tl.load(order + position, mask=position < tokens, other=0)
    pointers = out + token.to(tl.int64)[None, :] * n + column[:, None]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(position < tokens)[None, :] & (column < n)[:, None])


@triton.jit
def _scaled_step(
    total, w, h, w_scale, h_scale, group, channel, row, n, first_k, k, W_FORM: tl.constexpr, H_FORM: tl.constexpr,
):  # fmt: skip
    """total + w · hᵀ, scaled. An fp8 step is at most one block of scales long, so each product is scaled by itself."""
    if W_FORM == NONE:
        return accumulate(total, w, h)
    else:
        block, blocks = first_k // 128, tl.cdiv(k, 128)
        scale = weight_scale(w_scale, group, channel, n, block, blocks, W_FORM)[:, None]
        return total + product(w, h) * (scale * activation_scale(h_scale, row, block, blocks, H_FORM)[None, :])
