"""What this machine reaches at most: memory copy and matrix multiplication, measured in the run that is set against them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama4_kernels.bench import timing
from llama4_kernels.bench.record import Ceilings, Floor
from llama4_kernels.bench.workloads import Work

# On a GPU: a copy far larger than the L2 cache, and a product that fills every multiprocessor; on a CPU what ends in a second
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def measure(device: torch.device) -> Ceilings:
    """Copy bandwidth, and the rate of a square product in bf16 and fp8; on a CPU in bf16 and fp32, in which the reference computes."""
    size = MATMUL_SIZE[device.type]
    products = {"bf16": _bf16, "fp8": _fp8} if device.type == "cuda" else {"bf16": _bf16, "fp32": _fp32}
    rates = {name: 2 * size**3 / _median_us(make(size, device), device) / 1e6 for name, make in products.items()}
    return Ceilings(copy_gb_s(device), rates)


def copy_gb_s(device: torch.device) -> float:
    """GB/s of a copy from one buffer to another, bytes read plus bytes written.

    The higher of two ways: torch's copy, outside of a CUDA graph, whose copy nodes are slower than the memory; and an elementwise kernel
    that reads the one buffer and writes the other.
    """
    source = torch.ones(COPY_BYTES[device.type] // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    by_copy = _median_us(lambda: target.copy_(source), device, graph=False)
    by_kernel = _median_us(lambda: torch.bitwise_or(source, 0, out=target), device)
    return 2 * source.nbytes / min(by_copy, by_kernel) / 1e3


def floor(work: Work, ceilings: Ceilings, median_us: float) -> Floor:
    """max(bytes / copy bandwidth, flops / matmul rate), each dtype's flops at its own rate; on a CPU, known by fp32's, at the highest."""
    rates = ceilings.matmul_tflop_s
    highest = dict.fromkeys(work.flops, max(rates.values())) if "fp32" in rates else rates
    memory = work.bytes / ceilings.copy_gb_s / 1e3
    compute = sum(flops / highest[dtype] for dtype, flops in work.flops.items()) / 1e6
    us = max(memory, compute)
    return Floor(us, "memory" if memory >= compute else "compute", us / median_us)


def _median_us(call: Callable[[], object], device: torch.device, graph: bool = True) -> float:
    call()
    found, _ = timing.time_calls([call], device, rounds=20, graph=graph)
    return found.median_us


def _square(size: int, device: torch.device) -> torch.Tensor:
    return torch.randn(size, size, device=device)


def _bf16(size: int, device: torch.device) -> Callable[[], object]:
    a, b = (_square(size, device).bfloat16() for _ in range(2))
    return lambda: a @ b.t()


def _fp32(size: int, device: torch.device) -> Callable[[], object]:
    a, b = (_square(size, device) for _ in range(2))
    return lambda: a @ b.t()


def _fp8(size: int, device: torch.device) -> Callable[[], object]:
    a, b = (_square(size, device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
