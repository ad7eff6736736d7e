"""The Triton kernels that a call would launch, compiled without a GPU or driver, and what their machine code needs.

Running a call on meta tensors against a stand-in driver runs the real launch code and records each kernel that it would launch, as
specialised; equal ones are compiled once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from llama4_kernels.triton import config

ARCHITECTURES = {"sm_90": 90, "sm_80": 80}
SHARED_KIB = {"sm_90": 227, "sm_80": 163}
INSTRUCTIONS = {
    "wgmma": r"[HQ]GMMA",
    "mma": r"[HQ]MMA",
    "tma_load": r"UTMALDG",
    "async_copy": r"LDGSTS",
    "local_load": r"LDL",
    "local_store": r"STL",
}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Recorded = dict[str, tuple]


class _Driver:
    """What Triton's launch code asks of a driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def recorded(calls: Iterable[Callable[[], object]], architecture: str) -> Recorded:
    """Name -> what to compile, for every distinct kernel that the calls launch on `architecture`, one of ARCHITECTURES."""
    found: Recorded = {}

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        constants = ",".join(f"{self.arg_names[path[0]]}={_plain(value)}" for path, value in constexprs.items())
        pointers = [kind for kind in signature.values() if "*" in kind or "desc" in kind]
        dtypes = ",".join(dict.fromkeys(re.sub(r"[*]|tensordesc", "", kind) for kind in pointers))
        name = f"{self.fn.__name__}[{dtypes}|{constants}|warps={options.num_warps},stages={options.num_stages}]"
        found[name] = (self, signature, constexprs, attrs, options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", record))
        stack.enter_context(mock.patch.object(config, "shared_kib", lambda device: SHARED_KIB[architecture]))
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Driver(ARCHITECTURES[architecture]))
        try:
            for call in calls:
                call()
        finally:
            triton.runtime.driver._active = before
    return dict(sorted(found.items()))


def measure(kernels: Recorded, architecture: str, workers: int = 2) -> dict[str, dict[str, int]]:
    """Name -> registers, spills, shared memory and instruction counts of every recorded kernel."""
    global _work
    _work = kernels
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return dict(zip(_work, pool.map(_measure, _work, [architecture] * len(_work))))


def opcodes(disassembly: str) -> list[str]:
    """The opcodes of nvdisasm's listing, without predicates and modifiers."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", disassembly)


def count(found: list[str]) -> dict[str, int]:
    """How many instructions there are, and of each kind of INSTRUCTIONS."""
    kinds = {label: sum(bool(re.fullmatch(pattern, opcode)) for opcode in found) for label, pattern in INSTRUCTIONS.items()}
    return {"instructions": len(found)} | kinds


def _plain(value) -> str:
    return str(getattr(value, "value", value))


def _measure(name: str, architecture: str) -> dict[str, int]:
    function, signature, constexprs, attrs, options = _work[name]
    source = function.ASTSource(function, signature, constexprs, attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[architecture], 32), options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", "-ndf", file.name)
    counted = {key: int(re.search(rf"{key.upper()}:(\d+)", usage).group(1)) for key in ("reg", "stack", "local")}
    return {
        "registers": counted["reg"],
        "spill_bytes": counted["stack"] + counted["local"],
        "shared_bytes": kernel.metadata.shared,
    } | count(opcodes(code))


def _run(binary: str, *args: str) -> str:
    return subprocess.run([BINARIES / binary, *args], capture_output=True, text=True, check=True).stdout
