"""Builds kernels/*.cu into one shared library and calls its entry points.

An entry point takes addresses, integers and a stream, and gives nothing or the words of an error; see kernels/entry.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
KERNELS = Path(__file__).parent / "kernels"
CSRC = ROOT / "csrc"
BUILDS = ROOT / "build" / "calibration"
TARGET = ("-gencode=arch=compute_90a,code=sm_90a", "-cudart", "static")
COMPILE = ("-std=c++17", "-O3", "-Xptxas", "-v,-warn-spills,-Werror", "-Xcompiler", "-fPIC,-fvisibility=hidden")


class BuildError(RuntimeError):
    """nvcc is missing or refused the sources."""


@dataclass(frozen=True)
class Library:
    """A built library, and what the assembler said of its kernels: registers, spills, serialised wgmma."""

    path: Path
    ptxas: str


def build() -> Library:
    """Build the library; what was built before from the same sources is used again."""
    nvcc = _setup().find_nvcc(os.environ)
    if nvcc is None:
        raise BuildError("no nvcc: put the CUDA toolkit on PATH or set CUDA_HOME")
    sources = sorted(KERNELS.glob("*.cu"))
    headers = b"".join(path.read_bytes() for folder in (KERNELS, CSRC) for path in sorted(folder.rglob("*.*h")))
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process builds the same: wait for its results
        objects = list(pool.map(lambda source: _compile(nvcc, source, headers), sources))
    words = "".join(path.with_suffix(".txt").read_text() for path in objects)
    library = _nvcc(nvcc, "libcalibration.so", [*TARGET, "-shared", *map(str, objects)], b"")
    return Library(library, words)


def call(entry: str, *arguments: Tensor | int) -> None:
    """Launch through an entry point on torch's current stream. RuntimeError with its words where it refuses."""
    values = [ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else ctypes.c_int64(each) for each in arguments]
    function = getattr(_loaded(), entry)
    function.restype = ctypes.c_char_p
    error = function(*values, ctypes.c_void_p(_stream()))
    if error is not None:
        raise RuntimeError(error.decode())


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@functools.cache
def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL(str(build().path))


@functools.cache
def _setup():
    spec = importlib.util.spec_from_file_location("llama4_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(nvcc: str, source: Path, headers: bytes) -> Path:
    return _nvcc(
        nvcc, f"{source.stem}.o", [*TARGET, *COMPILE, f"-I{CSRC}", f"-I{KERNELS}", "-c", str(source)], source.read_bytes() + headers
    )


def _nvcc(nvcc: str, name: str, arguments: list[str], content: bytes) -> Path:
    """Run nvcc unless its result stands in BUILDS under the hash of all that goes in; its words stand beside the result."""
    key = hashlib.sha256("\0".join([nvcc, *arguments]).encode() + content).hexdigest()[:16]
    result = BUILDS / key / name
    if result.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    unfinished = result.with_suffix(f".{os.getpid()}{result.suffix}")
    done = subprocess.run([nvcc, *arguments, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"nvcc refused {name}:\n{done.stdout}{done.stderr}")
    result.with_suffix(".txt").write_text(done.stdout + done.stderr)
    return unfinished.replace(result)


if __name__ == "__main__":
    print(build().path)
