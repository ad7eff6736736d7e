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
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
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
    """Name -> registers, spills, shared memory, instruction counts and the number of `unwritten_registers` of every recorded kernel."""
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


def unwritten_registers(disassembly: str) -> list[str]:
    """The uniform registers that are read on some path of nvdisasm's listing of one kernel on which nothing has written them.

    They hold wgmma's descriptors, and ptxas 12.8 has left some of them without a value. UPRMT is not asked: it packs bytes of which those
    that nobody uses have no value in PTX already.
    """
    blocks, labels = [_Block()], {}
    for line in disassembly.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        code = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([\w.]+)\s*(.*?)\s*;", line)
        if label:
            blocks.append(_Block())
            blocks[-2].next.append(len(blocks) - 1)
            labels[label[1]] = len(blocks) - 1
        elif code:
            predicate, opcode, operands = code.groups()
            written, read = _uniform_registers(opcode, operands)
            blocks[-1].read |= read - blocks[-1].written
            blocks[-1].written |= written
            if opcode.startswith(("BRA", "EXIT", "RET")):
                target = re.search(r"`\((\.L\w+)\)", operands)
                conditional = predicate or re.match(r"!?U?P\d", operands)
                blocks[-1].next += [target[1]] if target else []
                blocks.append(_Block())
                blocks[-2].next += [len(blocks) - 1] if conditional else []
    before = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for i, block in reversed(list(enumerate(blocks))):
            after = set().union(*(before[labels.get(each, each)] for each in block.next))
            found = block.read | (after - block.written)
            changed |= found != before[i]
            before[i] = found
    return [f"UR{number}" for number in sorted(before[0])]


@dataclass
class _Block:
    """Straight code: the uniform registers that it writes, those that it reads before, and the blocks, by number or label, that follow."""

    written: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    next: list[int | str] = field(default_factory=list)


def _uniform_registers(opcode: str, operands: str) -> tuple[set[int], set[int]]:
    """(written, read) by one instruction."""
    parts = operands.split(", ")
    width = 2 if re.search(r"\.(64|WIDE)", opcode) else 1
    written, read = set(), set()
    writes = re.match(r"U|R2UR|S2UR|REDUX|VOTEU", opcode) and re.fullmatch(r"UR(\d+)", parts[0])
    if writes:
        written = set(range(int(writes[1]), int(writes[1]) + width))
        parts = parts[1:]
    if opcode.startswith("UPRMT"):
        return written, read
    for part in parts:
        first = [int(number) for number in re.findall(r"UR(\d+)", part)]
        if "gdesc[" in part:  # four registers, A's descriptor and B's; A may be in registers, then its descriptor is not read
            a_in_registers = re.match(r"R\d+, R\d+, gdesc", operands)
            read |= set(range(first[0] + (2 if a_in_registers else 0), first[0] + 4))
        elif "desc[" in part:
            read |= {first[0], first[0] + 1, *first[1:]}
        else:
            both = 2 if opcode.startswith("U") and ".64" in opcode or ".64" in part else 1
            read |= {number + i for number in first for i in range(both)}
    return written, read


def _plain(value) -> str:
    return str(getattr(value, "value", value))


def _compile(name: str, architecture: str) -> CompiledKernel:
    function, signature, constexprs, attrs, options = _work[name]
    source = function.ASTSource(function, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[architecture], 32), options=options.__dict__)


def _measure(name: str, architecture: str) -> dict[str, int]:
    kernel = _compile(name, architecture)
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
        "unwritten_registers": len(unwritten_registers(code)),
    } | count(opcodes(code))


def _run(binary: str, *args: str) -> str:
    return subprocess.run([BINARIES / binary, *args], capture_output=True, text=True, check=True).stdout
