"""Builds csrc/ for the host: the same sources and bindings as llama4_kernels.cuda._C, run by csrc/emulation."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

from llama4_kernels import counters

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
BUILDS = ROOT / "build" / "emulation"
CUDA_HEADERS = ("cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp8.h")


def cuda_include() -> Path | None:
    """The folder of the CUDA toolkit's headers, or None."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        homes.append(_toolkit_of(nvcc))
    return next((home / "include" for home in homes if all((home / "include" / name).exists() for name in CUDA_HEADERS)), None)


def why_not() -> str:
    """Why the emulation cannot be built here, or ""."""
    if not shutil.which("g++"):
        return "no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    if cuda_include() is None:
        return f"no CUDA toolkit with {', '.join(CUDA_HEADERS)} (nvcc on PATH, or CUDA_HOME)"
    return ""


def build(
    *,
    sources: Sequence[Path] | None = None,
    planted: Mapping[str, tuple[str, str]] | None = None,
    edited: Mapping[Path, str] | None = None,
    declarations: str = "",
    sanitize: bool = False,
) -> Path:
    """Build a host library and give its path; what was built before from the same sources is used again.

    sources: None is the extension module, csrc/bindings.cpp with every kernel file. planted: a source's name, or a path in csrc/, ->
    (text, its replacement), to see that a bug is noticed. edited: files of csrc/ that get another text, which may use `declarations`.
    sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer. A source may include headers of csrc/ and of its own folder.
    """
    import pybind11

    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-DLLAMA4_KERNELS_EMULATION"]
    flags += ["-ffp-contract=off", "-fno-strict-aliasing"]  # nvcc assumes nothing of aliases either
    flags += ["-U_FORTIFY_SOURCE"]  # a fortified longjmp takes a change of fibers for a fault
    flags += ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else []
    if sanitize:  # what AddressSanitizer sees as well is left to it
        optimize = ["-Og", "-g1", "-fno-omit-frame-pointer", *sanitizers, "-fno-sanitize=null,vptr,object-size"]
    else:
        optimize = ["-O2"]
    sources = sources or [CSRC / "bindings.cpp", *sorted(CSRC.glob("*.cu"))]
    edited = {**(edited or {}), **_plant(planted or {}, sources)}
    own = sorted({CSRC, *(source.parent for source in sources)})
    folders = [*own, pybind11.get_include(), sysconfig.get_path("include")]
    includes = [*(f"-I{folder}" for folder in folders), "-isystem", str(cuda_include())]
    with_bugs = _headers_with(edited)
    jobs = []
    for source in sources:
        text = edited.get(source, source.read_text())
        headers = _headers_of(text, edited, own)
        first = [f"-I{with_bugs}"] if edited.keys() & headers.keys() else []
        has_bug = bool(source in edited or first) and not sanitize  # and runs little: compiling takes the time
        level = ["-O0"] if source.suffix != ".cu" else ["-O1"] if has_bug else optimize
        how = [*flags, *level, *first, *includes]
        text = f'{declarations if source in edited or first else ""}#line 1 "{source.name}"\n{text}'
        depends_on = "".join(headers.values())
        jobs.append(functools.partial(_make, ["-c", "-x", "c++"], text, ".o", flags=how, depends_on=depends_on, suffix=source.suffix))
    made = [job(wait=False) for job in jobs]
    objects = [found or job() for found, job in zip(made, jobs)]
    library = "".join(map(str, objects))
    return _make(["-shared", *map(str, objects)], library, sysconfig.get_config_var("EXT_SUFFIX"), flags=[*flags, *sanitizers])


def load(path: Path) -> ModuleType:
    """Import a built module under a name of its own: pybind11 gives the same module again for the same name."""
    spec = importlib.util.spec_from_file_location(f"emulation_{path.parent.name}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def op_module(stem: str, kernels: ModuleType) -> ModuleType:
    """llama4_kernels/cuda/<stem>.py on CPU tensors: itself, with `kernels` for llama4_kernels.cuda._C and counters that no kernel with a
    planted bug has left behind, no more of them than launches ask for."""
    package = importlib.import_module("llama4_kernels.cuda")
    own_counters = _fresh(counters)
    own_counters._SMALLEST = 0
    loaded = {f"{package.__name__}._C": kernels, counters.__name__: own_counters}
    for name in dict.fromkeys(("launch", "quantization", stem)):
        spec = importlib.util.spec_from_file_location(f"{package.__name__}.{name}", Path(package.__file__).with_name(f"{name}.py"))
        module = loaded[spec.name] = importlib.util.module_from_spec(spec)
        attributes = {name.rpartition(".")[2]: value for name, value in loaded.items()}
        with mock.patch.dict(sys.modules, loaded), mock.patch.multiple(package, create=True, **attributes):
            spec.loader.exec_module(module)
        if name == "launch":
            module.stream = lambda: 0
    return module


def _fresh(module: ModuleType) -> ModuleType:
    """The module, executed once more."""
    copy = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(copy)
    return copy


LOAD_KERNELS = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype = libc.calloc.restype = libc.memalign.restype = ctypes.c_void_p
"""


def run_sanitized_kernels(script: str, planted: Mapping[str, tuple[str, str]] | None = None) -> subprocess.CompletedProcess:
    """Run a Python script that calls `kernels`, the extension module with sanitizers, on memory of `libc`. planted: as in build()."""
    return run_sanitized(LOAD_KERNELS + script, str(build(planted=planted, sanitize=True)))


def run_sanitized(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a Python script that loads a sanitized library; AddressSanitizer has to be there from the start."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout.strip()
    environ = os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, "-c", script, *arguments], env=environ, capture_output=True, text=True)


def _plant(planted: Mapping[str, tuple[str, str]], sources: Sequence[Path]) -> dict[Path, str]:
    """The text of each file that gets a bug, with it."""
    by_name = {source.name: source for source in sources}
    edited = {}
    for name, (old, new) in planted.items():
        path = by_name.get(name, CSRC / name)
        text = path.read_text()
        assert old in text, f"{name} no longer holds {old!r}, where the test plants its bug"
        edited[path] = text.replace(old, new)
    return edited


def _headers_of(text: str, edited: Mapping[Path, str], folders: Sequence[Path]) -> dict[Path, str]:
    """The headers in these folders that a source includes, also through others, with their text."""
    found: dict[Path, str] = {}
    texts = [text]
    while texts:
        for name in re.findall(r'^#include "(.+)"', texts.pop(), re.MULTILINE):
            path = next((folder / name for folder in folders if (folder / name).exists()), None)
            if path is not None and path not in found:
                found[path] = edited.get(path, path.read_text())
                texts.append(found[path])
    return dict(sorted(found.items()))


def _headers_with(edited: Mapping[Path, str]) -> Path | None:
    """A folder of all headers, the edited ones among them, for the compiler to look in first: headers find each other beside them."""
    if not any(path.suffix in (".h", ".cuh") for path in edited):
        return None
    headers = {path.relative_to(CSRC): edited.get(path, path.read_text()) for path in sorted(CSRC.rglob("*.*h"))}
    folder = BUILDS / hashlib.sha256(repr(headers).encode()).hexdigest()[:16]
    for path, text in headers.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def _make(
    command: list[str], text: str, ending: str, *, flags: list[str], depends_on: str = "", suffix: str = "", wait: bool = True
) -> Path | None:
    """Run g++ unless its result stands in BUILDS under the hash of all that goes in. Whoever is at it is waited for, or without `wait` left
    alone: None."""
    key = hashlib.sha256("\0".join([*command, text, ending, *flags, depends_on]).encode()).hexdigest()[:16]
    result = BUILDS / key / f"_C{ending}"
    result.parent.mkdir(parents=True, exist_ok=True)
    with (result.parent / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if result.exists():
            return result
        if suffix:
            source = result.with_suffix(suffix)
            source.write_text(text)
            command = [*command, str(source)]
        unfinished = result.with_suffix(".unfinished")
        done = subprocess.run(["g++", *flags, *command, "-o", str(unfinished)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return unfinished.replace(result)


def _toolkit_of(nvcc: str) -> Path:
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = next(line.removeprefix("#$ TOP=") for line in shown.splitlines() if line.startswith("#$ TOP="))
    return Path(top).resolve()
