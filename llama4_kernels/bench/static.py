"""What can be said of a workload's kernels without running them: registers, shared memory, occupancy and instructions, for sm_90."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama4_kernels.bench import inputs
from llama4_kernels.bench.measure import PARTS
from llama4_kernels.bench.workloads import Workload
from llama4_kernels.ops.backend import OPS

# One multiprocessor of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications)
REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65536, 228 * 1024, 64, 32
REGISTERS_AT_A_TIME, SHARED_RESERVED = 256, 1024  # of a warp; of a block


@dataclass(frozen=True)
class Kernel:
    """One kernel's figures. warps: of a block, None where only a launch knows. instructions: count by kind, "instructions" is all."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int | None
    instructions: dict[str, int]

    @property
    def occupancy(self) -> float | None:
        """Resident warps of a multiprocessor, over the most that it can hold."""
        return None if self.warps is None else occupancy(self.registers, self.shared_bytes, self.warps)


def occupancy(registers: int, shared_bytes: int, warps: int) -> float:
    """By registers of a thread, shared memory of a block, and warps of a block: resident warps over 64, on compute capability 9.0."""
    by_warp = -(-registers * 32 // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    by_registers = REGISTERS // by_warp // warps if registers else BLOCKS
    by_shared = SHARED_BYTES // (shared_bytes + SHARED_RESERVED)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS


def triton_kernels(workload: Workload) -> list[Kernel]:
    """The kernels that the Triton backend launches for a workload, compiled here with the bundled tools. A layer's are its ops'."""
    from llama4_kernels.triton import offline

    measured = offline.measure(offline.recorded(_calls(workload), "sm_90"), "sm_90")
    fields = ("registers", "spill_bytes", "shared_bytes")
    return [
        Kernel(
            name,
            *(found[each] for each in fields),
            warps=int(re.search(r"warps=(\d+)", name)[1]),
            instructions={kind: number for kind, number in found.items() if kind not in fields},
        )
        for name, found in measured.items()
    ]


def _calls(workload: Workload) -> list[Callable[[], Any]]:
    """The Triton backend's functions with the workload's arguments, which have no values."""
    problem = inputs.make(workload, torch.device("meta"))
    if workload.op not in PARTS:
        return [_triton_call(workload.op, **problem.arguments)]
    given = problem.arguments
    caches = {name: given["attention"][name] for name in ("k_cache", "v_cache")}
    qkv = given["x"].new_empty(workload.tokens, workload.qkv_width)
    q = qkv.new_empty(workload.tokens, workload.heads, workload.head_dim)
    calls = [_triton_call("rope_qk_norm", qkv=qkv, **given["rope"], **caches), _triton_call("chunked_attention", q=q, **given["attention"])]
    return calls if workload.op == "attention_part" else [*calls, _triton_call("fused_moe", x=given["x"], weights=given["moe"])]


def _triton_call(op: str, **arguments: Any) -> Callable[[], Any]:
    if op == "chunked_attention":
        arguments["scale"] = arguments["q"].shape[-1] ** -0.5
    if op == "moe_down":
        arguments["out_dtype"] = torch.bfloat16
    module = importlib.import_module(f"llama4_kernels.triton.{OPS[op]}")
    return functools.partial(getattr(module, op), **arguments)


def cuda_kernels(workload: Workload) -> list[Kernel]:
    """The kernels in the built extension that stem from the sources of a workload's ops; none where it is not built."""
    spec = importlib.util.find_spec("llama4_kernels.cuda._C")
    if spec is None or spec.origin is None:
        return []
    stems = {OPS[op] for op in PARTS.get(workload.op, (workload.op,))}
    found = _cubin_kernels(Path(spec.origin))
    return [kernel for stem, kernel in found if stem in stems or any(op in kernel.name for op in PARTS.get(workload.op, (workload.op,)))]


def _cubin_kernels(extension: Path) -> list[tuple[str, Kernel]]:
    """The stem of the source file, where the name tells it, and every kernel of an extension."""
    from llama4_kernels.triton import offline

    with tempfile.TemporaryDirectory() as folder:
        extract = [offline.BINARIES / "cuobjdump", "--extract-elf", "all", extension.resolve()]
        subprocess.run(extract, capture_output=True, check=True, cwd=folder)
        return [found for cubin in sorted(Path(folder).glob("*.cubin")) for found in kernels_of(cubin)]


def kernels_of(cubin: Path) -> list[tuple[str, Kernel]]:
    """The stem of the source file, where the name tells it, and every kernel of a cubin."""
    from llama4_kernels.triton import offline

    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    usage = run([offline.BINARIES / "cuobjdump", "--dump-resource-usage", cubin]).stdout
    listing = run([offline.BINARIES / "nvdisasm", "-c", cubin]).stdout
    code = {
        name: offline.opcodes(body)
        for name, body in re.findall(r"^\s*\.section\s+\.text\.(\S+?),(.*?)(?=^\s*\.section|\Z)", listing, re.MULTILINE | re.DOTALL)
    }
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        (
            _stem(name),
            Kernel(readable(name), int(registers), int(stack) + int(local), int(shared), None, offline.count(code.get(name, []))),
        )
        for name, registers, stack, shared, local in re.findall(pattern, usage)
    ]


def _stem(mangled: str) -> str:
    """quantization, of a kernel in an anonymous namespace of quantization.cu."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", mangled)
    return found[1] if found else ""


@functools.cache
def readable(mangled: str) -> str:
    program = shutil.which("c++filt")
    if program is None:
        return mangled
    name = subprocess.run([program, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"llama4_kernels::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", name)
    return name.split(">(")[0] + ">" if ">(" in name else name.split("(")[0]
