"""Every CUDA kernel that ships, compiled by nvcc without a GPU: what ptxas says of it, and what its machine code needs.

    python tests/hopper/machine_code.py [stem ...]     rewrites baseline_<stem>.json, by default of every csrc/<stem>.cu
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama4_kernels.bench import static

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
STEMS = sorted(path.stem for path in CSRC.glob("*.cu"))
FLAGS = re.search(r"COMPILE_LANGUAGE:CUDA>:SHELL:(.*?)>", (ROOT / "CMakeLists.txt").read_text())[1].split()


@dataclass(frozen=True)
class Compiled:
    """notices: what ptxas says beyond the resources. kernels: name -> registers, spilled bytes, and instruction counts by kind.
    shared_bytes: name -> shared memory that is not dynamic, the system's included. instructions: name -> text of each, in order."""

    notices: list[str]
    kernels: dict[str, dict[str, int]]
    shared_bytes: dict[str, int]
    instructions: dict[str, list[str]]


def baseline(stem: str) -> Path:
    return HERE / f"baseline_{stem}.json"


def nvcc_version(nvcc: str) -> str:
    return re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout)[1]


@functools.cache
def compile_stem(nvcc: str, stem: str) -> Compiled:
    """Compile csrc/<stem>.cu with the flags of CMakeLists.txt; RuntimeError where nvcc refuses it, as it does where a kernel spills."""
    headers = [path for path in sorted(CSRC.rglob("*.*h")) if "emulation" not in path.parts]
    text = b"".join(path.read_bytes() for path in [*headers, CSRC / f"{stem}.cu"]) + "".join([nvcc_version(nvcc), *FLAGS]).encode()
    cubin = ROOT / "build" / "cubins" / f"{stem}-{hashlib.sha256(text).hexdigest()[:16]}.cubin"
    said = cubin.with_suffix(".txt")
    if not said.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-std=c++17", "-arch=sm_90a", *FLAGS, f"-I{CSRC}", "-cubin", str(CSRC / f"{stem}.cu"), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        said.write_text(done.stdout + done.stderr)
    found = [kernel for _, kernel in static.kernels_of(cubin)]
    shared_bytes = {kernel.name: kernel.shared_bytes for kernel in found}
    kernels = {kernel.name: {"registers": kernel.registers, "spill_bytes": kernel.spill_bytes} | kernel.instructions for kernel in found}
    notices = [line for line in said.read_text().splitlines() if re.search(r"\(C75\d\d\)|warning", line)]
    return Compiled(notices, kernels, shared_bytes, instructions_of(cubin))


def instructions_of(cubin: Path) -> dict[str, list[str]]:
    from llama4_kernels.triton import offline

    listing = subprocess.run([offline.BINARIES / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    sections = re.findall(r"^\s*\.section\s+\.text\.(\S+?),(.*?)(?=^\s*\.section|\Z)", listing, re.MULTILINE | re.DOTALL)
    return {static.readable(name): re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?) *;", body) for name, body in sections}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compile CUDA kernels with nvcc and rewrite their baseline_<stem>.json.")
    parser.add_argument("stems", nargs="*", choices=STEMS, metavar="stem", help=f"one of {', '.join(STEMS)}; all of them if not given")
    for name in parser.parse_args(arguments).stems or STEMS:
        measured = {"nvcc": nvcc_version("nvcc"), "kernels": dict(sorted(compile_stem("nvcc", name).kernels.items()))}
        baseline(name).write_text(json.dumps(measured, indent=1) + "\n")
        print(f"{len(measured['kernels'])} kernels written to {baseline(name)}")


if __name__ == "__main__":
    main()
