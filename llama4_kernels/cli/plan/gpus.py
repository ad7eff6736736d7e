"""GPUs by name, and what of their memory a server can use."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llama4_kernels.cli.plan.errors import PlanError

MIB, GIB = 1 << 20, 1 << 30

# Total memory in MiB as nvidia-smi reports it, which is what SGLang's defaults go by.
TOTAL_MIB = {"a100": 81920, "h100": 81559, "h100-nvl": 95830, "h20": 97871, "h200": 143771, "b200": 183359}

# Of the total, what driver, CUDA context and NCCL take before a model loads. An allowance, for 8 ranks with NVLink; SGLang prints what is
# left in the line "Load weight begin. avail mem=".
BEFORE_LOAD_BYTES = 3 * GIB


@dataclass(frozen=True)
class Gpu:
    """total_mib: of the whole device. free: bytes that are free before the model is loaded."""

    name: str
    total_mib: float
    free: int


def load(name: str) -> Gpu:
    """The GPU of that name, or of that size, such as 96GiB; PlanError names the known ones."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gib", name.lower())
    total_mib = float(size[1]) * 1024 if size else TOTAL_MIB.get(name.lower())
    if total_mib is None:
        raise PlanError(f"--gpu {name} is not known: give one of {', '.join(TOTAL_MIB)}, or a size such as 96GiB")
    free = int(total_mib * MIB) - BEFORE_LOAD_BYTES
    if free <= 0:
        raise PlanError(f"--gpu {name}: {BEFORE_LOAD_BYTES // GIB} GiB are taken before a model loads; give more memory")
    return Gpu(name.lower(), total_mib, free)
