"""What every CUDA op launches at named shapes: grids, blocks, clusters and shared memory, noted by the host build without running a kernel.

`PYTHONPATH=tests python tests/hopper/launches.py` rewrites baseline_launches.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import emulation
import torch

from llama4_kernels.bench import inputs
from llama4_kernels.bench.workloads import Workload, parse

BASELINE = Path(__file__).with_name("baseline_launches.json")
MULTIPROCESSORS = 132  # of an H200
MODULES = {"chunked_attention": "attention", "rope_qk_norm": "rope", "route_top1": "routing", "quantize_per_token": "quantization"}
MODULES |= {"grouped_gemm": "grouped_gemm"} | dict.fromkeys(("moe_gate_up", "moe_down", "fused_moe"), "moe")
TOKENS = (1, 64, 8192)
MOE = ("route_top1", "grouped_gemm", "moe_gate_up", "moe_down", "fused_moe")
SHAPES = [f"{op}/fp8/{model}/tp8/t{tokens}" for op in MOE for model in ("scout", "maverick") for tokens in TOKENS]
SHAPES += [f"{op}/bf16/scout/tp8/t{tokens}" for op in ("grouped_gemm", "fused_moe") for tokens in TOKENS]
SHAPES += [f"quantize_per_token/fp8/scout/tp8/t{tokens}" for tokens in TOKENS]
SHAPES += [f"rope_qk_norm/bf16/scout/tp8/{layer}/t{tokens}" for layer in ("local", "full") for tokens in TOKENS]
SHAPES += [
    f"chunked_attention/{dtype}/scout/tp8/{layer}/{requests}/p64"
    for dtype in ("bf16", "fp8")
    for layer in ("local", "full")
    for requests in ("b1/q1/c8192", "b64/q1/c8192", "b1/q8192/c8192")
]


def measure(kernels: ModuleType, shapes: Iterable[str] = SHAPES) -> dict[str, list[dict[str, Any]]]:
    """Of each shape the launches, in order."""
    modules = {name: emulation.op_module(name, kernels) for name in sorted(set(MODULES.values()))}
    return {name: _launches(kernels, modules, parse(name)) for name in shapes}


def _launches(kernels: ModuleType, modules: dict[str, ModuleType], workload: Workload) -> list[dict[str, Any]]:
    meta = inputs.make(workload, torch.device("meta")).arguments
    arguments = inputs.mapped(lambda tensor: torch.empty_like(tensor, device="cpu"), meta)
    if workload.op == "chunked_attention":
        arguments["scale"] = workload.head_dim**-0.5
    if workload.op == "moe_down":
        arguments["out_dtype"] = torch.bfloat16
    op = getattr(modules[MODULES[workload.op]], workload.op)
    return kernels.launches_of(lambda: op(**arguments), MULTIPROCESSORS)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measured = measure(emulation.load(emulation.build()))
    lines = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, launches)) + "\n ]" for name, launches in measured.items()]
    BASELINE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"the launches at {len(measured)} shapes written to {BASELINE}")
