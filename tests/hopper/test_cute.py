"""What csrc/hopper/layout.cuh assumes, against the layouts of CuTe, where CUTLASS's headers are installed (flashinfer brings them along)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import emulation
import pytest

SOURCE = Path(__file__).with_name("cute.cpp")


def headers() -> Path | None:
    """The folder of CUTLASS's headers, or None."""
    spec = importlib.util.find_spec("flashinfer")
    folder = Path(spec.origin).parent / "data/cutlass/include" if spec and spec.origin else None
    return folder if folder and (folder / "cute/atom/mma_traits_sm90_gmma.hpp").exists() else None


pytestmark = [
    pytest.mark.skipif(not shutil.which("g++") or emulation.cuda_include() is None, reason="no g++, or no CUDA toolkit"),
    pytest.mark.skipif(headers() is None, reason="no CUTLASS headers (pip install flashinfer-python)"),
]


def differing(csrc: Path, folder: Path) -> Counter[str]:
    """Comparison -> places that differ, with the layout.cuh of `csrc`."""
    program, cuda = folder / "cute", emulation.cuda_include()
    flags = ["-std=c++17", "-O0", "-w", "-D__host__=", "-D__device__=", f"-I{csrc}"]
    flags += [f"-isystem{path}" for path in (headers(), cuda, cuda / "cccl")]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stderr.splitlines()
    return Counter({name: int(count) for count, name in (line.split(" differ: ") for line in said)})


def test_cute_has_the_assumed_layouts(tmp_path):
    found = differing(emulation.CSRC, tmp_path)
    assert len(found) == 18 and not +found


def test_other_layouts_are_noticed(tmp_path):
    text = (emulation.CSRC / "hopper/layout.cuh").read_text()
    bugs = {
        "(address >> 7)": "(address >> 8)",
        "<< 16 | uint64_t(stride": "<< 17 | uint64_t(stride",
        "i * bytes / 4 % 2 * 8": "i * bytes / 8 % 2 * 8",
    }
    for right, wrong in bugs.items():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (tmp_path / "hopper").mkdir()
    (tmp_path / "hopper/layout.cuh").write_text(text)
    found = differing(tmp_path, tmp_path)
    assert {name for name, count in found.items() if not count} == {name for name in found if name.startswith("accumulators")}
