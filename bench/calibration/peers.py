"""The peers of our kernels at Llama 4's workloads: each checked, then timed by CUDA-graph replay with a cold L2."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.calibration.measurement import Case
from llama4_kernels.bench import measure, peers, record, workloads
from llama4_kernels.bench.machine import Machine
from llama4_kernels.bench.measure import Job, Options
from llama4_kernels.bench.peers import NotInstalled
from llama4_kernels.bench.record import Benchmark
from llama4_kernels.bench.workloads import LAYERS, PAGE, Workload

TOKENS = (64, 1, 8192, 256, 8, 1024, 16, 4096, 4, 32, 128, 512, 2048, 2)
CONTEXTS = (8192, 131072, 1024, 32768)
BATCHES = (64, 1, 256, 8)
MODELS = ("scout", "maverick")
RANKS = (8, 1)
MOST_KV_BYTES = 8 << 30
ROUNDS = 20

# The time box of each peer: those that compile or tune in their first calls have more
SECONDS = {
    "grouped_gemm": {"torch": 20, "sglang": 30, "fbgemm_cutlass": 20, "sgl_kernel_es": 20, "deep_gemm": 40, "fbgemm_triton": 40},
    "fused_moe": {"torch": 25, "sglang": 40, "sglang_one_stream": 25, "sglang_tuned": 65, "fbgemm_cutlass": 20, "fbgemm_triton": 35},
    "route_top1": {"sglang": 22, "sglang_fused_gate": 12, "sglang_topk_sigmoid": 15, "fbgemm": 12},
    "chunked_attention": {
        "flash_attn_3": 23,
        "flash_attn_3_chunk": 12,
        "flash_attn_4": 26,
        "torch_cudnn": 23,
        "torch_flash": 12,
        "torch_flex": 26,
        "flashinfer": 12,
        "sglang_triton": 23,
    },
}


@dataclass(frozen=True)
class PeerStep:
    """One peer of one op, on every workload; runs where measurements run."""

    op: str
    peer: str
    seconds: int
    hopper: bool = False

    @property
    def question(self) -> str:
        return f"peers/{self.op}/{self.peer}"

    @property
    def title(self) -> str:
        return peers.peers_of(self.op)[self.peer].about

    def cases(self) -> list[Case]:
        found = []
        for workload in workloads_of(self.op):
            work = workloads.work(workload)
            found.append(Case({"workload": workload.name}, bytes=work.bytes, flops=work.total_flops))
        return found

    def records(self, run: str) -> Iterator[Benchmark]:
        session = measure.start(Options(rounds=ROUNDS))
        session.run = run
        for workload in workloads_of(self.op):
            job = self._job(workload)
            try:
                yield measure.run(job, session)
            except NotInstalled as error:
                yield session.failure(job, str(error), "unavailable")
                return

    def missing(self, machine: Machine, run: str, status: str, reason: str, known: Collection[Mapping[str, Any]]) -> list[Benchmark]:
        names = {each["workload"] for each in known}
        jobs = [self._job(workload) for workload in workloads_of(self.op) if workload.name not in names]
        return [
            Benchmark(self.op, job.workload, self.peer, machine, run, record.now(), job.repro, peer=True, status=status, reason=reason)
            for job in jobs
        ]

    def _job(self, workload: Workload) -> Job:
        return Job(workload.name, self.peer, peer=True)


PEERS = tuple(PeerStep(op, peer, seconds) for op, of_op in SECONDS.items() for peer, seconds in of_op.items())


@functools.cache
def workloads_of(op: str) -> Sequence[Workload]:
    """In the order of their worth: the time box may cut the last ones off."""
    if op != "chunked_attention":
        return [Workload(op, "fp8", model, ranks, tokens) for ranks, model, tokens in itertools.product(RANKS, MODELS, TOKENS)]
    found = []
    for ranks in RANKS:
        decodes = [(batch, 1, context) for context, batch in itertools.product(CONTEXTS, BATCHES)]
        prefills = [(1, context, context) for context in CONTEXTS]
        for layer, (batch, queries, context) in itertools.product(LAYERS, [*decodes, *prefills]):
            workload = Workload(op, "bf16", "scout", ranks, batch * queries, layer, batch, queries, context, PAGE)
            if batch * context * workload.kv_heads * workload.head_dim * 4 <= MOST_KV_BYTES:
                found.append(workload)
    return found
