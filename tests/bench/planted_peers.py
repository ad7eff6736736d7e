"""Peers that do what no peer should: each in its own way."""

from __future__ import annotations

import os
import signal
import time

import torch

from llama4_kernels.bench import peers
from llama4_kernels.bench.inputs import Problem
from llama4_kernels.bench.peers import Case, peer

OP = "quantize_per_token"


def case(problem: Problem, change) -> Case:
    return Case(lambda: problem.call(**problem.arguments), lambda raw: [change(problem.canonical(raw)[0])], "planted")


@peer("right", OP, about="gives the right result")
def _right(problem: Problem) -> Case:
    return case(problem, lambda quantized: quantized)


@peer("wrong", OP, about="is off by a tenth")
def _wrong(problem: Problem) -> Case:
    return case(problem, lambda quantized: quantized.codes.float() * quantized.scale[:, None] * 1.1)


@peer("nan", OP, about="gives NaN")
def _nan(problem: Problem) -> Case:
    return case(problem, lambda quantized: quantized.codes.float() * float("nan"))


@peer("misshapen", OP, about="gives half of the rows")
def _misshapen(problem: Problem) -> Case:
    return case(problem, lambda quantized: quantized.codes[::2].float())


@peer("raises", OP, about="raises")
def _raises(problem: Problem) -> Case:
    return Case(lambda: torch.ones(2) @ torch.ones(3), lambda raw: raw)


@peer("dies", OP, about="takes its process with it")
def _dies(problem: Problem) -> Case:
    return Case(lambda: os.kill(os.getpid(), signal.SIGSEGV), lambda raw: raw)


@peer("exits", OP, about="ends its process")
def _exits(problem: Problem) -> Case:
    return Case(lambda: os._exit(3), lambda raw: raw)


@peer("hangs", OP, about="never comes back")
def _hangs(problem: Problem) -> Case:
    return Case(lambda: time.sleep(3600), lambda raw: raw)


@peer("absent", OP, about="cannot be imported")
def _absent(problem: Problem) -> Case:
    import no_such_package  # noqa: F401


@peer("choosy", OP, about="runs one token only")
def _choosy(problem: Problem) -> Case:
    if problem.workload.tokens > 1:
        raise peers.Unavailable("needs one token")
    return _right(problem)
