"""Every Triton kernel that ships, compiled without a GPU or driver, and what its machine code needs.

A shipped_*.py beside this file lists calls of the ops at the shapes of the real models, on meta tensors. Running such a call against a
stand-in driver runs the real launch code and records each kernel it would launch, as specialised; equal ones are compiled once.

    python tests/triton/offline.py [list ...]     rewrites baseline_<list>.json, by default of every shipped_<list>.py
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from llama4_kernels.triton import config

HERE = Path(__file__).parent
LISTS = sorted(path.stem.removeprefix("shipped_") for path in HERE.glob("shipped_*.py"))
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
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def module(shipped_list: str):
    """shipped_<list>.py: calls(architecture), and the names of kernels that use WGMMA and TMA on sm_90."""
    sys.path.insert(0, str(HERE))
    return importlib.import_module(f"shipped_{shipped_list}")


def baseline(shipped_list: str) -> Path:
    return HERE / f"baseline_{shipped_list}.json"


def shipped(architecture: str, shipped_list: str) -> dict[str, tuple]:
    """Name -> what to compile, for every distinct kernel that the listed calls launch on `architecture`."""
    recorded: dict[str, tuple] = {}

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        constants = ",".join(f"{self.arg_names[path[0]]}={_plain(value)}" for path, value in constexprs.items())
        pointers = [kind for kind in signature.values() if "*" in kind or "desc" in kind]
        dtypes = ",".join(dict.fromkeys(re.sub(r"[*]|tensordesc", "", kind) for kind in pointers))
        name = f"{self.fn.__name__}[{dtypes}|{constants}|warps={options.num_warps},stages={options.num_stages}]"
        recorded[name] = (self, signature, constexprs, attrs, options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", record))
        stack.enter_context(mock.patch.object(config, "shared_kib", lambda device: SHARED_KIB[architecture]))
        triton.runtime.driver.set_active(_Driver(ARCHITECTURES[architecture]))
        try:
            for call in module(shipped_list).calls(architecture):
                call()
        finally:
            triton.runtime.driver._active = None
    return dict(sorted(recorded.items()))


def measure(architecture: str, shipped_list: str, workers: int = 2) -> dict[str, dict[str, int]]:
    """Name -> registers, spills, shared memory and instruction counts of every kernel of a list."""
    global _work
    _work = shipped(architecture, shipped_list)
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return dict(zip(_work, pool.map(_measure, _work, [architecture] * len(_work))))


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
        code = _run("nvdisasm", "-c", file.name)
    counted = {key: int(re.search(rf"{key.upper()}:(\d+)", usage).group(1)) for key in ("reg", "stack", "local")}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code)
    return {
        "registers": counted["reg"],
        "spill_bytes": counted["stack"] + counted["local"],
        "shared_bytes": kernel.metadata.shared,
        "instructions": len(opcodes),
    } | {label: sum(bool(re.fullmatch(pattern, opcode)) for opcode in opcodes) for label, pattern in INSTRUCTIONS.items()}


def _run(binary: str, *args: str) -> str:
    return subprocess.run([_BINARIES / binary, *args], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for name in sys.argv[1:] or LISTS:
        measured = {"triton": triton.__version__} | {architecture: measure(architecture, name) for architecture in ARCHITECTURES}
        baseline(name).write_text(json.dumps(measured, indent=1) + "\n")
        print(f"{sum(len(measured[a]) for a in ARCHITECTURES)} kernels written to {baseline(name)}")
