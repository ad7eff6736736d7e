"""Peers of chunked_attention in decode: one new token per request, over the pages or the gathered keys that its chunk lets it see."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_kernels.bench.inputs import Problem
from llama4_kernels.bench.peers import Case, Unavailable, load
from llama4_kernels.bench.peers.prefill import compiled_flex, first
from llama4_kernels.reference.attention import chunk_start, read_slots

PAGES = "page table and lengths of the chunk prepared"
GATHERED = "keys and values gathered beforehand: not a paged kernel"


@dataclass(frozen=True)
class Inputs:
    """q [B, Hq, D], caches [pages, page, Hkv, D]; table [B, local pages] int32 of the `keys` that each query sees."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    table: Tensor
    keys: int

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def lengths(self) -> Tensor:
        return torch.full((len(self.q),), self.keys, dtype=torch.int32, device=self.q.device)

    @functools.cached_property
    def slots(self) -> Tensor:
        """[B, keys] int64."""
        page = self.k_cache.shape[1]
        return torch.stack([read_slots(row, 0, self.keys, page, "pages", None) for row in self.table])

    def gathered(self) -> list[Tensor]:
        """k and v as [B, Hkv, keys, D]."""
        return [cache.flatten(0, 1)[self.slots].transpose(1, 2).contiguous() for cache in (self.k_cache, self.v_cache)]


def inputs(problem: Problem) -> Inputs:
    w, given = problem.workload, problem.arguments
    start = chunk_start(w.context - 1, w.chunk_size)
    if start % w.page:
        raise Unavailable(f"needs chunks of whole pages, got a chunk of {w.chunk_size} and pages of {w.page}")
    table = given["page_table"][:, start // w.page :].contiguous()
    return Inputs(given["q"], given["k_cache"], given["v_cache"], table, w.context - start)


def flash_attn_3(problem: Problem) -> Case:
    attend, p = load.flash_attn_3().flash_attn_with_kvcache, inputs(problem)
    q, lengths = p.q[:, None], p.lengths
    options = {"cache_seqlens": lengths, "page_table": p.table, "softmax_scale": p.scale, "causal": True}
    return Case(lambda: attend(q, p.k_cache, p.v_cache, **options), lambda raw: [first(raw)[0][:, 0]], PAGES)


def flash_attn_4(problem: Problem) -> Case:
    attend, p = load.flash_attn_4(), inputs(problem)
    cu = torch.arange(len(p.q) + 1, device=p.q.device, dtype=torch.int32)
    lengths = {"cu_seqlens_q": cu, "seqused_k": p.lengths, "max_seqlen_q": 1, "max_seqlen_k": p.keys}
    options = {**lengths, "page_table": p.table, "softmax_scale": p.scale, "causal": True}
    return Case(lambda: attend(p.q, p.k_cache, p.v_cache, **options), first, f"{PAGES}; no split-KV on sm_90")


def flashinfer(problem: Problem) -> Case:
    p = inputs(problem)
    page, (batch, per_request) = p.k_cache.shape[1], p.table.shape
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=p.q.device)
    wrapper = load.flashinfer().BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=p.q.device) * per_request
    last = torch.full((batch,), p.keys - (per_request - 1) * page, dtype=torch.int32, device=p.q.device)
    heads, kv_heads, head_dim = p.q.shape[1], p.k_cache.shape[2], p.q.shape[2]
    dtypes = {"q_data_type": p.q.dtype, "kv_data_type": p.k_cache.dtype}
    wrapper.plan(starts, p.table.flatten(), last, heads, kv_heads, head_dim, page, sm_scale=p.scale, **dtypes)
    return Case(lambda: wrapper.run(p.q, (p.k_cache, p.v_cache)), first, f"{PAGES}; planned beforehand")


def cudnn(problem: Problem) -> Case:
    load.require_gpu()
    p = inputs(problem)
    k, v = p.gathered()
    q = p.q.unflatten(1, (k.shape[1], -1))  # the query heads of one KV head as rows

    def run() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, scale=p.scale)

    return Case(run, lambda raw: [raw.flatten(1, 2)], GATHERED)


def flex(problem: Problem) -> Case:
    load.require_gpu()
    p = inputs(problem)
    (attend, _), (k, v) = compiled_flex(), p.gathered()
    q = p.q[:, :, None]
    return Case(lambda: attend(q, k, v, scale=p.scale, enable_gqa=True), lambda raw: [raw[:, :, 0]], GATHERED)


def sglang(problem: Problem, max_splits: int = 8) -> Case:
    sg, p = load.sglang(), inputs(problem)
    device, (batch, heads, head_dim), kv_heads = p.q.device, p.q.shape, p.k_cache.shape[2]
    starts, indices = torch.arange(batch + 1, dtype=torch.int32, device=device) * p.keys, p.slots.flatten()
    k, v, out = p.k_cache.flatten(0, 1), p.v_cache.flatten(0, 1), torch.empty_like(p.q)
    partial = torch.empty(batch, heads, max_splits, head_dim, device=device)
    lse = torch.empty(batch, heads, max_splits, device=device)
    splits = torch.empty(batch, device=device, dtype=torch.int32)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    width = max(256, 1 << (batch - 1).bit_length())
    sg.num_kv_splits[(1,)](splits, p.lengths, batch, 1, heads, kv_heads, max_splits, multiprocessors, MAX_NUM_SEQ=width)

    def run() -> Tensor:
        sg.decode_attention(p.q, k, v, out, starts, indices, partial, lse, splits, max_splits, p.scale, 1.0, 1.0)
        return out

    return Case(run, first, f"slots and split counts (SGLang's heuristic, at most {max_splits}) prepared")
