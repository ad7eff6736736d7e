"""The peers of our kernels, each behind one signature: `build(name, problem)` gives what to time and how to compare its result.

A module per kind of op registers its peers. Other projects' packages are imported when a peer is asked for, and not before; one that
is missing, or that cannot run a workload, says so with the reason. Each peer is called as its own project benchmarks it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama4_kernels.bench.inputs import BOUND, Problem

_MODULES = ("grouped_gemm", "moe", "routing", "attention")


class Unavailable(RuntimeError):
    """This peer cannot run this workload; the message says why."""


class NotInstalled(Unavailable):
    """This peer cannot be loaded here, whatever the workload."""


@dataclass(frozen=True)
class Case:
    """One implementation, prepared for one problem.

    run: what is timed. result: what run gives, in the form of Problem.canonical; never timed. note: what was prepared outside the timed
    region, and what else sets the figure apart. single: whether another one would compile anew, so that only one is timed.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Any]
    note: str = ""
    single: bool = False


@dataclass(frozen=True)
class Peer:
    """name: stable, for records. about: one line. build: Problem -> Case, or Unavailable. bound: see Problem.error."""

    name: str
    about: str
    build: Callable[[Problem], Case]
    bound: float = BOUND


_PEERS: dict[tuple[str, str], Peer] = {}


def peer(name: str, op: str, *, about: str, bound: float = BOUND) -> Callable[[Callable[[Problem], Case]], Callable[[Problem], Case]]:
    """Register the decorated function as the way to build the peer `name` of `op`."""

    def register(build: Callable[[Problem], Case]) -> Callable[[Problem], Case]:
        _PEERS[op, name] = Peer(name, about, build, bound)
        return build

    return register


def peers_of(op: str) -> dict[str, Peer]:
    """The peers of an op by name, whether they can be loaded here or not."""
    for module in _MODULES:
        importlib.import_module(f"llama4_kernels.bench.peers.{module}")
    return {name: found for (of, name), found in _PEERS.items() if of == op}


def build(name: str, problem: Problem) -> Case:
    """A peer prepared for a problem. NotInstalled or Unavailable where it cannot be; ValueError for a name that the op has no peer of."""
    known = peers_of(problem.workload.op)
    if name not in known:
        raise ValueError(f"peer is {name!r}, needs one of {', '.join(known) or 'none'} for {problem.workload.op}")
    try:
        return known[name].build(problem)
    except (ImportError, AttributeError, OSError) as error:
        raise NotInstalled(f"{type(error).__name__}: {error}") from error
