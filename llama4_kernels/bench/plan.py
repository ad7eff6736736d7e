"""Which jobs a run consists of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama4_kernels.bench import measure, peers, workloads
from llama4_kernels.bench.measure import Job
from llama4_kernels.ops.backend import BACKENDS, default_device


def plan(
    ops: Sequence[str] | None = None,
    patterns: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    peer_names: Sequence[str] | None = None,
) -> list[Job]:
    """The jobs for what was asked for, those of one workload together. ValueError where a name is unknown or nothing is left.

    ops, patterns: see workloads.select. Neither backends nor peers named: every backend that runs here, and all peers. Where only one
    of the two is named, the other is left out; the peer "none" stands for none of them, beside every backend.
    """
    device = default_device()
    unknown = [name for name in backends or () if name not in BACKENDS]
    if unknown:
        raise ValueError(f"backend is {unknown[0]!r}, needs one of {', '.join(BACKENDS)}")
    chosen = workloads.select(patterns, ops, device.type)
    known = {workload.op: peers.peers_of(workload.op) for workload in chosen}
    names = {name for of_op in known.values() for name in of_op}
    unknown = [name for name in peer_names or () if name not in names | {"all", "none"}]
    if unknown:
        raise ValueError(f"peer is {unknown[0]!r}, needs all, none, or one of {', '.join(sorted(names)) or 'no name for these ops'}")
    jobs: list[Job] = []
    for workload in chosen:
        if backends or not peer_names or "none" in peer_names:
            jobs += [Job(workload.name, name) for name in backends or _runnable(workload.op, device)]
        wanted = [] if backends and not peer_names else peer_names or ["all"]
        jobs += [Job(workload.name, name, peer=True) for name in known[workload.op] if "none" not in wanted and {"all", name} & set(wanted)]
    if not jobs:
        raise ValueError("nothing to measure: no workload, backend or peer is left of what was asked for")
    return jobs


def _runnable(op: str, device: torch.device) -> list[str]:
    """The reference only where nothing else runs: kernels are not set beside it."""
    found = [name for name in BACKENDS if not measure.missing(op, name, device)]
    return [name for name in found if name != "reference"] or found
