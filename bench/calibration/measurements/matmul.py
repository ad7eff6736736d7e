"""How fast torch's matrix products are, which are cuBLAS's where it has them: squares, and Llama 4's own shapes."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.calibration import gpu
from bench.calibration.measurement import Case, Figures, Measurement, WrongResult, timed

SQUARES = (8192, 4096, 2048, 1024)
TOKENS = (8192, 1024, 256, 64, 16)
HIDDEN, INTERMEDIATE = 5120, 8192
ITEM_BYTES = {"bf16": 2, "fp8": 1, "fp8_rows": 1}
MOST_ERROR = {"bf16": 4e-3, "fp8": 2e-2, "fp8_rows": 2e-2}  # of bf16 outputs; fp8 sums keep few bits, see fp8/accumulation
MOST_SETS = 32


@dataclass(frozen=True)
class Product:
    """C = A · Bᵀ: a [m, k] and b [n, k] in bf16 or e4m3, c [m, n] in bf16. Scales of 1: per tensor, or per row where `rows`."""

    a: Tensor
    b: Tensor
    rows: bool

    @classmethod
    def random(cls, dtype: str, m: int, n: int, k: int) -> Product:
        a, b = torch.randn(m, k, device=gpu.DEVICE), torch.randn(n, k, device=gpu.DEVICE)
        to = torch.bfloat16 if dtype == "bf16" else torch.float8_e4m3fn
        return cls(a.to(to), b.to(to), dtype == "fp8_rows")

    def run(self) -> Tensor:
        if self.a.dtype == torch.bfloat16:
            return self.a @ self.b.T
        a_scale, b_scale = _ones(self.a.shape[0], 1, self.rows), _ones(1, self.b.shape[0], self.rows)
        return torch._scaled_mm(self.a, self.b.T, a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    def error(self) -> float:
        expected = self.a.float() @ self.b.float().T
        return float((self.run().float() - expected).norm() / expected.norm())


@functools.cache
def _ones(rows: int, columns: int, per_row: bool) -> Tensor:
    return torch.ones((rows, columns) if per_row else (), device=gpu.DEVICE)


def cases(dtype: str) -> list[Case]:
    shapes = [("square", size, size, size) for size in SQUARES]
    for ranks, tokens in itertools.product((8, 1), TOKENS):
        shapes.append((f"gate_up tp{ranks}", tokens, 2 * INTERMEDIATE // ranks, HIDDEN))
        shapes.append((f"down tp{ranks}", tokens, HIDDEN, INTERMEDIATE // ranks))
    item = ITEM_BYTES[dtype]
    return [
        Case({"layer": layer, "m": m, "n": n, "k": k}, bytes=item * k * (m + n) + 2 * m * n, flops=2 * m * n * k)
        for layer, m, n, k in shapes
    ]


def measure(dtype: str, case: Case) -> Figures:
    m, n, k = (case.parameters[name] for name in "mnk")
    sets = min(MOST_SETS, max(2, -(-gpu.L2_FOLDS * gpu.l2_bytes() // case.bytes)))
    products = [Product.random(dtype, m, n, k) for _ in range(sets)]
    if not (error := products[0].error()) < MOST_ERROR[dtype]:
        raise WrongResult(f"relative error {error:.1e}, at most {MOST_ERROR[dtype]:.0e} is right")
    return timed(case, gpu.time([product.run for product in products]))


def _matmul(dtype: str, title: str) -> Measurement:
    return Measurement(f"matmul/{dtype}", title, 20, functools.partial(cases, dtype), functools.partial(measure, dtype), hopper=False)


MEASUREMENTS = (
    _matmul("bf16", "How fast does torch multiply bf16 matrices?"),
    _matmul("fp8", "How fast does torch multiply e4m3 matrices with a scale per tensor?"),
    _matmul("fp8_rows", "How fast does torch multiply e4m3 matrices with a scale per row?"),
)
