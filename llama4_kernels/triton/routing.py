"""Top-1 routing: logits, argmax, sigmoid and the stable order of tokens by expert, with the fp8 codes of x from the same launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama4_kernels.counters import tickets
from llama4_kernels.ops.types import Quantized, Routing
from llama4_kernels.triton import config
from llama4_kernels.triton.quantization import e4m3, e4m3_scale, why_not_e4m3
from llama4_kernels.triton.tickets import is_last
from llama4_kernels.triton.tiles import accumulate

ONE_LAUNCH_TOKENS = 64
_ORDER_BLOCK = 1024
NO_EXPERT = tl.constexpr(2**31 - 1)  # above every expert's id


def route_top1(x: Tensor, router: Tensor, *, quantize: bool = False) -> tuple[Routing, Quantized | None]:
    tokens, hidden = x.shape
    experts = len(router)
    device = x.device
    expert_ids = torch.empty(tokens, dtype=torch.int32, device=device)
    order = torch.empty(tokens, dtype=torch.int32, device=device)
    scores = torch.empty(tokens, dtype=torch.float32, device=device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    codes = scale = None
    if quantize:
        codes = torch.empty(tokens, hidden, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty(tokens, dtype=torch.float32, device=device)

    one_launch = tokens <= ONE_LAUNCH_TOKENS
    shape = dict(experts=experts, hidden=hidden, shared_kib=config.shared_kib(device))
    launch = config.choose("route_top1", device, torch.promote_types(x.dtype, router.dtype), tokens=tokens, **shape)
    expert_slices = triton.cdiv(experts, launch["BLOCK_E"])
    slices = expert_slices if one_launch else 1  # at once, each in a program of its own, the last of which compares them
    best_logits = torch.empty(tokens, slices, dtype=torch.float32, device=device)
    best_ids = torch.empty(tokens, slices, dtype=torch.int32, device=device)
    _route[(max(triton.cdiv(tokens, launch["BLOCK_T"]), 1), slices)](
        x, router, codes, scale, best_logits, best_ids, tickets(device, 1) if one_launch else None,
        expert_ids, scores, order, offsets, tokens, experts, hidden, slices,
        PASSES=expert_slices // slices, SLICES=triton.next_power_of_2(slices), EXPERTS=triton.next_power_of_2(experts), TOKENS=ONE_LAUNCH_TOKENS,
        **config.options(launch),
    )  # fmt: skip
    if not one_launch:
        _order[(experts,)](expert_ids, order, offsets, tokens, experts, BLOCK=_ORDER_BLOCK)
    return Routing(expert_ids, scores, order, offsets), Quantized(codes, scale) if quantize else None


def why_not_route_top1(x: Tensor, router: Tensor, *, quantize: bool = False) -> str:
    return why_not_e4m3(x.device) if quantize else ""


@triton.jit
def _best(logits, ids, axis: tl.constexpr):
    """The largest logit along `axis` and the lowest id that has it; NaN and an id in range where one is NaN. Negative ids are not there."""
    there = ids >= 0
    ordered = tl.where(there & (logits == logits), logits, float("-inf"))
    best = tl.max(ordered, axis)
    is_nan = tl.max((there & (logits != logits)).to(tl.int32), axis) == 1
    winner = tl.min(tl.where(there & (ordered == tl.expand_dims(best, axis)), ids, NO_EXPERT), axis)
    return tl.where(is_nan, float("nan"), best), winner


@triton.jit
def _best_of_slice(
    x_tile, router, token, expert_slice, tokens, experts, hidden,
    LARGEST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The largest logit of each token for one slice of the experts, and whose it is; with LARGEST also max|x| [BLOCK_T, BLOCK_K]."""
    expert = expert_slice * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_K)
    router_tile = router + expert.to(tl.int64)[:, None] * hidden + column[None, :]
    logits = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    largest = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for first in tl.range(0, hidden, BLOCK_K):
        inside = (first + column < hidden)[None, :]
        values = tl.load(x_tile + first, mask=inside & (token < tokens)[:, None], other=0.0)
        w = tl.load(router_tile + first, mask=inside & (expert < experts)[:, None], other=0.0)
        logits = accumulate(logits, w, values)
        if LARGEST:
            largest = tl.maximum(largest, tl.abs(values.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    best, winner = _best(logits, tl.where(expert < experts, expert, -1)[:, None], 0)
    return best, winner, largest


@triton.jit(do_not_specialize=["tokens"])
def _route(
    x, router, codes, scale, best_logits, best_ids, counter, expert_ids, scores, order, offsets, tokens, experts, hidden, slices,
    PASSES: tl.constexpr, SLICES: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The best of BLOCK_T tokens' logits for PASSES slices of the experts
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_K)
    x_tile = x + token.to(tl.int64)[:, None] * hidden + column[None, :]
    best, winner, largest = _best_of_slice(
        x_tile, router, token, tl.program_id(1), tokens, experts, hidden, codes is not None, BLOCK_T, BLOCK_E, BLOCK_K
    )
    for expert_slice in tl.range(1, PASSES):
        other, other_winner, _ = _best_of_slice(
            x_tile, router, token, expert_slice, tokens, experts, hidden, False, BLOCK_T, BLOCK_E, BLOCK_K
        )
        better = (other > best) | (other != other)
        best, winner = tl.where(better, other, best), tl.where(better, other_winner, winner)

    # FP8 codes of the same tokens, which the cache still holds
    if codes is not None:
        if tl.program_id(1) == 0:
            row_scale = e4m3_scale(largest, 1)
            tl.store(scale + token, row_scale, mask=token < tokens)
            codes_tile = codes + token.to(tl.int64)[:, None] * hidden + column[None, :]
            for first in tl.range(0, hidden, BLOCK_K):
                inside = (first + column < hidden)[None, :] & (token < tokens)[:, None]
                values = tl.load(x_tile + first, mask=inside, other=0.0).to(tl.float32)
                tl.store(codes_tile + first, e4m3(values, row_scale[:, None]), mask=inside)

    if counter is None:
        tl.store(expert_ids + token, winner, mask=token < tokens)
        tl.store(scores + token, tl.sigmoid(best), mask=token < tokens)
    else:
        # The last program takes the best of the slices and sorts all tokens
        slot = token * slices + tl.program_id(1)
        tl.store(best_logits + slot, best, mask=token < tokens)
        tl.store(best_ids + slot, winner, mask=token < tokens)
        if is_last(counter, tl.num_programs(0) * tl.num_programs(1)):
            every = tl.arange(0, TOKENS)
            slots = every[:, None] * slices + tl.arange(0, SLICES)[None, :]
            there = (every < tokens)[:, None] & (tl.arange(0, SLICES) < slices)[None, :]
            logit = tl.load(best_logits + slots, mask=there, other=0.0, cache_modifier=".cg")
            ids = tl.load(best_ids + slots, mask=there, other=-1, cache_modifier=".cg")
            top, top_id = _best(logit, ids, 1)
            tl.store(expert_ids + every, top_id, mask=every < tokens)
            tl.store(scores + every, tl.sigmoid(top), mask=every < tokens)
            sorted_by = tl.where(every < tokens, top_id, NO_EXPERT)
            group = tl.arange(0, EXPERTS)
            tl.store(offsets + group, tl.sum((sorted_by[None, :] < group[:, None]).to(tl.int32), 1), mask=group < experts)
            tl.store(offsets + experts, tokens)
            earlier = (sorted_by[None, :] == sorted_by[:, None]) & (every[None, :] < every[:, None])
            ahead = (sorted_by[None, :] < sorted_by[:, None]) | earlier
            tl.store(order + tl.sum(ahead.to(tl.int32), 1), every, mask=every < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _order(expert_ids, order, offsets, tokens, experts, BLOCK: tl.constexpr):
    """One program per expert: it counts the tokens of lower experts, then places its own, in order, after them."""
    expert = tl.program_id(0)
    lower = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        lower += (tl.load(expert_ids + token, mask=token < tokens, other=NO_EXPERT) < expert).to(tl.int32)
    position = tl.sum(lower, 0)
    tl.store(offsets + expert, position)
    if expert == experts - 1:
        tl.store(offsets + experts, tokens)
    for first in tl.range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        mine = (tl.load(expert_ids + token, mask=token < tokens, other=NO_EXPERT) == expert).to(tl.int32)
        tl.store(order + position + tl.cumsum(mine, 0) - 1, token, mask=mine == 1)
        position += tl.sum(mine, 0)
