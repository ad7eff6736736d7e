"""What csrc/hopper/layout.cuh assumes, as formulas of its own, and the probes of layouts.cu compared with them bit for bit.

The same checks run in the emulation, on CPU tensors, and on a Hopper GPU. On a host with one, from a script:

    failures = layouts.failures(layouts.build_cuda(), torch.device("cuda"))      # [] or a line per layout that is otherwise
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("layouts.cu")
ROOT = Path(__file__).parents[2]

SPANS = (16, 32, 64, 128)  # bytes, by the number of the swizzle
COLUMNS = (*range(8, 65, 8), *range(80, 257, 16))
K_BYTES = 32
PROCESS_SECONDS = 30
STARTED, FAILED = "started: ", "failed: "
DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16}


@dataclass(frozen=True)
class Case:
    name: str
    check: Callable[[ctypes.CDLL, torch.device], bool]

    @property
    def group(self) -> str:
        return ", ".join(self.name.split(", ")[:2])


def build_cuda() -> Path:
    """Compile the probes with nvcc for sm_90a."""
    sources = [SOURCE, *sorted((ROOT / "csrc" / "hopper").iterdir()), ROOT / "csrc" / "device.h"]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    library = ROOT / "build" / "layouts" / f"{key}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    if not library.exists():
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        flags = ["-std=c++17", "-O2", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
        done = subprocess.run([nvcc, *flags, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr}")
    return library


def load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    for name in ("probe_load", "probe_multicast", "probe_store", "probe_wgmma", "probe_matrices"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def cases() -> Iterator[Case]:
    """Every layout, group by group."""
    for kind, check in (("TMA load", _load), ("multicast", _multicast), ("TMA store", _store)):
        for swizzle in range(4):
            for element in (1, 2, 4):
                chunk = 16 // element
                for at in ((0, 0), (chunk, 5), (-chunk, -3), (64 - chunk, 20)):
                    if kind == "TMA store" and min(at) < 0:
                        continue
                    name = f"{kind}, {SPANS[swizzle]} byte rows, {element} byte elements, at {at}"
                    yield Case(name, lambda library, device, c=check, s=swizzle, e=element, at=at: c(library, device, s, e, at))
    for transposed in (False, True):
        yield Case(f"ldmatrix and stmatrix, transposed: {transposed}", lambda library, device, t=transposed: _matrices(library, device, t))
    for element in DTYPES:
        majors = ("kk",) if element == 1 else ("kk", "km", "mk", "mm")
        for form in [*majors, *(f"r{major[1]}" for major in majors if major[0] == "k")]:
            for swizzle in range(4):
                for n in COLUMNS if swizzle == 3 else (8, 64, 256):
                    operands = f"A {_SOURCES[form[0]]}, B {_SOURCES[form[1]]}, {SPANS[swizzle]} byte rows, m64n{n}"
                    name = f"wgmma, {DTYPES[element]}, {operands}"
                    yield Case(name, lambda library, device, e=element, f=form, s=swizzle, n=n: _wgmma(library, device, n, e, f, s))


def failures(library: Path, device: torch.device, *, apart: bool | None = None) -> list[str]:
    """A line for each case that is otherwise.

    apart: in a process of their own, as a fault is the end of CUDA in its process, and None on a GPU alone: after a case that faults or
    hangs another process goes on with the next group. Otherwise a fault raises RuntimeError.
    """
    if not (device.type == "cuda" if apart is None else apart):
        return list(_failed(library, device, cases()))
    groups = list(dict.fromkeys(case.group for case in cases()))
    failed = []
    while groups:
        ended, more = _in_a_process(library, device, groups)
        failed += more
        groups = groups[groups.index(ended) + 1 :] if ended else []
    return failed


def _failed(
    library: Path, device: torch.device, chosen: Iterable[Case], started: Callable[[Case], None] = lambda case: None
) -> Iterator[str]:
    loaded = load(library)
    for case in chosen:
        started(case)
        try:
            right = case.check(loaded, device)
        except RuntimeError as error:
            raise RuntimeError(f"{case.name}: {error}") from error
        if not right:
            yield case.name


def _in_a_process(library: Path, device: torch.device, groups: list[str]) -> tuple[str | None, list[str]]:
    """The group that a fault ended, or None, and a line for each case that is otherwise."""
    command = [sys.executable, __file__, str(library), device.type, *groups]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(command, stdout=out, stderr=errors, timeout=PROCESS_SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = None
        lines, said = ([line.rstrip() for line in (file.seek(0), file)[1] if line.strip()] for file in (out, errors))
    failed = [line.removeprefix(FAILED) for line in lines if line.startswith(FAILED)]
    if code == 0:
        return None, failed
    started = [line.removeprefix(STARTED) for line in lines if line.startswith(STARTED)]
    raised = (line for line in said if "Error" in line and not line.startswith(" "))
    why = f"not done after {PROCESS_SECONDS} s" if code is None else next(raised, f"exit code {code}")
    if not started:
        raise RuntimeError(f"the layouts' process: {why}")
    group = next(case.group for case in cases() if case.name == started[-1])
    return group, [*failed, f"{started[-1]}: {why}; the rest of its group did not run"]


def _main(library: str, device: str, *groups: str) -> None:
    chosen = [case for case in cases() if case.group in groups]
    for name in _failed(Path(library), torch.device(device), chosen, lambda case: print(STARTED + case.name, flush=True)):
        print(FAILED + name, flush=True)


_SOURCES = {"k": "K-major", "m": "MN-major", "r": "in registers"}


# ---- formulas


def permute_chunks(rows: Tensor, swizzle: int) -> Tensor:
    """Rows [R, span] of bytes as a swizzle lays them out: chunk c of a row in 128-byte line l moves to chunk c ^ l, modulo its chunks."""
    span = SPANS[swizzle]
    chunks = span // 16
    lines = torch.arange(len(rows)) * span // 128
    to = torch.arange(chunks)[None, :] ^ (lines % chunks)[:, None]
    permuted = torch.empty_like(rows.view(len(rows), chunks, 16))
    permuted[torch.arange(len(rows))[:, None], to] = rows.view(len(rows), chunks, 16)
    return permuted.view(len(rows), span)


def k_major_image(operand: Tensor, swizzle: int) -> tuple[Tensor, int, int, int]:
    """Bytes of an operand [R, K], leading and stride offsets (0: the library's own), and the bytes of a K step."""
    rows = operand.view(torch.uint8)
    if swizzle:
        return permute_chunks(rows, swizzle).flatten(), 0, 0, K_BYTES
    image = rows.view(len(rows), -1, 16).transpose(0, 1)  # a column of chunks after another
    return image.flatten(), 16 * len(rows), 128, 2 * 16 * len(rows)


def mn_major_image(operand: Tensor, swizzle: int) -> tuple[Tensor, int, int, int]:
    """As k_major_image, with M or N contiguous."""
    span, k = SPANS[swizzle], operand.shape[1]
    width = span // 2
    padded = torch.nn.functional.pad(operand, (0, 0, 0, -len(operand) % width))
    tiles = padded.view(-1, width, k).transpose(1, 2).contiguous().view(torch.uint8)  # [tiles, K, span]
    image = torch.cat([permute_chunks(tile, swizzle) for tile in tiles]).flatten()
    return (image, k * span, 0, 16 * span) if swizzle else (image, 128, k * 16, 16 * span)


def accumulators(product: Tensor) -> Tensor:
    """[64, N] as each of the 128 threads holds it, [128, N / 2]."""
    n = product.shape[1]
    warp_half_group_octet_quad_pair = product.view(4, 2, 8, n // 8, 4, 2)
    return warp_half_group_octet_quad_pair.permute(0, 2, 4, 3, 1, 5).reshape(128, n // 2)


def operand_registers(operand: Tensor) -> Tensor:
    """A [64, K] as each thread holds it: [128, K steps, 4] of 32 bits."""
    element = operand.element_size()
    steps = operand.shape[1] * element // K_BYTES
    view = operand.view(torch.uint8).view(4, 2, 8, steps, 2, 4, 4)  # warp, half of 16 rows, row, step, half of K, thread, byte
    return view.permute(0, 2, 5, 3, 4, 1, 6).contiguous().view(torch.int32).view(128, steps, 4)


# ---- probes


def _run(function, *arguments) -> None:
    pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
    error = function(*pointers).decode()
    if error:
        raise RuntimeError(error)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _box(swizzle: int, element: int, at: tuple[int, int], rows: int = 24) -> tuple[Tensor, Tensor, int]:
    """A tensor [37, 64] of random bytes, the box [rows, ·] at `at` of it with zeros out of bounds, and the box's columns."""
    columns = SPANS[swizzle] // element
    tensor = torch.randint(1, 255, (37, 64 * element), dtype=torch.uint8)
    margin = 256
    padded = torch.nn.functional.pad(tensor, (margin * element, margin * element, margin, margin))
    top, left = at[1] + margin, (at[0] + margin) * element
    return tensor, padded[top : top + rows, left : left + SPANS[swizzle]].contiguous(), columns


def _load(library: ctypes.CDLL, device: torch.device, swizzle: int, element: int, at: tuple[int, int]) -> bool:
    tensor, box, columns = _box(swizzle, element, at)
    out = torch.zeros(box.numel(), dtype=torch.uint8, device=device)
    _run(library.probe_load, tensor.to(device), element, 37, 64, 24, columns, swizzle, *at, out)
    return torch.equal(out.cpu(), permute_chunks(box, swizzle).flatten())


def _multicast(library: ctypes.CDLL, device: torch.device, swizzle: int, element: int, at: tuple[int, int]) -> bool:
    tensor, boxes, columns = _box(swizzle, element, at, rows=48)
    out = torch.zeros(2, boxes.numel(), dtype=torch.uint8, device=device)
    _run(library.probe_multicast, tensor.to(device), element, 37, 64, 24, columns, swizzle, *at, out)
    return torch.equal(out.cpu(), permute_chunks(boxes, swizzle).flatten().expand(2, -1))


def _store(library: ctypes.CDLL, device: torch.device, swizzle: int, element: int, at: tuple[int, int]) -> bool:
    tensor, box, columns = _box(swizzle, element, at)
    written = torch.zeros_like(tensor).to(device)
    _run(library.probe_store, written, element, 37, 64, 24, columns, swizzle, *at, permute_chunks(box, swizzle).flatten().to(device))
    want = torch.zeros_like(tensor)
    rows, bytes_ = slice(max(at[1], 0), at[1] + 24), slice(max(at[0], 0) * element, at[0] * element + SPANS[swizzle])
    want[rows, bytes_] = tensor[rows, bytes_]
    return torch.equal(written.cpu(), want)


def _matrices(library: ctypes.CDLL, device: torch.device, transposed: bool) -> bool:
    in_memory = torch.arange(256, dtype=torch.int16)
    loaded, stored = torch.zeros(32, 4, 2, dtype=torch.int16, device=device), torch.zeros(256, dtype=torch.int16, device=device)
    _run(library.probe_matrices, int(transposed), in_memory.to(device), loaded, stored)
    matrices = in_memory.view(4, 8, 8)
    in_registers = (matrices.mT if transposed else matrices).reshape(4, 32, 2).transpose(0, 1)  # [lane, matrix, half]
    of_register = torch.arange(256, dtype=torch.int16).view(32, 4, 2).transpose(0, 1).reshape(4, 8, 8)
    return torch.equal(loaded.cpu(), in_registers) and torch.equal(stored.cpu(), (of_register.mT if transposed else of_register).flatten())


def _wgmma(library: ctypes.CDLL, device: torch.device, n: int, element: int, form: str, swizzle: int) -> bool:
    """Products of small integers, which are exact in any order of summation."""
    a_form, b_form = form
    steps = SPANS[swizzle] // K_BYTES if "k" in form and swizzle else 2  # a K-major swizzled row holds one span
    k = steps * K_BYTES // element
    a, b = (torch.randint(-8, 9, (rows, k)).to(DTYPES[element]) for rows in (64, n))
    image_of = {"k": k_major_image, "m": mn_major_image, "r": lambda operand, swizzle: (torch.zeros(0, dtype=torch.uint8), 0, 0, 0)}
    images = [image_of[a_form](a, swizzle), image_of[b_form](b, swizzle)]
    operands = [x for image, *rest in images for x in (image.to(device), image.numel(), *rest)]
    registers = operand_registers(a).to(device) if a_form == "r" else None
    out = torch.zeros(128, n // 2, dtype=torch.float32, device=device)
    majors = (int(a_form == "m"), int(b_form == "m"))
    _run(library.probe_wgmma, n, int(element == 1), *majors, swizzle, steps, *operands, registers, out)
    return torch.equal(out.cpu(), accumulators(a.float() @ b.float().t()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
