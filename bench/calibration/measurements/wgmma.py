"""How fast tensor cores multiply when operands lie in shared memory: the ceiling of any GEMM with tiles of N columns."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from bench.calibration import gpu
from bench.calibration.native import call
from bench.calibration.measurement import PLANNED_SMS, Case, Figures, Measurement, WrongResult, timed
from llama4_kernels.bench.record import Figure

M = 64
K = {"e4m3": 128, "bf16": 64}  # of the 128 bytes of a tile
PRODUCTS = 4  # wgmma for each of them
B_TILES = 4
REPEATS = 4096
MOST_ERROR = 2e-2  # e4m3 sums keep few bits, see fp8/accumulation
SHARED, REGISTERS = "shared memory", "registers"


def cases() -> list[Case]:
    """warpgroups: of an SM; four are two blocks of two."""
    chosen = []
    for warpgroups, source, dtype, n in itertools.product((2, 1, 4), (SHARED, REGISTERS), K, (256, 128, 64, 32, 16, 8)):
        if warpgroups < 4 or n <= 128:
            parameters = {"dtype": dtype, "n": n, "a": source, "warpgroups": warpgroups}
            chosen.append(Case(parameters, flops=PLANNED_SMS * warpgroups * REPEATS * 2 * M * n * K[dtype]))
    return chosen


def measure(case: Case) -> Figures:
    dtype, n, warpgroups = (case.parameters[name] for name in ("dtype", "n", "warpgroups"))
    a, b = operands(dtype, n)
    blocks_per_sm = -(-warpgroups // 2)
    blocks, of_block = gpu.sms() * blocks_per_sm, warpgroups // blocks_per_sm
    out = torch.zeros(2, M, n, device=gpu.DEVICE)
    cycles = torch.zeros(blocks, dtype=torch.int64, device=gpu.DEVICE)
    how = (n, dtype == "bf16", case.parameters["a"] == REGISTERS)
    call("wgmma_rate", a, b, *how, B_TILES, of_block, out, cycles, blocks)
    if not (error := relative_error(out[:of_block], expected(a, b)[:of_block])) < MOST_ERROR:
        raise WrongResult(f"relative error {error:.1e}, at most {MOST_ERROR:.0e} is right")
    timing = gpu.time([functools.partial(call, "wgmma_rate", a, b, *how, REPEATS, of_block, out, cycles, blocks)], rounds=5)
    whole = Case(case.parameters, flops=case.flops // PLANNED_SMS * gpu.sms())
    most_cycles = int(cycles.max())
    per_product = Figure(most_cycles / (REPEATS * PRODUCTS * warpgroups), "cycles")
    return {**timed(whole, timing), "cycles_per_wgmma": per_product}


def operands(dtype: str, n: int) -> tuple[Tensor, Tensor]:
    """A of two warpgroups [2, 64, K] and B [4, n, K]: tiles of 128 bytes of K."""
    to = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}[dtype]
    a, b = (torch.randn(*shape, K[dtype], device=gpu.DEVICE) for shape in ((2, M), (B_TILES, n)))
    return a.to(to), b.to(to)


def expected(a: Tensor, b: Tensor) -> Tensor:
    """Of one round over B's tiles: [2, 64, n]."""
    return a.double() @ b.double().sum(0).T


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


MEASUREMENTS = (Measurement("wgmma", "At what rate do warpgroups issue wgmma, by columns, type and place of A?", 40, cases, measure),)
