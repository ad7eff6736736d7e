"""Peers of route_top1: router GEMM, top-1 and sigmoid, and what the peer's own grouped GEMM needs; none quantises x as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_kernels.bench.inputs import Problem
from llama4_kernels.bench.peers import Case, load, peer
from llama4_kernels.bench.peers.moe import llama4_routing
from llama4_kernels.ops import Routing

# Logits and scores rounded to bf16
BOUND = 6e-3
BLOCK_M = 64
Select = Callable[[Tensor], tuple[Tensor, Tensor]]


def _result(expert_ids: Tensor, scores: Tensor, experts: int) -> list[Any]:
    """As route_top1 returns it. The order is made here: peers sort into blocks of their own."""
    ids = expert_ids.flatten().long()
    offsets = F.pad(torch.bincount(ids, minlength=experts).cumsum(0), (1, 0))
    return [Routing(ids.int(), scores.flatten().float(), ids.argsort(stable=True).int(), offsets.int()), None]


def _sglang(problem: Problem, select: Select) -> Case:
    """select: logits -> scores [T, 1] and int32 ids [T, 1]; then SGLang's block alignment."""
    align, x, router = load.sglang().align, problem.arguments["x"], problem.arguments["router"]
    experts = len(router)

    def run() -> tuple[Tensor, Tensor, Any]:
        scores, ids = select(F.linear(x, router))
        return scores, ids, align(ids, BLOCK_M, experts)

    return Case(run, lambda raw: _result(raw[1], raw[0], experts), f"x is not quantised; ends with moe_align_block_size for {BLOCK_M} rows")


@peer("sglang", "route_top1", about="SGLang's Llama 4: router linear, compiled top-1 and sigmoid, alignment", bound=BOUND)
def _sglang_llama4(problem: Problem) -> Case:
    return _sglang(problem, llama4_routing(load.sglang().fast_topk))


@peer("sglang_fused_gate", "route_top1", about="SGLang's Triton fused gate, which its Llama 4 does not use, alignment", bound=BOUND)
def _sglang_fused_gate(problem: Problem) -> Case:
    gate = load.sglang().fused_gate
    bias = torch.zeros(len(problem.arguments["router"]), device=problem.arguments["x"].device)
    return _sglang(problem, lambda logits: gate(logits, bias, 1, scoring_func="sigmoid", renormalize=False))


@peer("sglang_topk_sigmoid", "route_top1", about="SGLang's CUDA topk_sigmoid, which its Llama 4 does not use, alignment", bound=BOUND)
def _sglang_topk_sigmoid(problem: Problem) -> Case:
    kernel, x = load.sglang().topk_sigmoid, problem.arguments["x"]
    scores = torch.empty(len(x), 1, device=x.device)
    ids = torch.empty(len(x), 1, device=x.device, dtype=torch.int32)

    def select(logits: Tensor) -> tuple[Tensor, Tensor]:
        kernel(scores, ids, logits, False)
        return scores, ids

    return _sglang(problem, select)


@peer("fbgemm", "route_top1", about="MetaShuffling: router linear, sigmoid, index_shuffling", bound=BOUND)
def _fbgemm(problem: Problem) -> Case:
    shuffle, x, router = load.fbgemm().ops.index_shuffling, problem.arguments["x"], problem.arguments["router"]

    def run() -> tuple[Tensor, ...]:
        scores = torch.sigmoid(F.linear(x, router))
        return scores, *shuffle(scores)

    def result(raw: tuple[Tensor, ...]) -> list[Any]:
        scores, _, expert_ids, token_ids = raw
        ids = torch.empty_like(token_ids.flatten(), dtype=torch.long)
        ids[token_ids.flatten().long()] = expert_ids.flatten().long()
        return _result(ids, scores.gather(1, ids[:, None]), len(router))

    return Case(run, result, "x is not quantised; tokens sorted by expert, their order within one not fixed")
