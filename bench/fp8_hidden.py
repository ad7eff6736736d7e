"""How much accuracy each way of scaling h = silu(gate) * up in fp8 costs the down projection, against float64.

    python bench/fp8_hidden.py      rewrites bench/results/fp8_hidden.json and prints the table of docs/fp8_hidden.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from llama4_kernels.reference.quantization import dequantize, quantize_per_block, quantize_per_token, quantize_static

RESULTS = Path(__file__).parent / "results" / "fp8_hidden.json"
TOKENS, WIDTH, HIDDEN, SEEDS = 256, 1024, 1024, 4

# Share of h's columns that are outliers, and how many times larger these are
DATA = {
    "no outliers": (0.0, 1.0),
    "1 column in 256 is 30 times larger": (1 / 256, 30.0),
    "1 column in 256 is 1000 times larger": (1 / 256, 1000.0),
}


def quantised(h: Tensor) -> dict[str, Tensor]:
    """h through each form. The static scale is the largest value of other data of the same kind, with a tenth to spare."""
    return {
        "bf16": h.bfloat16(),
        "one scale per row and 128 columns": dequantize(quantize_per_block(h)),
        "one scale per row": dequantize(quantize_per_token(h)),
        "one static scale": dequantize(quantize_static(h, 1.1 * h.abs().max() / 448)),
    }


def hidden(outliers: float, factor: float, random: torch.Generator) -> Tensor:
    gate, up = torch.randn(2, TOKENS, WIDTH, generator=random)
    larger = torch.rand(WIDTH, generator=random) < outliers
    return torch.nn.functional.silu(gate) * up * torch.where(larger, factor, 1.0)


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """Data -> form -> relative error of the whole output, and of the worst token's."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for data, (outliers, factor) in DATA.items():
        sums: dict[str, list[Tensor]] = {}
        for seed in range(SEEDS):
            random = torch.Generator().manual_seed(seed)
            h = hidden(outliers, factor, random)
            weight = torch.randn(HIDDEN, WIDTH, generator=random).double()
            exact = h.double() @ weight.T
            for form, value in quantised(h).items():
                error = value.double() @ weight.T - exact
                whole, worst = error.norm() / exact.norm(), (error.norm(dim=1) / exact.norm(dim=1)).max()
                sums.setdefault(form, []).append(torch.stack([whole, worst]))
        results[data] = {
            form: dict(zip(("whole", "worst_token"), torch.stack(errors).mean(0).tolist(), strict=True)) for form, errors in sums.items()
        }
    return results


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ["| h has | scaling | error | worst token's |", "|---|---|---|---|"]
    for data, forms in results.items():
        lines += [f"| {data} | {form} | {errors['whole']:.2e} | {errors['worst_token']:.2e} |" for form, errors in forms.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measured = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))
