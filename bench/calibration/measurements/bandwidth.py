"""How fast memory is read, written and copied, in L2 and out of it."""

from __future__ import annotations

import functools
import itertools
import operator

import torch
from torch import Tensor

from bench.calibration import gpu
from bench.calibration.native import call
from bench.calibration.measurement import Case, Figures, Measurement, WrongResult, timed

MIB = 1 << 20
BLOCKS_PER_SM = 8
WARPS_PER_BLOCK = 8
SIZES = (4096, 1024, 256, 64, 32, 16, 8, 4, 1)  # MiB
WARM_SIZES = tuple(size for size in SIZES if size <= 32)
L2_SIZES = (1, 4, 8, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
L2_BYTES_READ = 4 << 30
WARM_LAUNCHES = 64  # of a graph: the first of them is cold


def bandwidth_cases(access: str) -> list[Case]:
    moved = {"copy": 2, "torch_copy": 2, "read": 1, "write": 1}[access]
    sizes = [*((size, "cold") for size in SIZES), *((size, "warm") for size in WARM_SIZES)]
    return [Case({"mib": size, "l2": l2}, bytes=moved * size * MIB) for size, l2 in sizes]


def measure_bandwidth(access: str, case: Case) -> Figures:
    size = case.parameters["mib"] * MIB
    sources, targets = (
        [gpu.random_bytes(size, seed)] if case.parameters["l2"] == "warm" else gpu.cold_buffers(size, seed) for seed in (0, 1)
    )
    launches = [functools.partial(LAUNCHES[access], source, target) for source, target in zip(sources, targets, strict=True)]
    timing = gpu.time(launches * (WARM_LAUNCHES if case.parameters["l2"] == "warm" else 1))
    if access.endswith("copy") and not torch.equal(targets[0], sources[0]):
        raise WrongResult("the copy differs from its source")
    return timed(case, timing)


def read(source: Tensor, target: Tensor) -> None:
    call("bandwidth_read", source, source.numel(), 1, 0, checksums(), blocks())


def write(source: Tensor, target: Tensor) -> None:
    call("bandwidth_write", target, target.numel(), 1, blocks())


def copy(source: Tensor, target: Tensor) -> None:
    call("bandwidth_copy", source, target, source.numel(), blocks())


def torch_copy(source: Tensor, target: Tensor) -> None:
    torch.bitwise_or(source.view(torch.int64), 0, out=target.view(torch.int64))  # copy_ would be a copy node of the graph


LAUNCHES = {"copy": copy, "torch_copy": torch_copy, "read": read, "write": write}


def l2_cases() -> list[Case]:
    """Passes over a buffer, an odd number so that the exclusive or of all that was read is the buffer's own."""
    return [
        Case({"mib": size, "passes": passes, "reader": reader}, bytes=passes * size * MIB)
        for size, reader in itertools.product(L2_SIZES, ("same SM", "another SM"))
        for passes in [L2_BYTES_READ // (size * MIB) | 1]
    ]


def measure_l2(case: Case) -> Figures:
    buffer = gpu.random_bytes(case.parameters["mib"] * MIB)
    shift = 0 if case.parameters["reader"] == "same SM" else BLOCKS_PER_SM + 1
    launch = functools.partial(call, "bandwidth_read", buffer, buffer.numel(), case.parameters["passes"], shift, checksums(), blocks())
    timing = gpu.time([launch], rounds=5)
    if exclusive_or(checksums()) != exclusive_or(buffer.view(torch.int32)):
        raise WrongResult("the exclusive or of what was read is not that of the buffer")
    return timed(case, timing)


def exclusive_or(words: Tensor) -> int:
    """Of all elements of an int32 tensor."""
    words = words.flatten()
    while words.numel() > 4096:
        half = words.numel() // 2
        rest = words[2 * half :]
        words = torch.cat([words[:half] ^ words[half : 2 * half], rest])
    return functools.reduce(operator.xor, words.tolist(), 0)


def blocks() -> int:
    return gpu.sms() * BLOCKS_PER_SM


@functools.cache
def checksums() -> Tensor:
    return torch.zeros(blocks() * WARPS_PER_BLOCK, dtype=torch.int32, device=gpu.DEVICE)


def _bandwidth(access: str, title: str) -> Measurement:
    cases, measure = functools.partial(bandwidth_cases, access), functools.partial(measure_bandwidth, access)
    return Measurement(f"bandwidth/{access}", title, 20, cases, measure)


MEASUREMENTS = (
    _bandwidth("copy", "How fast does a kernel copy memory?"),
    _bandwidth("torch_copy", "How fast does an elementwise kernel of torch's copy memory?"),
    _bandwidth("read", "How fast does a kernel read memory?"),
    _bandwidth("write", "How fast does a kernel write memory?"),
    Measurement(
        "bandwidth/l2", "How fast is a buffer read again and again, and up to which size does L2 hold it?", 20, l2_cases, measure_l2
    ),
)
