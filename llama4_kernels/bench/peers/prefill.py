"""Peers of chunked_attention in prefill: whole prompts without a prefix, keys and values gathered from their pages beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_kernels.bench.inputs import Problem
from llama4_kernels.bench.peers import Case, load
from llama4_kernels.reference.attention import read_slots

CUT = "chunks cut into requests, keys and values gathered beforehand"


@dataclass(frozen=True)
class Inputs:
    """q [T, Hq, D], k, v [T, Hkv, D]; pieces: lengths of the requests that chunks make of the prompts, none of which sees another."""

    q: Tensor
    k: Tensor
    v: Tensor
    pieces: tuple[int, ...]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def longest(self) -> int:
        return max(self.pieces)

    @functools.cached_property
    def starts(self) -> Tensor:
        """[pieces + 1] int32."""
        return starts_of(self.pieces, self.q.device)


def starts_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int()


def inputs(problem: Problem) -> Inputs:
    w, given = problem.workload, problem.arguments
    slots = torch.cat([read_slots(row, 0, w.context, w.page, "pages", None) for row in given["page_table"]])
    k, v = (given[name].flatten(0, 1)[slots] for name in ("k_cache", "v_cache"))
    chunk = w.chunk_size or w.context
    of_one = [min(chunk, w.context - start) for start in range(0, w.context, chunk)]
    return Inputs(given["q"], k, v, tuple(of_one * w.batch))


def first(raw: Any) -> list[Tensor]:
    return [raw[0] if isinstance(raw, tuple) else raw]


def flash_attn_3(problem: Problem) -> Case:
    attend, p = load.flash_attn_3().flash_attn_varlen_func, inputs(problem)
    cu, longest = p.starts, p.longest
    return Case(lambda: attend(p.q, p.k, p.v, cu, cu, longest, longest, softmax_scale=p.scale, causal=True), first, CUT)


def flash_attn_3_chunk(problem: Problem) -> Case:
    w, p = problem.workload, inputs(problem)
    attend, cu = load.flash_attn_3().flash_attn_varlen_func, starts_of((w.context,) * w.batch, p.q.device)
    options = {"softmax_scale": p.scale, "causal": True, "attention_chunk": w.chunk_size or 0}
    return Case(lambda: attend(p.q, p.k, p.v, cu, cu, w.context, w.context, **options), first, "keys and values gathered beforehand")


def flash_attn_4(problem: Problem) -> Case:
    attend, p = load.flash_attn_4(), inputs(problem)
    lengths = {"cu_seqlens_q": p.starts, "cu_seqlens_k": p.starts, "max_seqlen_q": p.longest, "max_seqlen_k": p.longest}
    return Case(lambda: attend(p.q, p.k, p.v, **lengths, softmax_scale=p.scale, causal=True), first, CUT)


def flashinfer(problem: Problem) -> Case:
    p = inputs(problem)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=p.q.device)
    wrapper = load.flashinfer().BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    heads, kv_heads, head_dim = p.q.shape[1], p.k.shape[1], p.q.shape[2]
    wrapper.plan(p.starts, p.starts, heads, kv_heads, head_dim, causal=True, sm_scale=p.scale, q_data_type=p.q.dtype)
    return Case(lambda: wrapper.run(p.q, p.k, p.v), first, f"{CUT}; planned beforehand")


def sdpa(problem: Problem, backend: Any) -> Case:
    """torch's scaled_dot_product_attention, the pieces of one length as one batch."""
    load.require_gpu()
    p = inputs(problem)
    starts = p.starts[:-1].long()
    rows_of = []
    for length in dict.fromkeys(p.pieces):
        members = torch.tensor([i for i, piece in enumerate(p.pieces) if piece == length], device=p.q.device)
        rows_of.append(starts[members][:, None] + torch.arange(length, device=p.q.device))
    batches = [[t[rows].transpose(1, 2) for t in (p.q, p.k, p.v)] for rows in rows_of]

    def run() -> list[Tensor]:
        with torch.nn.attention.sdpa_kernel(backend):
            return [F.scaled_dot_product_attention(*qkv, is_causal=True, scale=p.scale, enable_gqa=True) for qkv in batches]

    def result(raw: list[Tensor]) -> list[Tensor]:
        out = torch.empty_like(p.q)
        for rows, piece in zip(rows_of, raw, strict=True):
            out[rows] = piece.transpose(1, 2)
        return [out]

    return Case(run, result, f"{CUT}, {len(batches)} call(s)")


@functools.cache
def compiled_flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return load.compiled(flex_attention), load.compiled(create_block_mask)


def flex(problem: Problem) -> Case:
    load.require_gpu()
    p = inputs(problem)
    attend, make_mask = compiled_flex()
    lengths = torch.tensor(p.pieces, device=p.q.device)
    piece = torch.repeat_interleave(torch.arange(len(lengths), device=p.q.device), lengths)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (piece[query] == piece[key])

    mask = make_mask(visible, None, None, len(piece), len(piece), device=p.q.device)
    q, k, v = (t.transpose(0, 1)[None].contiguous() for t in (p.q, p.k, p.v))
    run = functools.partial(attend, q, k, v, block_mask=mask, scale=p.scale, enable_gqa=True)
    return Case(run, lambda raw: [raw[0].transpose(0, 1)], f"{CUT}, block mask and heads-first layout too", single=True)


def sglang(problem: Problem) -> Case:
    extend, p = load.sglang().extend_attention, inputs(problem)
    device, out = p.q.device, torch.empty_like(p.q)
    starts = p.starts.long()
    no_prefix = torch.zeros(len(p.pieces) + 1, device=device, dtype=torch.int32)
    no_slots, cache = torch.zeros(0, device=device, dtype=torch.long), p.k.new_zeros(1, *p.k.shape[1:])
    before = (out, cache, cache, starts, no_prefix, no_slots, None, True, None, p.longest, 1.0, 1.0)

    def run() -> Tensor:
        extend(p.q, p.k, p.v, *before, sm_scale=p.scale)
        return out

    return Case(run, first, CUT)
